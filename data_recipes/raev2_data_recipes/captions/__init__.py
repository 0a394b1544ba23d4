"""Recipes of pictures with captions."""
