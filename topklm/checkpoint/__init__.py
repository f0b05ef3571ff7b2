"""Checkpoints and the folder of a run: written, read, verified and kept."""
