"""Times ours against stock, on random weights."""
