"""Words on a terminal: the raev2 command."""
