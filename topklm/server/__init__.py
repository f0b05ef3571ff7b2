"""A model behind OpenAI's interface for completions, with its neurons beside it."""
