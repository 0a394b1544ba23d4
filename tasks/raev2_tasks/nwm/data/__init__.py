"""Recorded trajectories: files, index, datasets, places to start from."""
