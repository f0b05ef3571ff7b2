"""topklm: pretrain TopK language models and read their hidden states."""

import importlib
from typing import TYPE_CHECKING, Any

from topklm.imports import VERSION

if TYPE_CHECKING:
    from topklm.inference.language_model import LanguageModel
    from topklm.inference.load import load

__all__ = ["LanguageModel", "load"]
__version__ = VERSION
_MODULES = {"LanguageModel": "topklm.inference.language_model", "load": "topklm.inference.load"}


def __getattr__(name: str) -> Any:
    # They need JAX, which takes seconds to import; commands and workers that prepare text do without.
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
