"""Evaluation of language models: log-likelihoods, tasks, paired comparisons, lm-evaluation-harness."""
