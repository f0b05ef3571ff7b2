"""`sae-dashboard` as a subject of `benchmarks.bench_neuron_pages`: its input, and whether it agrees."""

from collections.abc import Mapping
import contextlib
import json
from pathlib import Path
import subprocess
from typing import Any

import jax.numpy as jnp
import numpy as np

from topklm.inference.language_model import LanguageModel
from topklm.neurons.statistics import lenses
from topklm.neurons.store import Store

PROMPT_TOKENS = 128  # as many as there are around our examples

_SCRIPT = Path(__file__).with_name("sae_dashboard_pages.py")
_DENSITY_STEP, _ACTIVATION_STEP = 1e-5, 1e-3  # to which it rounds


class Peer:
    """`sae-dashboard` in a process of its own, kept alive; a context manager.

    Args:
        python: That has it.
        folder: From `hand_over`.
    """

    versions: dict[str, str]

    def __init__(self, python: str, folder: Path):
        command = [python, "-W", "ignore", str(_SCRIPT), str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "Peer":
        self.versions = self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            assert self._process.stdin
            self._process.stdin.close()
        if self._process.wait():
            raise RuntimeError(f"the peer ended with {self._process.returncode}: see what it wrote")

    def run(self, calls: int) -> float:
        """Makes all pages so many times; returns the seconds."""
        assert self._process.stdin
        print(calls, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout
        if not (line := self._process.stdout.readline()):
            raise RuntimeError("the peer ended: see what it wrote")
        return json.loads(line)


def hand_over(model: LanguageModel, store: Store, folder: Path) -> dict[int, np.ndarray]:
    """Writes what the peer makes pages from.

    Returns:
        For each layer the density and the highest activation of each neuron in that, float64[2, D].
    """
    config, metadata = model.config.model, store.metadata
    n = store.n_tokens // PROMPT_TOKENS * PROMPT_TOKENS
    folder.mkdir()
    (folder / "spec.json").write_text(json.dumps({"layers": metadata.layers}))
    np.save(folder / "tokens.npy", store.tokens(0, n).astype(np.int64).reshape(-1, PROMPT_TOKENS))
    strings = model.tokenizer.token_strings(range(config.vocab_size))
    (folder / "vocabulary.json").write_text(json.dumps(strings))
    d = metadata.d_model
    made = lenses.make(config, model.params, jnp.zeros((config.n_layers, d, d)))
    effects = made.identity_rows(0, 0, d) @ made.unembedding  # so that its logits are our identity lens
    np.save(folder / "unembedding.npy", np.asarray(effects, np.float32))
    expected = {}
    for layer in metadata.layers:
        dense = np.zeros((n, d), np.float32)
        for j in range(d):
            events = store.neuron(layer, j)
            inside = events.tokens < n
            dense[events.tokens[inside], j] = events.values[inside]
        expected[layer] = np.stack([np.count_nonzero(dense > 0, axis=0) / n, dense.max(axis=0)])
        np.save(folder / f"layer-{layer}.npy", dense.reshape(-1, PROMPT_TOKENS, d))
    return expected


def check(folder: Path, expected: Mapping[int, np.ndarray]) -> dict[str, Any]:
    """Raises RuntimeError unless the peer's pages are of the same neurons with the same activations."""
    n_examples = 0
    for layer, (densities, highest) in expected.items():
        found = {
            feature["feature_index"]: feature
            for path in (folder / "pages" / str(layer)).iterdir()
            for feature in json.loads(path.read_text())["features"]
        }
        features = [found[j] for j in range(len(densities))]
        shown = [feature["frac_nonzero"] for feature in features]
        # Of the bin, for a window leaves out the first token of its prompt.
        tops = [max((a["bin_max"] for a in feature["activations"]), default=0) for feature in features]
        if not np.allclose(shown, densities, rtol=0, atol=_DENSITY_STEP):
            raise RuntimeError(f"layer {layer}: the peer's densities are not those of the activations")
        if not np.allclose(tops, highest, rtol=0, atol=_ACTIVATION_STEP):
            raise RuntimeError(f"layer {layer}: the peer's highest activations are not those handed over")
        n_examples += sum(len(feature["activations"]) for feature in found.values())
    return {"n_examples": n_examples}
