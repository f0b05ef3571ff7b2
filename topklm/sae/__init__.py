"""Sparse autoencoders of a Base LM's hidden states: kinds, training, measures."""
