"""Planning with a world model."""
