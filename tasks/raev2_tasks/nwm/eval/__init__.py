"""Protocols and metrics of the navigation world model."""
