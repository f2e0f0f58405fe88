"""Questions about images, and the model inputs that a processor makes of them."""
