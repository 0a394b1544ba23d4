"""The scripts that made what ships in the packages."""
