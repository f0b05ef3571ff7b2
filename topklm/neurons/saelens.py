"""Folders of SAELens, of neurons of a TopK LM and of dictionaries of a Base LM; a cache for delphi.

    blocks.L.hook_resid_post/cfg.json                 one folder for each layer
    blocks.L.hook_resid_post/sae_weights.safetensors  W_enc [D, M], b_enc [M], W_dec [M, D], b_dec [D];
                                                      threshold [M] of what is no topk

SAELens saves BatchTopK and Matryoshka as jumprelu, with a threshold; as they are while it trains them they
are read too.

The SAE of a TopK LM is the identity: TopK of a state that TopK has passed is that state, so its codes are the
neurons to the last bit, and "explained variance 1" is true of it by construction.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
from pathlib import Path
import re
from typing import Any

import numpy as np

from topklm.config import ModelConfig
from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.imports import optional_module
from topklm.neurons.capture import RESID_POST, hook_name
from topklm.neurons.dictionary import Dictionary
from topklm.neurons.store import Store
from topklm.storage.files import read_json

KIND = "saelens"
# Without a version SAELens takes a folder for one from before 6.0, and drops the metadata.
_VERSION = "6.54.12"
_ARCHITECTURES = {"relu": "topk", "abs": "abstopk"}
_KEEP = "topklm_keep"  # in the metadata, which SAELens keeps: codes of a token, kept or aimed at
_WEIGHTS, _CONFIG = "sae_weights.safetensors", "cfg.json"
# Of folders that are read, and the name of their threshold; jumprelu's is of each code.
_READ = {
    "topk": None,
    "jumprelu": "threshold",
    "batchtopk": "topk_threshold",
    "matryoshka_batchtopk": "topk_threshold",
}


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """The model that SAEs are of."""

    name: str
    config: ModelConfig
    separator_id: int


def write_neurons(model: ModelFacts, out: Path) -> None:
    """Writes an identity SAE for each TopK layer; UserError for an activation that SAELens lacks."""
    config = model.config
    if config.topk_activation not in _ARCHITECTURES:
        raise UserError(
            f"RUN = {model.name}: its topk_activation is {config.topk_activation}, and SAELens has TopK "
            "clipped at 0 (relu) and by magnitude (abs): export for --format huggingface"
        )
    identity, zero = np.eye(config.d_model, dtype=np.float32), np.zeros(config.d_model, np.float32)
    arrays = {"W_enc": identity, "W_dec": identity, "b_enc": zero, "b_dec": zero}
    about = {"architecture": _ARCHITECTURES[config.topk_activation], "k": config.topk_k}
    for layer in range(config.n_topk_layers):
        _write(model, out, layer, arrays, {**about, "apply_b_dec_to_input": False}, config.topk_k)


def write_dictionary(model: ModelFacts, dictionary: Dictionary, layers: Sequence[int], out: Path) -> None:
    """Writes a Base LM's dictionary, an SAE for each of these layers; UserError for what SAELens has not."""
    if dictionary.sequential or (dictionary.members > 1 and dictionary.threshold is None):
        text = (
            f"is an ensemble of {dictionary.members} TopK members or of boosting, which no SAE of SAELens is"
        )
        raise UserError(text, field="the dictionary")
    about: dict[str, Any] = {"architecture": "topk", "k": dictionary.keep}
    if dictionary.threshold is not None:
        about = {"architecture": "jumprelu"}
    zero = np.zeros(dictionary.encoder.shape[::2], np.float32)
    for number, layer in enumerate(layers):
        arrays = {
            "W_enc": dictionary.encoder[number],
            "W_dec": dictionary.decoder[number],
            "b_enc": (zero if dictionary.bias is None else dictionary.bias)[number],
            "b_dec": dictionary.centre[number],
        }
        if dictionary.threshold is not None:
            arrays["threshold"] = dictionary.threshold[number]
        _write(model, out, layer, arrays, {**about, "apply_b_dec_to_input": True}, dictionary.keep)


