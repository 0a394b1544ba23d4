"""The built-in tasks; each is a plugin found through the entry-point group `raev2.tasks`."""
