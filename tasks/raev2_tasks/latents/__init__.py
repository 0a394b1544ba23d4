"""Latents of whole splits by a trained tokenizer: their statistics, and files that training reads."""
