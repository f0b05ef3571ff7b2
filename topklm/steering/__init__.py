"""Steering by neurons, measured: what setting one does to the text that a model writes."""
