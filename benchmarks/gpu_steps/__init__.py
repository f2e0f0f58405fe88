"""The steps of benchmarks/gpu.py: what is checked and measured on a GPU, and how it is written."""
