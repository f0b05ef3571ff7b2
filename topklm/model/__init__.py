"""The TopK transformer: pure functions and Flax modules, no data and no training."""
