"""Parses and checks requests, within the limits of a server; errors are as OpenAI's clients expect them."""

from collections.abc import Collection, Sequence
import dataclasses
import json
import secrets
from typing import Any

import numpy as np
from starlette.responses import Response

from topklm import web
from topklm.errors import ArgumentError, UserError, one_line
from topklm.inference.engine import MOST_WAITING
from topklm.inference.intervention_batch import InterventionBatch
from topklm.inference.interventions import DEFAULT_MODE, Intervention, entries_of, from_json, in_activations
from topklm.inference.language_model import LanguageModel
from topklm.inference.sequence import WHEN_FULL, Sampling
from topklm.inference.sequence import Sequence as TokenSequence
from topklm.inference.steps import MOST_ALTERNATIVES
from topklm.inference.tokens import check_stop
from topklm.web import Json, kind_of

FAULT = "a fault of the server, which its terminal tells of"

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {401: "invalid_api_key", 404: "not_found", 413: "request_too_large", 429: "rate_limit_exceeded"}
_AGAIN_SECONDS = 1  # after which a client that was refused may try again


class ApiError(Exception):
    """A request that is not carried out: status of HTTP, the field that is wrong, and a code for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(one_line(message))
        self.status, self.param, self.code = status, param, code or _CODES.get(status)

    def content(self) -> dict:
        """Returns {"error": {"message", "type", "param", "code"}}."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Returns the answer."""
        headers = {"retry-after": str(_AGAIN_SECONDS)} if self.status in (429, 503) else None
        return Json(self.content(), self.status, headers)


def json_object(body: bytes) -> dict[str, Any]:
    """Parses the body of a request; raises ApiError if it is no JSON object."""
    try:
        return web.from_json(body)
    except ValueError as e:
        raise ApiError(400, str(e)) from e


def refuse_unknown(content: dict[str, Any], known: Collection[str]) -> None:
    """Raises ApiError for a field that there is not; a name that is mistyped must not pass for nothing."""
    if unknown := [name[:50] for name in content if name not in known]:
        message = f"there is no field {unknown[0]!r}: there are {', '.join(sorted(known))}"
        raise ApiError(400, message, unknown[0])


def boolean(content: dict[str, Any], name: str, default: bool) -> bool:
    """Returns True or False; null stands for the default."""
    value = content.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return default if value is None else value


def integer(
    content: dict[str, Any], name: str, default: int, lowest: int, highest: int, why: str = ""
) -> int:
    """Returns a whole number in a range; null stands for the default."""
    value = content.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
        raise wrong(name, value, f"an integer from {lowest} to {highest}{why and ', ' + why}")
    return value


def number(content: dict[str, Any], name: str, default: float) -> float:
    """Returns any number; null stands for the default."""
    value = content.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise wrong(name, value, "a number")
    try:
        return float(value)
    except OverflowError as e:
        raise wrong(name, value, "a number") from e


def required(content: dict[str, Any], name: str, allowed: str) -> Any:
    """Returns the value of a field that must be there."""
    if content.get(name) is None:
        raise ApiError(400, f"{name} is missing: send {allowed}", name)
    return content[name]


def text(value: Any, name: str) -> str:
    """Returns the value of a field, a text that can be written as UTF-8; raises ApiError for another."""
    if not isinstance(value, str):
        raise wrong(name, value, "a text")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise ApiError(
            400, f"{name}: half of a surrogate pair stands alone in it; send whole characters", name
        ) from e
    return value


def wrong(name: str, value: Any, allowed: str) -> ApiError:
    """Makes the error of a value of another kind, or outside of its range."""
    shown = json.dumps(value) if isinstance(value, int | float | str | None) else f"a JSON {kind_of(value)}"
    shown = shown if len(shown) <= 60 else shown[:60] + "..."
    return ApiError(400, f"{name} = {shown}: must be {allowed}", name)


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
class Limits:
    """How much one request may ask for, and all together; more is refused."""

    waiting: int = MOST_WAITING  # sequences that wait for a slot
    texts: int = 128  # sequences of one request, prompts times n
    prompt_tokens: int = 16384  # of one prompt
    max_tokens: int = 4096  # new ones of one sequence
    interventions: int = 64  # of one request
    body: int = 1024 * 1024  # bytes of one request
    timeout: float = 300.0  # seconds from a request to the end of its answer
    grace: float = 10.0  # seconds that sequences may go on when the server is told to stop

    def check(self) -> "Limits":
        """Returns itself; raises UserError for a bound that cannot be, named as the command's flag."""
        for name, value in dataclasses.asdict(self).items():
            lowest = 0 if name in ("waiting", "grace") else 1
            if not lowest <= value <= 1e9:
                flag = name if name in ("timeout", "grace") else f"max-{name.removeprefix('max_')}"
                flag = flag.replace("_", "-")
                raise UserError(f"--{flag} = {value}: must be {lowest} or more, and at most 1e9")
        return self


