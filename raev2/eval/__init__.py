"""Evaluation: pure functions (`distances`, `image_pairs`) and the protocols that every task may use (`protocols`)."""
