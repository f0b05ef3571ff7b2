"""From text to a prepared dataset: the machinery behind `topklm prepare`, on one machine or many."""
