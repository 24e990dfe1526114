"""Who talks to whom and how tokens travel. Knows no model and no checkpoint."""
