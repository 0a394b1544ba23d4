"""Worlds that can be driven in: a toy and a simulator."""
