"""From text to batches: corpora, tokenizer, token streams on disk, batches in memory."""
