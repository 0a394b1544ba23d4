"""Sampling settings tried one after the other on a trained run."""
