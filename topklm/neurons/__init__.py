"""The neurons of TopK layers: captured from a model, and shown."""
