"""How `topklm serve` answers many clients at once, beside the same work one after another.

    python -m benchmarks.bench_serve RUN

Starts a server, and asks it for streams: all clients at once, then one after another. Writes
benchmarks/results/serve.json: streams that were dropped, seconds to the first token, tokens per second.
"""

import asyncio
import contextlib
import dataclasses
import json
import pathlib
import random
import statistics
import subprocess
import sys
import time
from typing import Any
import urllib.request

import openai

from benchmarks.harness import results

RESULT = results.FOLDER / "serve.json"
_BEGINNINGS = (
    "The city of",
    "In the history of the region,",
    "He was born in",
    "The river flows through",
    "A species of",
    "During the war, the",
    "The album was released by",
    "It is one of the largest",
)


@dataclasses.dataclass(frozen=True)
class Stream:
    """One answer. Seconds from its request on."""

    first_token: float
    whole: float
    tokens: int


def main() -> None:
    """Starts a server, asks it, and writes the JSON."""
    parser = results.parser(__doc__)
    parser.add_argument("run", type=pathlib.Path, metavar="RUN")
    parser.add_argument("--clients", type=int, default=64, metavar="N", help="default %(default)s")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="of each; default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default %(default)s")
    parser.add_argument("--out", type=pathlib.Path, default=RESULT, metavar="FILE")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "topklm", "serve", str(arguments.run), "--port", "0", "--json"]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        started = json.loads(line)
        seconds_to_start = time.perf_counter() - began
        while _to_compile(started["address"]):
            time.sleep(0.1)
        seconds_to_compile = time.perf_counter() - began
        client = openai.AsyncOpenAI(base_url=started["address"], api_key="none", max_retries=0, timeout=600)
        asking = _rounds(client, started["model"], arguments.clients, arguments.tokens, arguments.rounds)
        rounds = asyncio.run(asking)
    finally:
        process.terminate()
        exit_code = process.wait()
    result = {
        "run": arguments.run.name,
        "settings": {
            "clients": arguments.clients,
            "tokens": arguments.tokens,
            "rounds": arguments.rounds,
            "temperature": 1.0,
        },
        "seconds_to_start": seconds_to_start,
        "seconds_until_all_is_compiled": seconds_to_compile,
        "exit_code": exit_code,
        "together": [_figures(together, seconds) for (together, seconds), _ in rounds],
        "one_after_another": [_figures(alone, seconds) for _, (alone, seconds) in rounds],
        "texts_are_equal": all(_texts(together) == _texts(alone) for (together, _), (alone, _) in rounds),
    }
    both = zip(result["together"], result["one_after_another"], strict=True)
    result["times_as_many_tokens_per_second"] = statistics.median(
        one["tokens_per_second"] / other["tokens_per_second"] for one, other in both
    )
    results.write(arguments.out, result)


def _to_compile(address: str) -> int:
    with urllib.request.urlopen(f"{address.removesuffix('/v1')}/health") as answer:
        return json.load(answer)["to_compile"]


Answers = list[tuple[str, Stream | None]]


async def _rounds(client: Any, model: str, n: int, tokens: int, rounds: int) -> list[Any]:
    found = []
    for number in range(rounds + 1):
        jobs = [_job(model, number * n + i, tokens) for i in range(n)]
        began = time.perf_counter()
        together = list(await asyncio.gather(*(_stream(client, job) for job in jobs)))
        between = time.perf_counter()
        alone = [await _stream(client, job) for job in jobs]
        found.append(((together, between - began), (alone, time.perf_counter() - between)))
    return found[1:]  # connections and whatever else is made once were made in the first


def _job(model: str, seed: int, tokens: int) -> dict[str, Any]:
    prompt = random.Random(seed).choice(_BEGINNINGS)
    return {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 1.0, "seed": seed}


async def _stream(client: Any, job: dict[str, Any]) -> tuple[str, Stream | None]:
    """Returns the text, and its figures; None if it was dropped."""
    began, first, text, reason, tokens = time.perf_counter(), None, "", None, 0
    with contextlib.suppress(openai.OpenAIError):
        answer = await client.completions.create(**job, stream=True, stream_options={"include_usage": True})
        async for piece in answer:
            first = first or time.perf_counter() - began
            if piece.usage:
                tokens = piece.usage.completion_tokens
            for choice in piece.choices:
                text += choice.text
                reason = choice.finish_reason or reason
    if reason is None or first is None:
        return text, None
    return text, Stream(first, time.perf_counter() - began, tokens)


def _texts(answers: Answers) -> list[str]:
    return [text for text, _ in answers]


def _figures(answers: Answers, seconds: float) -> dict[str, Any]:
    streams = [stream for _, stream in answers if stream is not None]
    first = [stream.first_token for stream in streams]
    return {
        "dropped": len(answers) - len(streams),
        "seconds": seconds,
        "tokens": sum(stream.tokens for stream in streams),
        "tokens_per_second": sum(stream.tokens for stream in streams) / seconds,
        "first_token_seconds": {
            "p50": statistics.median(first),
            "p95": statistics.quantiles(first, n=20)[-1],
            "longest": max(first),
        },
    }


if __name__ == "__main__":
    main()
