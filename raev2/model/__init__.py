"""Stage 2: the diffusion transformer, from the smallest piece (`layers.py`) to the whole (`generator.py`)."""
