"""FLOPs and bytes, dense and pruned. Numbers only; nothing is run."""
