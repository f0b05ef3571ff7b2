"""What is asked for, read and checked: completions, and prompts in general."""

from collections.abc import Sequence
import dataclasses
import secrets
from typing import Any

from topklm.inference.language_model import LanguageModel
from topklm.inference.sampling import Sampling
from topklm.inference.scores import MOST_ALTERNATIVES
from topklm.inference.sequence import WHEN_FULL
from topklm.inference.sequence import Sequence as TokenSequence
from topklm.inference.streaming import check_stop
from topklm.server import fields
from topklm.server.errors import ApiError, of_field
from topklm.server.limits import Limits
from topklm.server.prompts import check_model, prompts_of
from topklm.server.steering import interventions_of

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
        logprobs: How many alternatives to tell of, beside each token; None: tell of no probabilities.
        echo: Whether the prompt stands before its completion.
        stream: Whether the answer comes in pieces.
        include_usage: Whether the last piece tells how many tokens there were.
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
        model: What answers.
        name: Under which it is asked for.
        limits: See `Limits`.
        content: What was sent.

    Raises:
        ApiError: For what is not allowed.
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
            for prompt, sampling in zip(prompts, samplings, strict=True)
            for i in range(n)
        ]
    except ValueError as e:
        raise _of_prompt(e) from e
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


def _of_prompt(error: ValueError) -> ApiError:
    answer = of_field(error)
    if "the model's context" in str(error):
        answer.code = "context_length_exceeded"
    return answer
