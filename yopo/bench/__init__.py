"""Times a model: ours against stock on random weights, or any one as it answers."""
