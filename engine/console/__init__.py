"""The output of the commands: tables, progress bars, logs, and JSON documents."""
