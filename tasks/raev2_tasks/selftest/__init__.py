"""`raev2 selftest`: fault injection on a tiny training of each task."""
