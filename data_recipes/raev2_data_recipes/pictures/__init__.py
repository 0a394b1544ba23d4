"""Recipes of pictures with or without classes."""
