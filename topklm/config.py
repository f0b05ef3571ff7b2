"""Every setting once: its default, its unit, its meaning, and what is allowed.

An experiment is a Python file with `get_config(arg)` that starts from `default()` and returns an
`ml_collections.ConfigDict`; the command line overrides single fields. `resolve` turns the result into
the typed, frozen `Config` that the library uses, or ends with one line that names the field.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import difflib
import functools
import math
import numbers
import re
from typing import Any, get_type_hints

import ml_collections
import numpy as np

from topklm.errors import UserError
from topklm.model import backends
from topklm.storage.files import check_name

TOPK_ACTIVATIONS = ("relu", "identity", "abs")
TOKEN_INPUTS = ("first", "every")
DTYPES = ("float32", "bfloat16")

# The largest values of integers: XLA counts with 32 bits, `jax.random` seeds with 64. A table of 2^24 tokens
# is a hundred times that of any tokenizer; the library that trains them aborts the process far above.
_MAX_SIZE = 2**31 - 1
_MAX_COUNT = 2**63 - 1
MAX_VOCABULARY = 2**24
# All floats end in float32, of which XLA flushes values smaller than its smallest normal number to 0.
_LEAST_FLOAT, _LARGEST_FLOAT = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_FLOAT32_RANGE = f"0, or of a size that float32 holds: {_LEAST_FLOAT:.2e} to {_LARGEST_FLOAT:.2e}"
_NAMES_OF_FILES = ("data.dir", "data.source", "data.mixture", "data.syntax", "train.init", "eval.tasks_dir")
_LONGEST_NAME = 100  # characters: comparing takes the product of two lengths


@dataclasses.dataclass(frozen=True)
class Range:
    """Values that a number may take."""

    allowed: str  # describes them, as in "must be ..."
    holds: Callable[[float], bool]
    most: int | None = None  # of integers, the largest

    @classmethod
    def from_least(cls, least: int, most: int | None = None) -> "Range":
        """Returns the range from the smallest number on."""
        return cls(f"{least} or more", lambda value: value >= least, most)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Everything known of a field besides its name and type."""

    meaning: str  # with its unit or its symbol
    range: Range | None = None  # of a number
    choices: tuple[str, ...] = ()  # of a name
    allowed: str = ""  # describes the values where they depend on other fields


_SIZE = Range.from_least(1, _MAX_SIZE)
_STEPS = Range.from_least(0, _MAX_SIZE)
_FROM_0 = Range.from_least(0)
_ABOVE_0 = Range("above 0", lambda value: value > 0)
_SHARE = Range("from 0 to 1", lambda value: 0 <= value <= 1)
_AVERAGE = Range(
    "at least 0 and below 1, in float32 too", lambda value: value >= 0 and float(np.float32(value)) < 1
)
_AXIS = Range("1 or more, or -1 for all that are left", lambda value: value >= 1 or value == -1, _MAX_SIZE)


