"""What the commands print and write: tables, progress bars, logs, and the JSON document with its manifest."""
