"""A model that answers OpenAI's interface for completions, with its neurons beside it."""
