"""From text to a prepared dataset: the machinery of `topklm prepare`, on one machine or many."""