def _setting(default: Any, meaning: str, range_: Range | None = None, **more: Any) -> Any:
    """Declares a field of a section; an integer is from 1 to 2^31 - 1 where nothing else is given."""
    if (
        range_ is None
        and isinstance(default, int)
        and not isinstance(default, bool)
        and "allowed" not in more
    ):
        range_ = _SIZE
    return dataclasses.field(default=default, metadata={"setting": Setting(meaning, range_, **more)})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of the transformer and its TopK. The Base LM is `n_nontopk = n_layers`."""

    d_model: int = _setting(256, "D, width of the residual stream = neurons of a TopK layer")
    n_layers: int = _setting(4, "L, transformer blocks")
    n_heads: int = _setting(4, "H, query heads", _SIZE, allowed="divides d_model, unless head_dim is given")
    head_dim: int = _setting(
        0, "width of a head, even (RoPE); 0: d_model / n_heads", Range.from_least(0, _MAX_SIZE)
    )
    n_kv_heads: int = _setting(4, "K, key and value heads", _SIZE, allowed="divides n_heads")
    d_mlp: int = _setting(688, "F, hidden width of the SwiGLU")
    vocab_size: int = _setting(
        0,
        "V, tokens that can be predicted; 0: as many as the tokenizer has",
        Range.from_least(0, MAX_VOCABULARY),
    )
    vocab_multiple: int = _setting(
        128,
        "embedding rows: V rounded up to a multiple of this; 1: no padding",
        Range.from_least(1, MAX_VOCABULARY),
    )
    context_length: int = _setting(256, "T, tokens of a training window")
    topk_k: int = _setting(
        32, "k, residual entries that a TopK layer keeps of a token", allowed="from 1 to d_model"
    )
    topk_groups: str = _setting(
        "",
        'groups of neurons that compete among themselves, "WIDTH:K,WIDTH:K", such as 16:4,112:12; the widths '
        "add up to d_model and the k to topk_k; empty: all compete",
    )
    topk_centred: bool = _setting(
        False,
        "TopK reads the stream less its mean over the neurons that compete: a shift common to all of them, "
        "which selection does not see, can then not carry them below 0, where relu would end them",
    )
    n_nontopk: int = _setting(
        1, "final layers left dense; n_layers gives the Base LM", allowed="from 1 to n_layers"
    )
    topk_activation: str = _setting(
        "relu",
        "what is kept: relu (clipped at 0: the layer is a TopK SAE with identity weights), identity, abs (by "
        "magnitude)",
        choices=TOPK_ACTIVATIONS,
    )
    topk_backend: str = _setting(
        "auto", "implementation of TopK; all give the same bits except approx", choices=backends.TOPK.names
    )
    token_input: str = _setting(
        "first",
        "layers that read the token's embedding: first (the residual stream carries it on), every (TopK "
        "layers read it beside the stream, which does not carry it: neurons need not repeat the token; the "
        "first dense layer adds it after its attention)",
        choices=TOKEN_INPUTS,
    )
    qk_norm: bool = _setting(False, "RMSNorm of each head's queries and keys before RoPE, as in Qwen3")
    attention: str = _setting(
        "auto",
        "implementation of attention: blocked (anywhere), splash (TPU), triton, cudnn (GPU)",
        choices=backends.ATTENTION.names,
    )
    tie_embeddings: bool = _setting(False, "unembedding = transposed embedding")
    rope_theta: float = _setting(10_000.0, "RoPE base wavelength, tokens / 2 pi", _ABOVE_0)
    rope_scaling: str = _setting(
        "",
        "change of the wavelengths for longer contexts: linear:FACTOR, or as in Llama 3.1 "
        "llama3:FACTOR:LOW:HIGH:CONTEXT (wavelengths above CONTEXT / LOW are multiplied by FACTOR, those "
        "below CONTEXT / HIGH are not); empty: none",
        allowed="linear:FACTOR, llama3:FACTOR:LOW:HIGH:CONTEXT, with FACTOR 1 or more and LOW below HIGH",
    )
    norm_eps: float = _setting(1e-5, "RMSNorm epsilon", _ABOVE_0)
    init_embed_std: float = _setting(1.0, "standard deviation of the embedding at initialisation", _FROM_0)
    init_residual_scale: float = _setting(
        1.0, "multiplies 1/sqrt(2 L) in the initial scale of the matrices that write to the stream", _FROM_0
    )
    dtype: str = _setting("float32", "of activations; parameters and reductions are float32", choices=DTYPES)
    layer_stack: str = _setting(
        "auto",
        "scanned (one compiled block), unrolled; auto: the faster on the platform",
        choices=("auto", "scanned", "unrolled"),
    )
    remat: str = _setting(
        "none",
        "kept for the backward pass: none (all is kept), minimal (matrix products), full (layer inputs)",
        choices=("none", "minimal", "full"),
    )

    @property
    def head_width(self) -> int:
        """Width of one attention head, with the default filled in."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def rope_rule(self) -> tuple[str, tuple[float, ...]]:
        """Name and numbers of `rope_scaling`; "" and none where it is empty."""
        name, *numbers = self.rope_scaling.split(":")
        return name, tuple(map(float, numbers))

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """Neighbouring neurons that compete with each other: how many, and how many of them are kept."""
        if not self.topk_groups:
            return ((self.d_model, self.topk_k),)
        widths_and_k = (group.split(":") for group in self.topk_groups.split(","))
        return tuple((int(width), int(k)) for width, k in widths_and_k)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and columns of the unembedding; those from V on are never predicted."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def n_topk_layers(self) -> int:
        """S, the number of leading layers whose output passes through TopK."""
        return self.n_layers - self.n_nontopk

    @property
    def n_followed_layers(self) -> int:
        """The number of leading layers whose neurons (of a Base LM: coordinates) another layer reads."""
        return self.n_topk_layers or self.n_layers - 1


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    source: str = _setting(
        "quickstart",
        "quickstart, a prepared folder (gs:// and s3:// too), or files, globs, URLs of text, with commas",
    )
    mixture: str = _setting(
        "", 'prepared folders and their shares of the windows, "DIR:0.7,DIR:0.3"; replaces source'
    )
    cache_gib: float = _setting(
        8.0, "GiB of a machine's temporary folder (TMPDIR) that may hold what was read from buckets", _ABOVE_0
    )
    text_field: str = _setting("text", "key of the text in a JSON line")
    vocab_size: int = _setting(
        4096,
        "tokens of the BPE that is trained on the training split, separator included",
        Range.from_least(257, MAX_VOCABULARY),  # 256 bytes and a separator
    )
    heldout_fraction: float = _setting(
        0.05,
        "share of documents held out, chosen by a hash of their text",
        Range(
            "above 0 and below 1, in float32 too", lambda value: value > 0 and float(np.float32(value)) < 1
        ),
    )
    dir: str = _setting("datasets", "folder that holds prepared datasets, one subfolder for each")
    syntax: str = _setting(
        "", "CoNLL-U file (also .gz, .xz) of parsed sentences, for optim.syntax_weight; empty: none"
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and on what batches."""

    steps: int = _setting(1300, "optimizer steps")
    batch_size: int = _setting(8, "sequences (windows of context_length tokens) of a step, over all devices")
    grad_accumulation: int = _setting(
        1,
        "microbatches that a step is split into; the gradient stays exact",
        _SIZE,
        allowed="divides batch_size",
    )
    seed: int = _setting(0, "of parameters, data order and samples", Range.from_least(0, _MAX_COUNT))
    init: str = _setting(
        "",
        "run whose newest checkpoint gives the first parameters; step, optimizer and data begin at 0; TopK "
        "settings may differ, so a Base LM can become a TopK LM, and model.d_model may be larger, with "
        "model.head_dim as it was; empty: drawn by seed",
    )
    only: str = _setting(
        "",
        "which parameters move, of a run begun by train.init: the ones that write or read neurons, or each "
        "by a draw at every step that favours large Fisher information (unlearning.md); empty: all",
        allowed="2:117,2:200 (LAYER:NEURON), neurons=FILE, or fisher:ALPHA[:BETA[:unbiased]]",
    )
    topk_k_start: int = _setting(
        0,
        "k of the first steps, which falls to model.topk_k in stages; evaluations are of the model with "
        "model.topk_k; 0: model.topk_k from the start",
        allowed="from model.topk_k to d_model, or 0; with topk_k_steps, without topk_groups",
    )
    topk_k_steps: int = _setting(
        0, "steps over which k falls, each stage as many, by a factor of at most sqrt(2)", _STEPS
    )
    on_bad_step: str = _setting(
        "stop",
        "at a step that is not finite, or a spike: stop the run, or skip its update (at most ten in a row)",
        choices=("stop", "skip"),
    )
    spike_sigmas: float = _setting(
        0.0,
        "a spike of loss or gradient norm is this many standard deviations above recent steps; 0: not looked "
        "for",
        _FROM_0,
    )


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule and the loss's extras."""

    learning_rate: float = _setting(6e-3, "peak", _ABOVE_0)
    schedule: str = _setting(
        "cosine", "cosine, or wsd (warm-up, stable, linear decay)", choices=("cosine", "wsd")
    )
    warmup_steps: int = _setting(50, "steps of linear warm-up", _STEPS)
    decay_fraction: float = _setting(0.2, "wsd: share of all steps spent decaying", _SHARE)
    final_learning_rate_fraction: float = _setting(0.0, "last learning rate / peak", _SHARE)
    beta1: float = _setting(0.9, "decay of the average of gradients", _AVERAGE)
    beta2: float = _setting(0.95, "decay of the average of squared gradients", _AVERAGE)
    epsilon: float = _setting(1e-8, "added to the root of the second average", _ABOVE_0)
    weight_decay: float = _setting(0.1, "on matrices; never on norms", _FROM_0)
    clip_norm: float = _setting(1.0, "global gradient norm is clipped to this; 0: not clipped", _FROM_0)
    z_loss: float = _setting(0.0, "weight of mean(logsumexp(logits)^2) in the loss", _FROM_0)
    topic_weight: float = _setting(
        0.0,
        "weight, in the loss, of the tokens that follow, predicted by the first of model.topk_groups alone, "
        "in each layer with TopK: its neurons come to tell what a text is about; not with mesh.context",
        _FROM_0,
    )
    topic_tokens: int = _setting(64, "tokens that follow, at most, of topic_weight", _SIZE)
    syntax_weight: float = _setting(
        0.0,
        "weight, in the loss, of the attention between words and their heads in sentences of data.syntax: of "
        "each arc the largest of all heads, then the mean; above 0 suppresses it, below 0 promotes it",
        allowed="any number; 0 without data.syntax",
    )
    syntax_steps: int = _setting(0, "first steps with syntax_weight, 0 after them; 0: all", _STEPS)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one may be -1: all that are left."""

    data: int = _setting(
        -1, "devices that repeat parameters; across slices of TPUs, whose links are slower", _AXIS
    )
    fsdp: int = _setting(1, "devices over which parameters, optimizer and batch are split", _AXIS)
    context: int = _setting(1, "devices over which the tokens of a sequence are split", _AXIS)
    tensor: int = _setting(1, "devices over which heads, MLP and vocabulary are split", _AXIS)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every_steps: int = _setting(200, "steps between saves; 0: only at the end and on interruption", _STEPS)
    keep: int = _setting(2, "newest checkpoints kept")
    trace: str = _setting(
        "",
        "steps whose parameters alone are kept for good in RUN/trace, as bfloat16, to be read and never to "
        "be resumed from: log (0, 1, 2, 4, ... 64, then by factors of sqrt(2), and the last), log2, pythia "
        "(log2 to 512, then every 1,000), or a list; empty: none",
        allowed="log, log2, pythia, or rising steps such as 0,1,2,4",
    )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation."""

    every_steps: int = _setting(200, "steps between evaluations; 0: only at the end", _STEPS)
    batch_size: int = _setting(16, "sequences of one forward pass")
    sample_prompt: str = _setting("The", "prompt of the text sample")
    sample_tokens: int = _setting(40, "length of the text sample, tokens", Range.from_least(0, 2**20))
    max_tokens: int = _setting(
        0,
        "text tokens to evaluate on, the first documents of each dataset; 0: all",
        Range.from_least(0, _MAX_COUNT),
    )
    tasks: str = _setting(
        "",
        'tasks at evaluations, such as "blimp,piqa" (docs/evaluation.md); empty: none',
        allowed="names with commas between",
    )
    tasks_dir: str = _setting("", "folder with the files of tasks that do not ship with topklm")
    tasks_limit: int = _setting(
        100, "items of each task, and of each paradigm of blimp; 0: all", Range.from_least(0, _MAX_COUNT)
    )


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Printing and metrics."""

    every_steps: int = _setting(20, "steps between metrics lines")
    trackers: str = _setting(
        "",
        "also get every metrics line: wandb, or others as MODULE:FUNCTION or by name (docs/training.md)",
        allowed="names with commas between",
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole experiment."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    profile: str = _setting("", '"A:B" traces steps A to B - 1 into RUN/profile, for xprof; empty: none')

    def to_dict(self) -> dict[str, Any]:
        """Returns the plain nested dict that a run's config.json stores."""
        return dataclasses.asdict(self)

    def topk_k_at(self, step: int) -> int:
        """Returns k of the training step with this number; the first is 1."""
        first, last, steps = self.train.topk_k_start, self.model.topk_k, self.train.topk_k_steps
        if not first or step > steps:
            return last
        stages = max(1, math.ceil(2 * math.log2(first / last)))
        stage = (step - 1) * stages // steps
        return round(first * (last / first) ** (stage / stages))

    @property
    def traced_steps(self) -> list[int]:
        """Lists the steps that `checkpoint.trace` names, rising."""
        name, last = self.checkpoint.trace, self.train.steps
        if not name or name[0].isdigit():
            return [int(step) for step in name.split(",") if step]
        n_doublings = last.bit_length()
        steps = {0, last, *(2**i for i in range(n_doublings) if name == "log2" or i <= _LAST_DOUBLING[name])}
        if name == "log":
            steps |= {round(64 * 2 ** (i / 2)) for i in range(2 * n_doublings)}
        if name == "pythia":
            steps |= set(range(1000, last, 1000))
        return sorted(step for step in steps if step <= last)

    @property
    def trained_neurons(self) -> list[tuple[int, int]]:
        """Layer and number of the neurons that `train.only` lists, rising; none where it has another form."""
        only = self.train.only
        pairs = only.split(",") if only[:1].isdigit() else []
        return sorted({(int(layer), int(neuron)) for layer, neuron in (pair.split(":") for pair in pairs)})

    @property
    def fisher_draws(self) -> tuple[float, float, bool] | None:
        """Alpha, beta and whether gradients are made unbiased, of `train.only`; None in another form."""
        if not self.train.only.startswith("fisher:"):
            return None
        alpha, beta, unbiased = (*self.train.only.split(":")[1:], "", "")[:3]
        return float(alpha), float(beta or _BETA), bool(unbiased)

    @property
    def profiled_steps(self) -> range:
        """The steps that `profile` names; the first step of a run is 1."""
        begin, _, end = self.profile.partition(":")
        return range(int(begin), int(end)) if self.profile else range(0)


# In checkpoint.trace, the exponent of the last power of 2 before the steps lie otherwise.
_LAST_DOUBLING = {"log": 6, "pythia": 9}

# RoAST's code (run.sh) has 10 for sentiment and 1 for entailment; above the limit, draws are a threshold.
_BETA, _MOST_BETA = 10.0, 1e6

# A run may be continued with other values of these; any other field that differs is refused. Data may lie
# elsewhere: its content is compared by its fingerprint. How a step is computed changes rounding at most.
CHANGEABLE_ON_RESUME = frozenset(
    {"train.steps", "train.on_bad_step", "train.spike_sigmas", "model.remat", "model.layer_stack"}
    | {"model.attention", "data.source", "data.mixture", "data.dir", "data.syntax", "data.cache_gib"}
    | {"mesh", "checkpoint", "eval", "log", "profile"}
)


def default() -> ml_collections.ConfigDict:
    """Returns the default experiment as a `ConfigDict`, the starting point of every file in configs/."""
    return ml_collections.ConfigDict(Config().to_dict())


def resolve(raw: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """Checks a nested mapping of sections to fields, defaults where it has none; returns the typed config.

    UserError for an unknown field (with the nearest name), a wrong type, or a value out of range.
    """
    values = raw.to_dict() if isinstance(raw, ml_collections.ConfigDict) else raw
    if not isinstance(values, Mapping):
        raise UserError(
            f"config = {_shown(values)}: must be sections with fields, as topklm.config.default()"
        )
    config = _build(Config, values)
    _check_ranges(config)
    return config


def from_saved(values: Mapping[str, Any]) -> Config:
    """Resolves a config that a run has saved, also one from before `vocab_multiple` or `layer_stack`."""
    saved = values.get("model") if isinstance(values, Mapping) else None
    if isinstance(saved, Mapping):
        # The former name of `layer_stack`; nothing that was saved depends on it.
        saved = {name: value for name, value in saved.items() if name != "scan_layers"}
        values = {**values, "model": saved}
    config = resolve(values)
    model = config.model
    if "vocab_multiple" in (saved or {}) or model.padded_vocab_size == model.vocab_size:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(model, vocab_multiple=1))


def nearest_field(name: str) -> str:
    """Returns advice for an unknown section or field such as "d_modl": the closest that exists."""
    names = {f.name: f.name for f in dataclasses.fields(Config)}
    names |= {dotted.rsplit(".", maxsplit=1)[-1]: dotted for dotted in flatten(Config())}
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"did you mean config.{names[close[0]]}?" if close else "topklm train --help lists them all"


def flatten(config: Config) -> dict[str, Any]:
    """Returns all fields by dotted name: `{"model.d_model": 256, ..., "profile": ""}`."""
    return {name: functools.reduce(getattr, name.split("."), config) for name in settings()}


@functools.cache
def settings() -> Mapping[str, Setting]:
    """Returns meaning and range of every field, by dotted name."""
    found: dict[str, Setting] = {}
    for section in dataclasses.fields(Config):
        if "setting" in section.metadata:
            found[section.name] = section.metadata["setting"]
        else:
            fields = dataclasses.fields(getattr(Config(), section.name))
            found |= {f"{section.name}.{field.name}": field.metadata["setting"] for field in fields}
    return found


def page() -> str:
    """Returns docs/config.md: a table of each section; `python -m topklm.config` prints it."""
    flat, known = flatten(Config()), settings()
    lines = [
        "# Every setting",
        "",
        "A config file is a Python function `get_config(variant)` that gives an `ml_collections.ConfigDict`;",
        "it starts from `topklm.config.default()`, which holds these values. `topklm train --help` lists the",
        "ones that come with topklm, as `--config=small:base`. Any field can be set on the command line, as",
        "`--config.model.topk_k=16`. This page is printed by `python -m topklm.config`.",
    ]
    for section in dataclasses.fields(Config):
        names = [name for name in flat if name.partition(".")[0] == section.name]
        about = type(getattr(Config(), section.name)).__doc__ if "." in names[0] else "In no section."
        lines += ["", f"## {section.name}", "", f"{about}", ""]
        lines += ["| field | default | meaning | allowed |", "|---|---|---|---|"]
        for name in names:
            setting, default = known[name], flat[name]
            allowed = setting.allowed or ", ".join(setting.choices)
            if not allowed and setting.range:
                allowed = setting.range.allowed
            if isinstance(default, bool):
                allowed = "true, false"
            shown = f"`{default}`" if default != "" else "empty"
            lines.append(f"| `{name}` | {shown} | {setting.meaning} | {allowed} |")
    return "\n".join([*lines, ""])


def differences_that_matter(saved: Config, asked: Config) -> dict[str, tuple[Any, Any]]:
    """Returns the fields whose change would make a continued run a different run: name -> (saved, asked)."""
    old, new = flatten(saved), flatten(asked)
    return {
        name: (old[name], new[name])
        for name in old
        if old[name] != new[name]
        and name not in CHANGEABLE_ON_RESUME
        and name.split(".", maxsplit=1)[0] not in CHANGEABLE_ON_RESUME
        and not (name == "model.topk_backend" and backends.TOPK.all_exact(old[name], new[name]))
    }


def warnings(config: Config) -> Iterator[str]:
    """Describes settings that are allowed and that hardly anybody means, a line for each."""
    model, train, optim = config.model, config.train, config.optim
    if optim.warmup_steps > train.steps:
        yield (
            f"optim.warmup_steps = {optim.warmup_steps} of train.steps = {train.steps}: the run ends before "
            "the learning rate reaches its peak"
        )
    if (every := config.checkpoint.every_steps) > train.steps:
        yield (
            f"checkpoint.every_steps = {every} of train.steps = {train.steps}: the run is saved only at its "
            "end and on interruption"
        )
    if optim.learning_rate > (scale := model.d_model**-0.5):
        yield (
            f"optim.learning_rate = {optim.learning_rate}: a step of AdamW moves a weight by about as much, "
            f"and matrices begin at about 1 / sqrt(model.d_model) = {scale:.2g}"
        )
    if optim.weight_decay * optim.learning_rate >= 1:
        yield (
            f"optim.weight_decay = {optim.weight_decay}: times the learning rate it is 1 or more, so each "
            "step turns matrices round"
        )
    memory = max(1 / (1 - beta) for beta in (optim.beta1, optim.beta2))  # steps
    if memory > max(train.steps, 1000):
        yield (
            f"optim.beta1 = {optim.beta1}, optim.beta2 = {optim.beta2}: they average over {memory:,.0f} "
            f"steps, and train.steps = {train.steps}"
        )
    if optim.epsilon > (optim.clip_norm or 1):
        yield f"optim.epsilon = {optim.epsilon}: hides gradients, whose norm is at most optim.clip_norm"
    if model.norm_eps > model.init_embed_std**2:
        yield (
            f"model.norm_eps = {model.norm_eps}: more than the mean square of what it is added to, at first "
            "model.init_embed_std^2"
        )
    if (std := model.init_embed_std) > 100:
        yield f"model.init_embed_std = {std}: beside it what the layers add vanishes"
    if (theta := model.rope_theta) <= 1:
        yield f"model.rope_theta = {theta}: wavelengths are to rise with the dims, so it is above 1"
    if model.context_length == 1:
        yield "model.context_length = 1: no token sees another"
    if config.data.mixture and config.data.source != DataConfig.source:
        yield f"data.source = {config.data.source}: is not read, data.mixture replaces it"


def _build(cls: type, values: Mapping[str, Any], section: str = "") -> Any:
    """Makes a `Config` or a section of it; `section` begins the names of its fields, such as "model."."""
    types = get_type_hints(cls)
    built = {}
    for name, value in values.items():
        if name not in types:
            kind = "field" if section else "section"
            raise UserError(f"config.{section}{_name(name)} is not a {kind}; {_nearest(name, types)}")
        if not dataclasses.is_dataclass(types[name]):
            built[name] = _typed(section + name, types[name], value)
        elif isinstance(value, Mapping):
            built[name] = _build(types[name], value, f"{name}.")
        else:
            raise UserError(f"config.{name} = {_shown(value)}: must be a section with fields")
    return cls(**built)


def _typed(field: str, want: type, value: Any) -> Any:
    """Returns the value as a plain Python one; integers and floats may be those of NumPy."""
    kinds = {int: numbers.Integral, float: numbers.Real}
    if isinstance(value, bool) != (want is bool) or not isinstance(value, kinds.get(want, want)):
        raise UserError(f"{field} = {_shown(value)}: must be of type {want.__name__}")
    try:
        return want(value)
    except OverflowError as e:
        raise UserError(f"{field} = {_shown(value)}: must be {_FLOAT32_RANGE}") from e


def _name(name: Any) -> str:
    return name if isinstance(name, str) else _shown(name)


def _shown(value: Any) -> str:
    """Writes a value as Python does, or its type where that is not possible (an integer of 5,000 digits)."""
    try:
        return repr(value)
    except Exception:
        return f"<{type(value).__name__}>"


def _nearest(name: Any, names: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(_name(name)[:_LONGEST_NAME], list(names), n=1)
    return f"did you mean {close[0]}?" if close else f"there are: {', '.join(names)}"


def _check_ranges(config: Config) -> None:
    """Checks each field, then those that depend on others; UserError for the first that is out of range."""
    flat = flatten(config)

    def require(field: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise UserError(f"{field} = {_shown(flat[field])}: must be {allowed}")

    for field, setting in settings().items():
        value, range_ = flat[field], setting.range
        if isinstance(value, float):
            require(field, math.isfinite(value), "a finite number")
            require(field, not value or _LEAST_FLOAT <= abs(value) <= _LARGEST_FLOAT, _FLOAT32_RANGE)
        if isinstance(value, str):
            if value and field in _NAMES_OF_FILES:
                check_name(value, field)
            is_utf8 = value.encode(errors="ignore").decode() == value  # no lone surrogates
            require(field, is_utf8, "text that UTF-8 can write")
            allowed = f"one of {', '.join(setting.choices)}"
            require(field, not setting.choices or value in setting.choices, allowed)
        elif range_:
            require(field, range_.most is None or value <= range_.most, f"at most {range_.most}")
            require(field, range_.holds(value), range_.allowed)
    m, train = config.model, config.train
    divisor = f"a divisor of model.d_model ({m.d_model}), or model.head_dim must be given"
    require("model.n_heads", m.head_dim > 0 or m.d_model % m.n_heads == 0, divisor)
    require("model.head_dim", m.head_dim % 2 == 0, "even, for RoPE")
    even = f"such that the head width d_model / n_heads (now {m.head_width}) is even, for RoPE"
    require("model.n_heads", m.head_width % 2 == 0, even)
    require("model.n_kv_heads", m.n_heads % m.n_kv_heads == 0, f"a divisor of model.n_heads ({m.n_heads})")
    require("model.topk_k", 1 <= m.topk_k <= m.d_model, f"from 1 to model.d_model ({m.d_model})")
    if train.topk_k_start or train.topk_k_steps:
        require("train.topk_k_start", not m.topk_groups, "0 where model.topk_groups is given")
        allowed = f"from model.topk_k ({m.topk_k}) to model.d_model ({m.d_model}), or 0 with topk_k_steps = 0"
        require("train.topk_k_start", m.topk_k <= train.topk_k_start <= m.d_model, allowed)
        require("train.topk_k_steps", train.topk_k_steps > 0, "1 or more where topk_k_start is given")
    _check_groups(m)
    _check_rope_scaling(m)
    layers = f"from 1 to model.n_layers ({m.n_layers}, which gives the Base LM)"
    require("model.n_nontopk", 1 <= m.n_nontopk <= m.n_layers, layers)
    require("data.source", bool(config.data.source.strip()), "a source of text, e.g. quickstart")
    _check_profile(config)
    _check_trace(config)
    check_only(config)
    if config.optim.topic_weight:
        weight = "optim.topic_weight"
        require(weight, len(m.groups) > 1, "0 without model.topk_groups, whose first holds the topics")
        require(weight, m.n_topk_layers > 0, "0 in a Base LM, which has no layer with TopK")
        shorter = f"less than model.context_length ({m.context_length})"
        require("optim.topic_tokens", config.optim.topic_tokens < m.context_length, shorter)
    if config.optim.syntax_weight and not config.data.syntax:
        advice = "0 without data.syntax, the CoNLL-U file whose sentences it is measured on"
        require("optim.syntax_weight", False, advice)
    multiple = f"a multiple of train.grad_accumulation ({train.grad_accumulation})"
    require("train.batch_size", train.batch_size % train.grad_accumulation == 0, multiple)
    for field in ["train.batch_size", "eval.batch_size"]:
        allowed = f"at most {_MAX_SIZE // m.context_length}: {_MAX_SIZE} tokens of model.context_length"
        require(field, flat[field] * m.context_length <= _MAX_SIZE, allowed)
    axes = [f"mesh.{axis.name}" for axis in dataclasses.fields(MeshConfig)]
    if sum(flat[field] == -1 for field in axes) > 1:
        raise UserError(f"mesh: only one of {', '.join(axes)} may be -1")


def _check_groups(m: ModelConfig) -> None:
    if not m.topk_groups:
        return
    field = f"model.topk_groups = {m.topk_groups!r}"
    if not re.fullmatch("[0-9]{1,9}:[0-9]{1,9}(,[0-9]{1,9}:[0-9]{1,9})*", m.topk_groups):
        raise UserError(f'{field}: must be "WIDTH:K,WIDTH:K", e.g. 16:4,112:12, or empty')
    for width, k in m.groups:
        if not 1 <= k <= width:
            raise UserError(f"{field}: of {width} neurons {k} cannot be kept; k is from 1 to the width")
    n_neurons, n_kept = (sum(numbers) for numbers in zip(*m.groups, strict=True))
    if n_neurons != m.d_model:
        raise UserError(f"{field}: holds {n_neurons} neurons, and must hold model.d_model ({m.d_model})")
    if n_kept != m.topk_k:
        raise UserError(f"{field}: keeps {n_kept} neurons, and must keep model.topk_k ({m.topk_k})")


def _check_rope_scaling(m: ModelConfig) -> None:
    if not m.rope_scaling:
        return
    number = r"[0-9]{1,9}(\.[0-9]{1,9})?"
    is_form = re.fullmatch(f"linear:{number}|llama3(:{number}){{4}}", m.rope_scaling)
    name, numbers = m.rope_rule if is_form else ("", ())
    if not is_form or numbers[0] < 1 or (name == "llama3" and not 0 < numbers[1] < numbers[2] <= numbers[3]):
        allowed = settings()["model.rope_scaling"].allowed
        raise UserError(
            f"model.rope_scaling = {m.rope_scaling!r}: must be {allowed}, or empty, e.g. llama3:8:1:4:8192"
        )


def _check_profile(config: Config) -> None:
    if not config.profile:
        return
    is_range = re.fullmatch("[0-9]{1,10}:[0-9]{1,10}", config.profile)
    if not is_range or not 1 <= config.profiled_steps.start <= config.train.steps:
        allowed = f'"A:B" for steps A to B - 1, with A from 1 to train.steps ({config.train.steps})'
        raise UserError(f"profile = {config.profile!r}: must be {allowed}, e.g. 10:13, or empty")
    if not config.profiled_steps:
        raise UserError(f"profile = {config.profile!r}: holds no step; B of A:B is the first not traced")


def _check_trace(config: Config) -> None:
    trace, last = config.checkpoint.trace, config.train.steps
    if trace in ("", "log2", *_LAST_DOUBLING):
        return
    field = f"checkpoint.trace = {trace!r}"
    if not re.fullmatch("[0-9]{1,10}(,[0-9]{1,10})*", trace):
        raise UserError(f"{field}: must be log, log2, pythia, steps such as 0,1,2,4, or empty")
    steps = config.traced_steps
    if steps != sorted(set(steps)):
        raise UserError(f"{field}: steps must rise, each given once")
    if steps[-1] > last:
        raise UserError(f"{field}: {steps[-1]} is after the last step, train.steps = {last}")


def check_only(config: Config) -> None:
    """Raises UserError if `train.only` has no form that is known, or names neurons that are not there."""
    only, m = config.train.only, config.model
    if not only:
        return
    field = f"train.only = {only!r}"
    if not config.train.init:
        raise UserError(f"{field}: must be empty without train.init, the run whose parameters are kept")
    if re.fullmatch(r"\d{1,6}:\d{1,9}(,\d{1,6}:\d{1,9})*", only):
        for layer, neuron in config.trained_neurons:
            if layer >= m.n_followed_layers or neuron >= m.d_model:
                raise UserError(
                    f"{field}: there is no neuron {layer}:{neuron} to train; layers are from 0 to "
                    f"{m.n_followed_layers - 1}, neurons from 0 to {m.d_model - 1}"
                )
    elif only.startswith("fisher:"):
        number = r"\d{1,9}(\.\d{1,9})?"
        if not re.fullmatch(f"fisher:-?{number}(:{number}(:unbiased)?)?", only):
            raise UserError(f"{field}: must be fisher:ALPHA[:BETA[:unbiased]], e.g. fisher:0.9:10")
        assert config.fisher_draws  # of this form
        alpha, beta, _ = config.fisher_draws
        if not 0 <= alpha <= 1:
            raise UserError(f"{field}: ALPHA must be from 0 to 1, a rank among all parameters")
        if not 0 < beta <= _MOST_BETA:
            raise UserError(f"{field}: BETA must be above 0, and at most {_MOST_BETA:g}")
    elif not re.fullmatch("neurons=.+", only):
        raise UserError(f"{field}: must be {settings()['train.only'].allowed}, or empty")


if __name__ == "__main__":
    print(page(), end="")