def _write(
    model: ModelFacts,
    out: Path,
    layer: int,
    arrays: Mapping[str, np.ndarray],
    about: Mapping[str, Any],
    keep: int,
) -> None:
    numpy = optional_module("safetensors.numpy", "export", "topklm export")
    name = hook_name(layer, RESID_POST)
    folder = out / name
    folder.mkdir()
    # A transposed view would be written untransposed.
    own = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
    numpy.save_file(own, folder / _WEIGHTS)
    d_in, d_sae = arrays["W_enc"].shape
    values = {
        **about,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "normalize_activations": "none",
        "reshape_activations": "none",
        **({"rescale_acts_by_decoder_norm": False} if "k" in about else {}),
        "metadata": {
            _KEEP: keep,
            "sae_lens_version": _VERSION,
            "sae_lens_training_version": None,
            "model_name": model.name,
            "model_class_name": "TransformerBridge",
            "model_from_pretrained_kwargs": {"trust_remote_code": True},
            "hook_name": name,
            "hf_hook_name": f"model.layers.{layer}",
            "context_size": model.config.context_length,
            "prepend_bos": True,
            "exclude_special_tokens": [model.separator_id],
            "dataset_path": None,
        },
    }
    (folder / _CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def layers_of(folder: Path) -> tuple[int, ...]:
    """Lists the layers that a folder has SAEs of, rising."""
    pattern = re.escape(hook_name(0, RESID_POST)).replace("0", r"(\d{1,9})", 1)
    found = [re.fullmatch(pattern, path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return tuple(sorted(int(name[1]) for name in found if name))


def read_dictionary(folder: Path, layers: Sequence[int], d_model: int) -> Dictionary:
    """Reads the SAEs of these layers as a dictionary.

    UserError if one is missing or damaged, is of a kind that is not read, of another kind, width or k than
    the others, or its hidden states are not the model's.
    """
    read = [_read(folder, layer, d_model) for layer in layers]
    for what, values in (
        ("keep", {k for k, _ in read}),
        ("have", {arrays["W_enc"].shape[1] for _, arrays in read}),
        ("are TopK, or have thresholds:", {"threshold" in arrays for _, arrays in read}),
    ):
        if len(values) > 1:
            several = ", ".join(map(str, sorted(values)))
            text = f"its layers {what} {several} codes: they must be alike, for the store has one k and width"
            raise UserError(text, field="--dictionary", value=str(folder))
    stacked = {name: np.stack([arrays[name] for _, arrays in read]) for name in read[0][1]}
    bias = stacked["b_enc"] if np.any(stacked["b_enc"]) else None
    return Dictionary(
        KIND,
        read[0][0],
        stacked["b_dec"],
        stacked["W_enc"],
        stacked["W_dec"],
        {"folder": folder.name},
        bias,
        stacked.get("threshold"),
    )


def _read(folder: Path, layer: int, d_model: int) -> tuple[int, dict[str, np.ndarray]]:
    """Returns k, and float32 arrays so that `Dictionary` computes what SAELens does.

    K is the width where a threshold decides and nothing says how many codes that makes.
    """
    load_file = optional_module("safetensors.numpy", "export", "--dictionary").load_file
    place = folder / hook_name(layer, RESID_POST)
    advice = "give a folder with one of SAELens for each layer"
    if not (place / _CONFIG).exists():
        raise UserError(f"--dictionary = {folder}: has no {place.name}/{_CONFIG}: {advice}")
    values = read_json(place / _CONFIG, advice)
    if (kind := values.get("architecture")) not in _READ:
        raise UserError(f"{place}: is of the architecture {kind!r}: must be one of {', '.join(_READ)}")
    for name in ("normalize_activations", "reshape_activations"):
        if values.get(name, "none") != "none":
            raise UserError(f"{place}: has {name} = {values[name]!r}: must be none")
    path = place / _WEIGHTS
    try:
        with disk_errors_are_user_errors(f"reading {path}"):
            found = {name: value.astype(np.float32) for name, value in load_file(path).items()}
    except UserError:
        raise
    except Exception as e:  # the library raises a class of its own for each kind of damage
        raise UserError(f"{path} is damaged or cut short ({e}): get it again") from e
    width, k = values.get("d_sae"), values.get("k")
    if (threshold := _READ[kind]) is not None:
        k = (values.get("metadata") or {}).get(_KEEP, round(k) if isinstance(k, int | float) else width)
        bound = found.pop(threshold, np.zeros(0))
        found["threshold"] = np.full(width, bound, np.float32) if bound.ndim == 0 else bound
    if not isinstance(width, int) or width < 1 or not isinstance(k, int) or not 1 <= k <= width:
        raise UserError(f"{place}: d_sae = {width}, k = {k}: k must be from 1 to the width")
    shapes = {
        "W_enc": (d_model, width),
        "W_dec": (width, d_model),
        "b_enc": (width,),
        "b_dec": (d_model,),
    } | ({} if threshold is None else {"threshold": (width,)})
    wrong = {name: found[name].shape if name in found else None for name in shapes}
    if wrong != shapes:
        raise UserError(
            f"{place}: d_in = {values.get('d_in')}, d_sae = {width}: its arrays must be of these widths, and "
            f"d_in the model's {d_model}"
        )
    arrays = {name: found[name] for name in shapes}
    if values.get("rescale_acts_by_decoder_norm"):
        # Chosen and scaled by the length of a code's row: as if the rows were of unit length. A threshold
        # is of the scaled ones.
        lengths = np.linalg.norm(arrays["W_dec"], axis=1)
        arrays["W_enc"], arrays["b_enc"] = arrays["W_enc"] * lengths, arrays["b_enc"] * lengths
        arrays["W_dec"] = arrays["W_dec"] / lengths[:, None]
    if not values.get("apply_b_dec_to_input", True):  # the centre is taken off: put it back
        arrays["b_enc"] = arrays["b_enc"] + arrays["b_dec"] @ arrays["W_enc"]
    return k, arrays


DELPHI_ROW = 64  # tokens; a neuron that is active in each of them has no counterexamples over there
_DELPHI_KIND = np.uint16


def write_delphi(store: Store, out: Path, model_name: str) -> None:
    """Writes a store as a cache of delphi (EleutherAI), which explains neurons by a language model.

        layers.L/0_{D - 1}.safetensors: locations [E, 3] (row, position, neuron), activations; tokens [n, T]
        layers.L/config.json

    The cache is one stream of rows; a row holds tokens of several documents where they are short, and tokens
    after the last whole row are left out. UserError if there is none.
    """
    numpy = optional_module("safetensors.numpy", "export", "topklm export")
    rows, width = store.n_tokens // DELPHI_ROW, store.metadata.d_model
    if not rows:
        raise UserError(
            f"{store.folder}: holds {store.n_tokens} tokens, and a row takes {DELPHI_ROW}: harvest more"
        )
    tokens = store.tokens(0, rows * DELPHI_ROW).reshape(rows, DELPHI_ROW).astype(np.int64)
    # Over there all three columns have one dtype.
    kind = _DELPHI_KIND if max(rows, width) <= np.iinfo(_DELPHI_KIND).max else np.uint32
    for layer in store.metadata.layers:
        block = store.block(layer, 0, width)
        neurons = np.repeat(np.arange(width), np.diff(block.offsets))
        locations = np.stack([block.tokens // DELPHI_ROW, block.tokens % DELPHI_ROW, neurons], axis=1)
        kept = block.tokens < rows * DELPHI_ROW
        arrays = {
            "locations": np.ascontiguousarray(locations[kept].astype(kind)),
            "activations": block.values[kept].astype(np.float16),
            "tokens": tokens,
        }
        folder = out / f"layers.{layer}"
        folder.mkdir()
        numpy.save_file(arrays, folder / f"0_{width - 1}.safetensors")
        about = {
            "model_name": model_name,
            "ctx_len": DELPHI_ROW,
            "dataset_repo": "",
            "dataset_split": "",
            "dataset_name": "",
            "batch_size": 8,
            "n_tokens": rows * DELPHI_ROW,
            "n_splits": 1,
        }
        (folder / "config.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
