"""Parses and checks requests for completions: prompts, token ids, sampling, interventions."""

from collections.abc import Sequence
import dataclasses
import re
import secrets
from typing import Any

import numpy as np

from topklm.config import ModelConfig
from topklm.errors import ArgumentError
from topklm.inference.detokenize import check_stop
from topklm.inference.intervention_batch import InterventionBatch
from topklm.inference.interventions import DEFAULT_MODE, Intervention, needs_value
from topklm.inference.language_model import LanguageModel
from topklm.inference.sampling import Sampling
from topklm.inference.sequence import WHEN_FULL
from topklm.inference.sequence import Sequence as TokenSequence
from topklm.inference.steps import MOST_ALTERNATIVES
from topklm.server import fields
from topklm.server.errors import ApiError, of_field
from topklm.server.limits import Limits
from topklm.web.client import kind_of

_MAX_TOKENS = 16  # OpenAI's default
_MOST_STOPS = 16
_SMALLEST_TOP_P = 1e-30
# Fields of OpenAI's that have no counterpart here, and the values that ask for nothing.
_WITHOUT_USE: dict[str, tuple] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "suffix": (None, ""),
}
_OPENAI = (
    "model prompt max_tokens temperature top_p n stream stream_options logprobs echo stop best_of seed user"
)
_OURS = "top_k min_p repetition_penalty steer steer_mode when_full"
_KNOWN = (*_OPENAI.split(), *_OURS.split(), *_WITHOUT_USE)


@dataclasses.dataclass(frozen=True)
class Completion:
    """A request for completions.

    Attributes:
        prompts: Token ids of each prompt.
        sequences: n of each prompt, one prompt after another.
        n: Completions of each prompt.
        stop: Texts before which a completion ends.
        logprobs: How many alternatives to report beside each token; None: report no probabilities.
        echo: Whether the prompt stands before its completion.
        stream: Whether the answer comes in pieces.
        include_usage: Whether the last piece counts the tokens.
    """

    prompts: Sequence[list[int]]
    sequences: Sequence[TokenSequence]
    n: int
    stop: tuple[str, ...]
    logprobs: int | None
    echo: bool
    stream: bool
    include_usage: bool


def completion(model: LanguageModel, name: str, limits: Limits, content: dict[str, Any]) -> Completion:
    """Reads a request; takes time where a prompt is long.

    Args:
        model: It completes the prompts.
        name: Of the model, in requests.
        limits: See `Limits`.
        content: The JSON object that was sent.

    Raises:
        ApiError: For a value that is not allowed.
    """
    fields.refuse_unknown(content, _KNOWN)
    check_model(content, name)
    for field, nothing in _WITHOUT_USE.items():
        if content.get(field) not in nothing:
            raise ApiError(
                400, f"{field} is not offered here: leave it out, or see repetition_penalty", field
            )
    prompts = prompts_of(model, content, limits)
    n = fields.integer(content, "n", 1, 1, limits.texts)
    fields.integer(content, "best_of", n, n, n, "which is n: none is thrown away here")
    if len(prompts) * n > limits.texts:
        raise ApiError(
            400, f"{len(prompts)} prompts times n = {n}: must be at most {limits.texts} texts", "n"
        )
    max_tokens = fields.integer(content, "max_tokens", _MAX_TOKENS, 0, limits.max_tokens)
    logprobs = None
    if content.get("logprobs") is not None:
        logprobs = fields.integer(content, "logprobs", 0, 0, MOST_ALTERNATIVES)
    stream, include_usage = fields.boolean(content, "stream", False), False
    if (options := content.get("stream_options")) is not None:
        if not isinstance(options, dict) or not stream:
            raise ApiError(
                400, "stream_options: must be an object, and goes with stream = true", "stream_options"
            )
        fields.refuse_unknown(options, ("include_usage",))
        include_usage = fields.boolean(options, "include_usage", False)
    settings = {
        "steer": interventions_of(model.config.model, content, limits),
        "when_full": content.get("when_full", "stop"),
        "n_alternatives": logprobs,
    }
    if settings["when_full"] not in WHEN_FULL:
        raise fields.wrong("when_full", settings["when_full"], f"one of {', '.join(WHEN_FULL)}")
    samplings = [_sampling(content) for _ in prompts]
    try:
        stop = check_stop(content.get("stop"))
        sequences = [
            TokenSequence.of(
                model.config.model, prompt, dataclasses.replace(sampling, index=i), max_tokens, **settings
            )
            for prompt, sampling in zip(map(np.asarray, prompts), samplings, strict=True)
            for i in range(n)
        ]
    except ValueError as e:
        refused = of_field(e)
        if refused.param == "prompt" and max(map(len, prompts)) > model.config.model.context_length:
            refused.code = "context_length_exceeded"
        raise refused from e
    if max_tokens and (full := [one for one in sequences if one.limit <= one.n_prompt]):
        raise ApiError(
            400,
            f"prompt has {full[0].n_prompt} tokens, as many as the model's context: there is no room for new "
            "ones; shorten it, or choose max_tokens = 0, or when_full = 'slide'",
            "prompt",
            "context_length_exceeded",
        )
    if len(stop) > _MOST_STOPS:
        raise ApiError(400, f"stop has {len(stop)} texts: must be at most {_MOST_STOPS}", "stop")
    echo = fields.boolean(content, "echo", False)
    if echo and logprobs is not None and max(map(len, prompts)) > model.config.model.context_length:
        raise ApiError(400, "echo with logprobs: the prompt must fit the model's context; shorten it", "echo")
    return Completion(prompts, sequences, n, stop, logprobs, echo, stream, include_usage)


