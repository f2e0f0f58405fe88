"""Checkpoints in their makers' own formats, turned into transformers' own."""
