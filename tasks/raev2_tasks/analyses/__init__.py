"""Analyses of the papers, each one command that writes a table and a plot: `raev2 analyse NAME`. See `command.py`."""
