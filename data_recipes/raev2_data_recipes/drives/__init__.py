"""Recipes of trajectories: frames with poses."""
