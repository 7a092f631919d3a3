"""Reading circuits from weights and activations."""