@dataclasses.dataclass(frozen=True)
class Completion:
    """A request for completions."""

    sequences: Sequence[TokenSequence]  # n of each prompt, one prompt after another
    n: int  # completions of each prompt
    stop: tuple[str, ...]  # texts before which a completion ends
    logprobs: int | None  # alternatives to report beside each token; None: report no probabilities
    echo: bool  # whether the prompt stands before its completion
    stream: bool  # whether the answer comes in pieces
    include_usage: bool  # whether the last piece counts the tokens


def completion(model: LanguageModel, name: str, limits: Limits, content: dict[str, Any]) -> Completion:
    """Reads a request for a model of this name, or raises ApiError; takes time where a prompt is long."""
    refuse_unknown(content, _KNOWN)
    check_model(content, name)
    for field, nothing in _WITHOUT_USE.items():
        if content.get(field) not in nothing:
            text = f"{field} is not offered here: leave it out, or see repetition_penalty"
            raise ApiError(400, text, field)
    prompt = required(content, "prompt", "a text, or token ids")
    several = prompt if isinstance(prompt, list) and prompt and not _is_ids(prompt) else [prompt]
    if len(several) > limits.texts:
        raise ApiError(400, f"there are {len(several)} prompts: must be at most {limits.texts}", "prompt")
    prompts = [prompt_ids(model, one, limits.prompt_tokens) for one in several]
    n = integer(content, "n", 1, 1, limits.texts)
    integer(content, "best_of", n, n, n, "which is n: none is thrown away here")
    if len(prompts) * n > limits.texts:
        text = f"{len(prompts)} prompts times n = {n}: must be at most {limits.texts} texts"
        raise ApiError(400, text, "n")
    max_tokens = integer(content, "max_tokens", _MAX_TOKENS, 0, limits.max_tokens)
    logprobs = None
    if content.get("logprobs") is not None:
        logprobs = integer(content, "logprobs", 0, 0, MOST_ALTERNATIVES)
    stream, include_usage = boolean(content, "stream", False), False
    if (options := content.get("stream_options")) is not None:
        if not isinstance(options, dict) or not stream:
            text = "stream_options: must be an object, and goes with stream = true"
            raise ApiError(400, text, "stream_options")
        refuse_unknown(options, ("include_usage",))
        include_usage = boolean(options, "include_usage", False)
    settings = {
        "steer": _interventions_of(model, content, limits),
        "when_full": content.get("when_full", "stop"),
        "n_alternatives": logprobs,
    }
    if settings["when_full"] not in WHEN_FULL:
        raise wrong("when_full", settings["when_full"], f"one of {', '.join(WHEN_FULL)}")
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
        refused = _of_field(e)
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
    echo = boolean(content, "echo", False)
    if echo and logprobs is not None and max(map(len, prompts)) > model.config.model.context_length:
        raise ApiError(400, "echo with logprobs: the prompt must fit the model's context; shorten it", "echo")
    return Completion(sequences, n, stop, logprobs, echo, stream, include_usage)


def _sampling(content: dict[str, Any]) -> Sampling:
    """Reads the sampling of one prompt, not checked; without a seed, each has another."""
    seed = content.get("seed")
    return Sampling(
        temperature=number(content, "temperature", 1.0),
        # None, and vLLM's -1, are all tokens.
        top_k=0 if content.get("top_k") in (None, -1) else content["top_k"],
        # OpenAI allows 0, of which the most likely token alone is enough.
        top_p=number(content, "top_p", 1.0) or _SMALLEST_TOP_P,
        min_p=number(content, "min_p", 0.0),
        repetition_penalty=number(content, "repetition_penalty", 1.0),
        seed=secrets.randbits(63) if seed is None else seed,
    )


