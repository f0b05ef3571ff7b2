"""Figures of single neurons, from a store of their activations and the model itself."""
