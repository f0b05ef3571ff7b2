"""From batches to a trained run on disk."""
