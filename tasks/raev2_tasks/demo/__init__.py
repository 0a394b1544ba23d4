"""A page on which a trained run is tried by hand."""
