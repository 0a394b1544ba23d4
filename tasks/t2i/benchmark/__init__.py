"""The embedded compositional benchmark: renderers with ground truth, and exact scorers."""
