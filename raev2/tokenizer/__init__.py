"""Stage 1: the representation autoencoder. Read rae.py first."""
