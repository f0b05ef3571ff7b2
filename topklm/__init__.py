"""topklm: pretrain TopK language models and read their hidden states."""

from topklm.inference.load import LanguageModel, load

__all__ = ["LanguageModel", "load"]
__version__ = "0.1.0"
