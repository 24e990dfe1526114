"""The `xpar` sub-commands, one module each."""
