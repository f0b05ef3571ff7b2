"""topklm: pretrain TopK language models and read their hidden states."""

import importlib
from typing import TYPE_CHECKING, Any

from topklm.imports import VERSION

if TYPE_CHECKING:
    from topklm.explorer.notebook import open_run as open
    from topklm.explorer.traced import open_trace
    from topklm.explorer.traced import open_trace as trace
    from topklm.inference.language_model import LanguageModel
    from topklm.inference.load import load

__all__ = ["LanguageModel", "load", "open", "open_trace", "trace"]
__version__ = VERSION
_PLACES = {  # module and name there
    "LanguageModel": ("topklm.inference.language_model", "LanguageModel"),
    "load": ("topklm.inference.load", "load"),
    "open": ("topklm.explorer.notebook", "open_run"),
    "open_trace": ("topklm.explorer.traced", "open_trace"),
}


def __getattr__(name: str) -> Any:
    # They need JAX, which takes seconds to import; commands and workers that prepare text do without.
    if name == "trace":  # a module, which is called: a function of the same name would hide it
        return importlib.import_module("topklm.trace")
    if name in _PLACES:
        module, attribute = _PLACES[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
