"""Charts, and numbers that were published."""
