"""Steering by neurons, measured: the effect of setting one on the text that a model writes."""