def _of_field(error: ValueError) -> ApiError:
    """Makes the error of a field that the library refuses."""
    return ApiError(400, str(error), error.field if isinstance(error, ArgumentError) else None)


def check_model(content: dict[str, Any], name: str) -> None:
    """Raises ApiError if another model is asked for than there is; a request without one means it."""
    asked = content.get("model")
    if asked is not None and asked != name:
        shown = repr(asked[:80]) if isinstance(asked, str) else kind_of(asked)
        message = f"model = {shown}: there is only {name!r}"
        raise ApiError(404, message, "model", "model_not_found")


def prompt_ids(model: LanguageModel, prompt: Any, most: int) -> list[int]:
    """Returns the ids of a prompt, a text (after a separator, as in training) or ids, or raises ApiError."""
    if isinstance(prompt, str):
        ids = [model.tokenizer.separator_id, *model.tokenizer.encode(text(prompt, "prompt")).tolist()]
    elif _is_ids(prompt):
        ids = prompt
    else:
        raise wrong("prompt", prompt, "a text, an array of token ids, or an array of several of either")
    if not ids:
        raise ApiError(400, "prompt is empty: send a text, or at least one token id", "prompt")
    if len(ids) > most:
        message = f"prompt has {len(ids)} tokens: must be at most {most}; shorten it"
        raise ApiError(400, message, "prompt", "context_length_exceeded")
    _refuse_outside(ids, "prompt", model)
    return ids


def token_ids(model: LanguageModel, content: dict[str, Any], name: str) -> np.ndarray:
    """Returns an array of token ids that must be there, int64[n]; raises ApiError for anything else."""
    value = required(content, name, "an array of token ids")
    if not _is_ids(value):
        raise wrong(name, value, "an array of token ids")
    _refuse_outside(value, name, model)
    return np.array(value, np.int64)


def _refuse_outside(ids: list[int], name: str, model: LanguageModel) -> None:
    vocabulary = model.config.model.vocab_size
    if outside := [token for token in ids if not 0 <= token < vocabulary]:
        shown = str(outside[0]) if abs(outside[0]) < 10**20 else "a huge number"
        raise ApiError(400, f"{name}: token {shown} must be from 0 to {vocabulary - 1}", name)


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(type(token) is int for token in prompt)


def _interventions_of(
    model: LanguageModel, content: dict[str, Any], limits: Limits
) -> InterventionBatch | None:
    """Reads {"layer:neuron": value}, or a list as in a file; None without any; raises ApiError for others.

    A value may be a text such as "0.7x", see `LanguageModel.largest_activation`.
    """
    steer, mode = content.get("steer"), content.get("steer_mode")
    if steer is None:
        if mode is not None:
            raise ApiError(400, "steer_mode goes with steer: leave it out", "steer_mode")
        return None
    if not isinstance(steer, dict | list):
        raise wrong("steer", steer, 'an object {"layer:neuron": value}, or an array of interventions')
    if len(steer) > limits.interventions:
        text = f"steer has {len(steer)} entries: must be at most {limits.interventions}"
        raise ApiError(400, text, "steer")
    if isinstance(steer, list) and mode is not None:
        text = "steer_mode goes with an object only: in an array each entry has a mode"
        raise ApiError(400, text, "steer_mode")
    if mode is not None and not isinstance(mode, str):
        raise wrong("steer_mode", mode, "a text")
    try:
        if isinstance(steer, dict):
            parsed = entries_of(steer, mode or DEFAULT_MODE)
        else:
            parsed = [_of_entry(entry) for entry in steer]
        parsed = [in_activations(one, model.largest_activation) for one in parsed]
        return InterventionBatch.of(model.cfg, parsed) if parsed else None
    except UserError as e:
        raise ApiError(400, str(e.within("steer")), "steer") from e
    except (ValueError, OverflowError) as e:
        raise ApiError(400, f"steer: {e}", "steer") from e


def _of_entry(entry: Any) -> Intervention:
    for name in ("mode", "positions"):
        if isinstance(entry, dict) and not isinstance(entry.get(name, ""), str | list):
            raise ValueError(f"{name}: must not be a JSON {kind_of(entry[name])}")
    return from_json(entry, ("layer", "neuron", "value", "mode", "positions"))
