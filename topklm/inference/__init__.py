"""Opening a run as a model, and text from it."""
