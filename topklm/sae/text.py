"""Trains sparse autoencoders on the hidden states of a Base LM, which are streamed from its training text.

Hidden states are computed as they are needed, and none is written to a disk. The text that is looked at
afterwards is only used to say how much of its variance the codes explain.
"""

from collections.abc import Iterable, Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from topklm import distributed
from topklm.config import DataConfig, MeshConfig
from topklm.layout import make_layout
from topklm.neurons import DICTIONARY_TOKENS
from topklm.neurons.dictionary import Dictionary
from topklm.neurons.documents import TextModel
from topklm.neurons.fit_dictionary import TrainingText, explained_variance
from topklm.progress import Progress
from topklm.sae import ensemble
from topklm.sae.kinds import SaeConfig
from topklm.sae.train import Fitted, Saving


def fit_text(
    config: SaeConfig,
    model: TextModel,
    data: DataConfig,
    documents: Iterable[np.ndarray],
    *,
    n_tokens: int = DICTIONARY_TOKENS,
    seed: int = 0,
    how: ensemble.Ensemble = ensemble.ALONE,
    start: Dictionary | None = None,
    layers: Sequence[int] | None = None,
    saving: Saving | None = None,
    progress: Progress,
) -> Fitted:
    """Trains an autoencoder, or an ensemble, of each of these layers (None: all) on about `n_tokens`.

    Nothing is learned from the documents, whose beginning tells the explained variance; of the processes of
    the model's layout the first reads them. Errors as of `train.fit`, and UserError if the training text
    cannot be read.
    """
    text = TrainingText(model, data, layers)
    n_batches = text.n_batches(n_tokens)
    if saving is not None:
        of_text = {**saving.facts, "--tokens": n_tokens, "text": text.name}
        saving = dataclasses.replace(saving, facts=of_text)
    name, passes = f"training {config.kind} autoencoders", how.passes
    with progress.phase(name, n_batches * text.batch_tokens * passes) as report:
        fitted = ensemble.fit(
            config,
            text.batches,
            n_batches,
            how=how,
            seed=seed,
            start=start,
            layout=model.layout,
            saving=saving,
            report=lambda tokens: report(tokens, 0, tokens),
        )
    facts: dict[str, Any] = {"tokens": n_tokens, "seed": seed, "dead_codes": fitted.dead.sum(axis=1).tolist()}
    if how.members > 1:
        facts["ensemble"] = f"{how.kind} of {how.members}"
    facts["text"] = text.name
    made = dataclasses.replace(fitted.dictionary, facts=facts)

    def explained() -> list[float]:
        return explained_variance(made, _of_this_process(model), documents, layers)

    shares = distributed.of_first("variance", explained) if model.layout.is_shared else explained()
    # The float64 sums of one process with two devices end a bit apart from those of one with one.
    facts["explained_variance"] = [round(share, 9) for share in shares]
    return dataclasses.replace(fitted, dictionary=made)


def _of_this_process(model: TextModel) -> TextModel:
    """Returns a model, of which every device holds all parameters, on the devices of this process alone."""
    if not model.layout.is_shared:
        return model
    layout = make_layout(MeshConfig(), jax.local_devices())
    params = jax.tree.map(lambda x: jax.device_put(x.addressable_data(0), layout.replicated), model.params)
    return dataclasses.replace(model, params=params, layout=layout)
