"""`raev2 reconstruct`: pictures after encoding and decoding, with their scores."""
