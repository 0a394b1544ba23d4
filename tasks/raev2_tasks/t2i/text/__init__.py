"""Captions, text encoders and the conditions they make."""
