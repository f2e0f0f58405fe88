"""Transformers' classes: putting a plan on a model and taking it off, what its forward is called
with, where in its prompt the images are."""
