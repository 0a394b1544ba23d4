"""Driving and rolling out a trained model."""
