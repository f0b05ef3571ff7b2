"""Prompts and token ids that somebody sent, and the model that they are for."""

from typing import Any

import numpy as np

from topklm.inference.language_model import LanguageModel
from topklm.server import fields
from topklm.server.errors import ApiError
from topklm.server.limits import Limits
from topklm.web.client import kind_of


def check_model(content: dict[str, Any], name: str) -> None:
    """Raises ApiError if another model is asked for than there is; who names none means this one."""
    asked = content.get("model")
    if asked is not None and asked != name:
        shown = repr(asked[:80]) if isinstance(asked, str) else kind_of(asked)
        message = f"model = {shown}: there is only {name!r}"
        raise ApiError(404, message, "model", "model_not_found")


def prompt_ids(model: LanguageModel, prompt: Any, limits: Limits) -> list[int]:
    """Of one prompt: a text, behind a separator as in training, or token ids as they are.

    Raises:
        ApiError: For another thing, or too many.
    """
    vocabulary = model.config.model.vocab_size
    if isinstance(prompt, str):
        ids = [model.tokenizer.separator_id]
        ids += model.tokenizer.encode(fields.checked_text(prompt, "prompt")).tolist()
    elif _is_ids(prompt):
        ids = prompt
    else:
        raise fields.wrong(
            "prompt", prompt, "a text, an array of token ids, or an array of several of either"
        )
    if not ids:
        raise ApiError(400, "prompt is empty: send a text, or at least one token id", "prompt")
    if len(ids) > limits.prompt_tokens:
        raise ApiError(
            400,
            f"prompt has {len(ids)} tokens: must be at most {limits.prompt_tokens}; shorten it",
            "prompt",
            "context_length_exceeded",
        )
    if outside := [token for token in ids if not 0 <= token < vocabulary]:
        shown = str(outside[0]) if abs(outside[0]) < 10**20 else "a huge number"
        raise ApiError(400, f"prompt: token {shown} must be from 0 to {vocabulary - 1}", "prompt")
    return ids


def prompts_of(model: LanguageModel, content: dict[str, Any], limits: Limits) -> list[list[int]]:
    """Token ids of one prompt or several; errors as `prompt_ids`."""
    prompt = content.get("prompt")
    if prompt is None:
        raise fields.missing("prompt", "a text, or token ids")
    several = isinstance(prompt, list) and prompt and not _is_ids(prompt)
    prompts = prompt if several else [prompt]
    if len(prompts) > limits.texts:
        raise ApiError(400, f"there are {len(prompts)} prompts: must be at most {limits.texts}", "prompt")
    return [prompt_ids(model, one, limits) for one in prompts]


def token_ids(content: dict[str, Any], name: str, vocabulary: int) -> np.ndarray:
    """int64[n], an array of token ids that must be there.

    Raises:
        ApiError: For another thing.
    """
    value = content.get(name)
    if value is None:
        raise fields.missing(name, "an array of token ids")
    if not _is_ids(value):
        raise fields.wrong(name, value, "an array of token ids")
    if outside := [token for token in value if not 0 <= token < vocabulary]:
        shown = str(outside[0]) if abs(outside[0]) < 10**20 else "a huge number"
        raise ApiError(400, f"{name}: token {shown} must be from 0 to {vocabulary - 1}", name)
    return np.array(value, np.int64)


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(type(token) is int for token in prompt)
