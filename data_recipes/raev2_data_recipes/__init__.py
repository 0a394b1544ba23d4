"""Data recipes: how a dataset folder is planned, built and verified. Read ``base.py`` first."""