def _sampling(content: dict[str, Any]) -> Sampling:
    """Reads the sampling of one prompt; without a seed, each has another."""
    seed = content.get("seed")
    try:
        return Sampling(
            temperature=fields.number(content, "temperature", 1.0),
            # None, and vLLM's -1, are all tokens.
            top_k=0 if content.get("top_k") in (None, -1) else content["top_k"],
            # OpenAI allows 0, of which the most likely token alone is enough.
            top_p=fields.number(content, "top_p", 1.0) or _SMALLEST_TOP_P,
            min_p=fields.number(content, "min_p", 0.0),
            repetition_penalty=fields.number(content, "repetition_penalty", 1.0),
            seed=secrets.randbits(63) if seed is None else seed,
        ).check()
    except ValueError as e:
        raise of_field(e) from e


def check_model(content: dict[str, Any], name: str) -> None:
    """Raises ApiError if another model is asked for than there is; a request without one means it."""
    asked = content.get("model")
    if asked is not None and asked != name:
        shown = repr(asked[:80]) if isinstance(asked, str) else kind_of(asked)
        message = f"model = {shown}: there is only {name!r}"
        raise ApiError(404, message, "model", "model_not_found")


def prompt_ids(model: LanguageModel, prompt: Any, limits: Limits) -> list[int]:
    """Returns the token ids of one prompt: a text, with a separator before it as in training, or ids.

    Raises:
        ApiError: For anything else, or too many.
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
    """Returns token ids of one prompt or several; errors as `prompt_ids`."""
    prompt = content.get("prompt")
    if prompt is None:
        raise fields.missing("prompt", "a text, or token ids")
    several = isinstance(prompt, list) and prompt and not _is_ids(prompt)
    prompts = prompt if several else [prompt]
    if len(prompts) > limits.texts:
        raise ApiError(400, f"there are {len(prompts)} prompts: must be at most {limits.texts}", "prompt")
    return [prompt_ids(model, one, limits) for one in prompts]


def token_ids(content: dict[str, Any], name: str, vocabulary: int) -> np.ndarray:
    """Returns an array of token ids that must be there, int64[n].

    Raises:
        ApiError: For anything else.
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


def interventions_of(
    config: ModelConfig, content: dict[str, Any], limits: Limits
) -> InterventionBatch | None:
    """Reads {"layer:neuron": value}, or a list as a file of interventions has it; returns None without any.

    Raises:
        ApiError: For anything else, or an intervention that the model cannot have.
    """
    steer, mode = content.get("steer"), content.get("steer_mode")
    if steer is None:
        if mode is not None:
            raise ApiError(400, "steer_mode goes with steer: leave it out", "steer_mode")
        return None
    if not isinstance(steer, dict | list):
        raise fields.wrong("steer", steer, 'an object {"layer:neuron": value}, or an array of interventions')
    if len(steer) > limits.interventions:
        raise ApiError(
            400, f"steer has {len(steer)} entries: must be at most {limits.interventions}", "steer"
        )
    if isinstance(steer, list) and mode is not None:
        raise ApiError(
            400, "steer_mode goes with an object only: in an array each entry has a mode", "steer_mode"
        )
    if mode is not None and not isinstance(mode, str):
        raise fields.wrong("steer_mode", mode, "a text")
    try:
        entries = steer.items() if isinstance(steer, dict) else steer
        read = _of_pair if isinstance(steer, dict) else _of_entry
        parsed = [read(entry, mode or DEFAULT_MODE) for entry in entries]
        return InterventionBatch.of(config, parsed) if parsed else None
    except ArgumentError as e:
        raise ApiError(400, str(e.within("steer")), "steer") from e
    except (ValueError, OverflowError) as e:
        raise ApiError(400, f"steer: {e}", "steer") from e


def _of_pair(pair: tuple[str, Any], mode: str) -> Intervention:
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", pair[0])
    if found is None:
        raise ValueError(f"{pair[0][:50]!r} names no neuron: must be LAYER:NEURON, e.g. 3:117")
    return Intervention(int(found[1]), int(found[2]), pair[1], mode)


def _of_entry(entry: Any, _mode: str) -> Intervention:
    names = [field.name for field in dataclasses.fields(Intervention) if field.name != "row"]
    if not isinstance(entry, dict) or not {"layer", "neuron"} <= set(entry):
        raise ValueError("each entry of an array must be an object with layer and neuron")
    if unknown := sorted(set(entry) - set(names)):
        raise ValueError(f"{unknown[0][:50]!r} is none of {', '.join(names)}")
    if "value" not in entry and needs_value(entry.get("mode", DEFAULT_MODE)):
        raise ValueError("value is missing in an entry of the array")
    for name in ("mode", "positions"):
        if name in entry and not isinstance(entry[name], str | list):
            raise ValueError(f"{name}: must not be a JSON {kind_of(entry[name])}")
    positions = entry.get("positions", "all")
    return Intervention(
        **{**entry, "positions": tuple(positions) if isinstance(positions, list) else positions}
    )
