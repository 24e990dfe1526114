"""What the commands print: tables, progress, logs, and the manifest that goes into every JSON result."""
