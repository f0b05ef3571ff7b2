"""Makes the pages of `sae-dashboard` from activations that are there, for `benchmarks.bench_neuron_pages`.

PYTHON sae_dashboard_pages.py FOLDER, with a Python that has sae-dashboard and need not have topklm.

The program is driven as its own `NeuronpediaRunner` drives it, with that one's settings: 128 features at a
time, 20 strongest examples and 5 from each of 5 parts of the range, one JSON file a batch. Two things are
left out, its language model and its SAE: activations are read from the files in which it would cache a
model's, and the SAE is the identity, so that its features are the neurons.

The first line that this writes says which versions there are, and that it is ready. For every line with a
number on the standard input it makes all pages so many times, and answers with the seconds.
"""

import contextlib
import importlib.metadata
import json
import os
from pathlib import Path
import sys
import time
from typing import Any

import numpy as np
from sae_dashboard.components_config import (
    ActsHistogramConfig,
    Column,
    FeatureTablesConfig,
    LogitsHistogramConfig,
    LogitsTableConfig,
    SequencesConfig,
)
from sae_dashboard.layout import SaeVisLayoutConfig
from sae_dashboard.neuronpedia.neuronpedia_converter import NeuronpediaConverter
from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import HookedSAETransformer, StandardSAE, StandardSAEConfig
import torch
from transformer_lens import HookedTransformerConfig


class Dashboards:
    """All that pages are made from.

    Args:
        folder: Holds `spec.json` (`layers`), `tokens.npy` int64[P, T], `layer-{l}.npy` float32[P, T, D] for
            each layer, `unembedding.npy` float32[D, V] and `vocabulary.json`, V strings. Pages go to `pages`.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._layers = json.loads((folder / "spec.json").read_text())["layers"]
        self._tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
        self._vocabulary = dict(enumerate(json.loads((folder / "vocabulary.json").read_text())))
        unembedding = torch.from_numpy(np.load(folder / "unembedding.npy"))
        self._d_model = unembedding.shape[0]
        config = HookedTransformerConfig(
            n_layers=max(self._layers) + 1,
            d_model=self._d_model,
            n_ctx=self._tokens.shape[1],
            d_head=1,
            n_heads=1,
            d_vocab=unembedding.shape[1],
            attn_only=True,
            device="cpu",
        )
        self._model = HookedSAETransformer(config)
        self._model.W_U.data[:] = unembedding
        defaults = NeuronpediaRunnerConfig(sae_set="", sae_path="", outputs_dir="")
        self._rows, self._features = defaults.n_prompts_in_forward_pass, defaults.n_features_at_a_time
        for layer in self._layers:
            self._cache(layer)

    def write(self) -> None:
        """Makes the pages of all neurons of all layers."""
        for layer in self._layers:
            pages = self._folder / "pages" / str(layer)
            pages.mkdir(parents=True, exist_ok=True)
            for begin in range(0, self._d_model, self._features):
                features = list(range(begin, min(begin + self._features, self._d_model)))
                batch = pages / f"batch-{begin // self._features}.json"
                batch.write_text(self._pages(layer, features))

    def _pages(self, layer: int, features: list[int]) -> str:
        settings = NeuronpediaRunnerConfig(
            sae_set="identity",
            sae_path="",
            outputs_dir="",
            n_prompts_total=len(self._tokens),
            n_tokens_in_prompt=self._tokens.shape[1],
            model_id="topklm",
            layer=layer,
        )
        sequences = SequencesConfig(
            stack_mode="stack-all",
            buffer=None,  # as its own runner has it: examples are whole prompts
            compute_buffer=True,
            n_quantiles=settings.n_quantiles,
            top_acts_group_size=settings.top_acts_group_size,
            quantile_group_size=settings.quantile_group_size,
        )
        column = Column(
            sequences,
            ActsHistogramConfig(),
            LogitsHistogramConfig(),
            LogitsTableConfig(),
            FeatureTablesConfig(n_rows=3),
        )
        config = SaeVisConfig(
            hook_point=_hook(layer),
            features=features,
            minibatch_size_features=settings.n_features_at_a_time,
            minibatch_size_tokens=settings.n_prompts_in_forward_pass,
            quantile_feature_batch_size=settings.quantile_feature_batch_size,
            feature_centric_layout=SaeVisLayoutConfig(columns=[column]),
            cache_dir=self._cache_folder(layer),
        )
        data = SaeVisRunner(config).run(encoder=self._identity(layer), model=self._model, tokens=self._tokens)
        return NeuronpediaConverter.convert_to_np_json(self._model, data, settings, self._vocabulary)

    def _identity(self, layer: int) -> StandardSAE:
        d = self._d_model
        sae = StandardSAE(StandardSAEConfig(d_in=d, d_sae=d, apply_b_dec_to_input=False))
        sae.cfg.metadata.hook_name = _hook(layer)
        for name, content in {"W_enc": torch.eye(d), "W_dec": torch.eye(d)}.items():
            getattr(sae, name).data[:] = content
        sae.b_enc.data[:] = 0
        sae.b_dec.data[:] = 0
        return sae

    def _cache(self, layer: int) -> None:
        folder = self._cache_folder(layer)
        folder.mkdir()
        activations = torch.from_numpy(np.load(self._folder / f"layer-{layer}.npy"))
        for number, rows in enumerate(activations.split(self._rows)):
            torch.save({_hook(layer): rows.clone()}, folder / f"model_activations_{number}.pt")

    def _cache_folder(self, layer: int) -> Path:
        return self._folder / f"cache-{layer}"


def main(folder: Path) -> None:
    """Prepares, then does as the standard input says."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # the libraries talk
        dashboards = Dashboards(folder)
        names = ("sae-dashboard", "sae-lens", "transformer-lens", "torch")
        _say(answers, {name: importlib.metadata.version(name) for name in names})
        for line in sys.stdin:
            began = time.perf_counter()
            for _ in range(int(line)):
                dashboards.write()
            _say(answers, time.perf_counter() - began)


def _hook(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


def _say(answers: Any, what: Any) -> None:
    print(json.dumps(what), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
