"""What may be asked for: one light file per command, which imports nothing heavy."""
