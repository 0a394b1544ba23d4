"""Text to image: sharded image-text data, text encoders, compositional evaluation."""
