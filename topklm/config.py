"""Every setting once: its default, its unit, its meaning, and what is allowed.

An experiment is a Python file with `get_config(arg)` that starts from `default()` and returns an
`ml_collections.ConfigDict`; the command line overrides single fields. `resolve` turns the result into
the typed, frozen `Config` that the library uses, or ends with one line that names the field.
"""

from collections.abc import Mapping
import dataclasses
import difflib
import math
import numbers
import re
from typing import Any, get_type_hints

import ml_collections
import numpy as np

from topklm.errors import UserError
from topklm.files import check_name, parse_json
from topklm.model import backends

TOPK_ACTIVATIONS = ("relu", "identity", "abs")
DTYPES = ("float32", "bfloat16")
SCHEDULES = ("cosine", "wsd")
LAYER_STACKS = ("auto", "scanned", "unrolled")
REMAT_POLICIES = ("none", "minimal", "full")
BAD_STEP_POLICIES = ("stop", "skip")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of the transformer and its TopK. The Base LM is `n_nontopk = n_layers`."""

    d_model: int = 256  # D, width of the residual stream = neurons per TopK layer
    n_layers: int = 4  # L
    n_heads: int = 4  # H, query heads; d_model / n_heads is the head width, which must be even (RoPE)
    n_kv_heads: int = 4  # K, key and value heads; divides n_heads
    d_mlp: int = 688  # F, hidden width of the SwiGLU
    vocab_size: int = 0  # V, tokens that can be predicted; 0: the tokenizer's size, the only other value
    vocab_multiple: int = 128  # (un)embedding rows: V rounded up to a multiple of this; 1: no padding
    context_length: int = 256  # T, tokens per training window
    topk_k: int = 32  # k, residual entries a TopK layer keeps per token, 1 to d_model
    n_nontopk: int = 1  # final layers left dense; n_layers gives the Base LM
    topk_activation: str = "relu"  # what is kept: relu (clipped at 0), identity, abs (by magnitude)
    topk_backend: str = "auto"  # how it is computed; of all but approx (approximate) the result is the same
    qk_norm: bool = False  # RMSNorm of each head's queries and keys before RoPE, as in Qwen3
    attention: str = "auto"  # how it is computed: auto, blocked, splash (TPU), triton or cudnn (GPU)
    tie_embeddings: bool = False  # unembedding = transposed embedding
    rope_theta: float = 10_000.0  # RoPE base wavelength
    norm_eps: float = 1e-5  # RMSNorm epsilon
    init_embed_std: float = 1.0  # standard deviation of the embedding at initialisation
    init_residual_scale: float = 1.0  # multiplies 1/sqrt(2 L) in the initial scale of what blocks write
    dtype: str = "float32"  # of activations; parameters and reductions are float32
    layer_stack: str = "auto"  # scanned (one compiled block), unrolled; auto: what suits the platform
    remat: str = (
        "none"  # kept for the backward pass: none (all), minimal (matrix products), full (layer inputs)
    )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and columns of the unembedding; those from V on are never predicted."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def n_topk_layers(self) -> int:
        """S, the number of leading layers whose output passes through TopK."""
        return self.n_layers - self.n_nontopk


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    source: str = "quickstart"  # quickstart, a prepared folder, or files, globs, URLs of text
    mixture: str = ""  # prepared folders and their shares of the windows, "DIR:0.7,DIR:0.3"; replaces source
    text_field: str = "text"  # key of the text in a JSON line
    vocab_size: int = 4096  # tokens of the BPE tokenizer trained on the training split, separator included
    heldout_fraction: float = 0.05  # share of documents held out, chosen by a hash of their text
    dir: str = "datasets"  # folder that holds prepared datasets, one subfolder for each


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and on what batches."""

    steps: int = 1300  # optimizer steps
    batch_size: int = 8  # sequences (windows of context_length tokens) per step, over all devices
    grad_accumulation: int = 1  # microbatches that a step is split into; the gradient stays exact
    seed: int = 0  # of parameters, data order and samples
    on_bad_step: str = "stop"  # a step that is not finite, or a spike: stop the run, or skip its update
    spike_sigmas: float = (
        0.0  # a spike is this many standard deviations above recent steps; 0: not looked for
    )


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule and the loss's extras."""

    learning_rate: float = 6e-3  # peak
    schedule: str = "cosine"  # cosine, or wsd (warm-up, stable, linear decay)
    warmup_steps: int = 50  # steps of linear warm-up
    decay_fraction: float = 0.2  # wsd: share of all steps spent decaying
    final_learning_rate_fraction: float = 0.0  # last learning rate / peak
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1  # on matrices; never on norms
    clip_norm: float = 1.0  # global gradient norm is clipped to this; 0: not clipped
    z_loss: float = 0.0  # weight of mean(logsumexp(logits)^2) in the loss


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one may be -1: all that are left."""

    data: int = -1  # parameters repeated; across slices of TPUs, whose links are slower
    fsdp: int = 1  # parameters, optimizer and batch split
    context: int = 1  # tokens of a sequence split
    tensor: int = 1  # heads, MLP and vocabulary split


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every_steps: int = 200  # 0: only at the end and on interruption
    keep: int = 2  # newest checkpoints kept


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation."""

    every_steps: int = 200  # 0: only at the end
    batch_size: int = 16  # sequences
    sample_prompt: str = "The"  # prompt of the text sample
    sample_tokens: int = 40  # length of the text sample, tokens
    max_tokens: int = 0  # text tokens to evaluate on, the first documents of each dataset; 0: all


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is printed and written."""

    every_steps: int = 20  # steps between metrics lines


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
    profile: str = ""  # "A:B": trace steps A to B - 1 into the run folder, as numpy counts; empty: none

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, as stored in a run's config.json."""
        return dataclasses.asdict(self)

    @property
    def profiled_steps(self) -> range:
        """What `profile` says; the first step of a run is 1."""
        begin, _, end = self.profile.partition(":")
        return range(int(begin), int(end)) if self.profile else range(0)


# A run may be continued with other values of these; any other field that differs is refused. Data may lie
# elsewhere: what it holds is compared by its fingerprint. How a step is computed changes rounding at most.
CHANGEABLE_ON_RESUME = frozenset(
    {"train.steps", "train.on_bad_step", "train.spike_sigmas", "model.remat", "model.layer_stack"}
    | {"model.attention", "data.source", "data.mixture", "data.dir"}
    | {"mesh", "checkpoint", "eval", "log", "profile"}
)


def default() -> ml_collections.ConfigDict:
    """The default experiment as a `ConfigDict`, the starting point of every file in configs/."""
    return ml_collections.ConfigDict(Config().to_dict())


def resolve(raw: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """Checks field names, types and ranges and returns the typed config.

    Args:
        raw: Nested mapping of sections to fields, and of the fields in no section; what is missing takes its
            default.

    Raises:
        UserError: For an unknown field (with the nearest name), a wrong type, or a value out of range.
    """
    values = raw.to_dict() if isinstance(raw, ml_collections.ConfigDict) else raw
    if not isinstance(values, Mapping):
        raise UserError(
            f"config = {_shown(values)}: must be sections with fields, as topklm.config.default()"
        )
    types = get_type_hints(Config)
    built = {}
    for name, value in values.items():
        if name not in types:
            raise UserError(f"config.{_name(name)} is not a section; {_nearest(name, types)}")
        if not dataclasses.is_dataclass(types[name]):
            built[name] = _typed(name, types[name], value)
        elif isinstance(value, Mapping):
            built[name] = _build_section(name, types[name], value)
        else:
            raise UserError(f"config.{name} = {_shown(value)}: must be a section with fields")
    config = Config(**built)
    _check_ranges(config)
    return config


def from_json(text: str | bytes) -> Config:
    """Reads the config.json of a run folder.

    Raises:
        UserError: If it is no JSON object, and as `resolve`.
    """
    try:
        values = parse_json(text)
    except ValueError as e:
        raise UserError(f"the saved config is not valid JSON ({e})") from e
    return from_saved(values)


def from_saved(values: Mapping[str, Any]) -> Config:
    """A config that a run has saved, also one from before `vocab_multiple` or `layer_stack`.

    Raises:
        UserError: As `resolve`.
    """
    config = resolve(_without_scan_layers(values))
    model = config.model
    if "vocab_multiple" in values.get("model", {}) or model.padded_vocab_size == model.vocab_size:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(model, vocab_multiple=1))


def _without_scan_layers(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """`model.scan_layers` said what `layer_stack` says now; nothing that was saved depends on it."""
    model = values.get("model") if isinstance(values, Mapping) else None
    if not isinstance(model, Mapping) or "scan_layers" not in model:
        return values
    return {**values, "model": {name: value for name, value in model.items() if name != "scan_layers"}}


def nearest_field(name: str) -> str:
    """The advice for an unknown section or field such as "d_modl": the closest that exists."""
    names = {f.name: f.name for f in dataclasses.fields(Config)}
    names |= {dotted.rsplit(".", maxsplit=1)[-1]: dotted for dotted in flatten(Config())}
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"did you mean config.{names[close[0]]}?" if close else "topklm train --help lists them all"


def flatten(config: Config) -> dict[str, Any]:
    """`{"model.d_model": 256, ..., "profile": ""}`."""
    flat: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        fields = value if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{field}".rstrip("."): v for field, v in fields.items()}
    return flat


def differences_that_matter(saved: Config, asked: Config) -> dict[str, tuple[Any, Any]]:
    """Fields whose change would make a continued run a different run: name -> (saved, asked)."""
    old, new = flatten(saved), flatten(asked)
    return {
        name: (old[name], new[name])
        for name in old
        if old[name] != new[name]
        and name not in CHANGEABLE_ON_RESUME
        and name.split(".", maxsplit=1)[0] not in CHANGEABLE_ON_RESUME
        and not (name == "model.topk_backend" and backends.TOPK.all_exact(old[name], new[name]))
    }


def warnings(config: Config) -> list[str]:
    """Describes settings that are allowed and that hardly anybody means, a line for each."""
    model, train, optim = config.model, config.train, config.optim
    memory = max(1 / (1 - beta) for beta in (optim.beta1, optim.beta2))  # steps
    found = [
        (
            optim.warmup_steps > train.steps,
            f"optim.warmup_steps = {optim.warmup_steps} of train.steps = {train.steps}: the run ends before "
            "the learning rate reaches its peak",
        ),
        (
            config.checkpoint.every_steps > train.steps,
            f"checkpoint.every_steps = {config.checkpoint.every_steps} of train.steps = {train.steps}: the "
            "run is saved only at its end and on interruption",
        ),
        (
            optim.learning_rate > model.d_model**-0.5,
            f"optim.learning_rate = {optim.learning_rate}: a step of AdamW moves a weight by about as much, "
            f"and matrices begin at about 1 / sqrt(model.d_model) = {model.d_model**-0.5:.2g}",
        ),
        (
            optim.weight_decay * optim.learning_rate >= 1,
            f"optim.weight_decay = {optim.weight_decay}: times the learning rate it is 1 or more, so each "
            "step turns matrices round",
        ),
        (
            memory > max(train.steps, 1000),
            f"optim.beta1 = {optim.beta1}, optim.beta2 = {optim.beta2}: they average over {memory:,.0f} "
            f"steps, and train.steps = {train.steps}",
        ),
        (
            optim.epsilon > (optim.clip_norm or 1),
            f"optim.epsilon = {optim.epsilon}: hides gradients, whose norm is at most optim.clip_norm",
        ),
        (
            model.norm_eps > model.init_embed_std**2,
            f"model.norm_eps = {model.norm_eps}: more than the mean square of what it is added to, at first "
            "model.init_embed_std^2",
        ),
        (
            model.init_embed_std > 100,
            f"model.init_embed_std = {model.init_embed_std}: beside it what the layers add vanishes",
        ),
        (
            model.rope_theta <= 1,
            f"model.rope_theta = {model.rope_theta}: wavelengths are to rise with the dims, so it is above 1",
        ),
        (model.context_length == 1, "model.context_length = 1: no token sees another"),
        (
            bool(config.data.mixture) and config.data.source != DataConfig.source,
            f"data.source = {config.data.source}: is not read, data.mixture replaces it",
        ),
    ]
    return [text for holds, text in found if holds]


def _build_section(name: str, cls: type, values: Mapping[str, Any]) -> Any:
    types = get_type_hints(cls)
    typed = {}
    for key, value in values.items():
        if key not in types:
            raise UserError(f"config.{name}.{_name(key)} is not a field; {_nearest(key, types)}")
        typed[key] = _typed(f"{name}.{key}", types[key], value)
    return cls(**typed)


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


# The largest values of integers: XLA counts with 32 bits, `jax.random` seeds with 64. A table of 2^24 tokens
# is a hundred times that of any tokenizer; the library that trains them aborts the process far above.
_MAX_SIZE = 2**31 - 1
MAX_VOCABULARY = 2**24
_INTEGER_RANGES: dict[str, tuple[int, int]] = {
    "model.vocab_size": (0, MAX_VOCABULARY),
    "model.vocab_multiple": (1, MAX_VOCABULARY),
    "data.vocab_size": (257, MAX_VOCABULARY),  # 256 bytes and a separator
    "train.seed": (0, 2**63 - 1),
    "optim.warmup_steps": (0, _MAX_SIZE),
    "checkpoint.every_steps": (0, _MAX_SIZE),
    "eval.every_steps": (0, _MAX_SIZE),
    "eval.sample_tokens": (0, 2**20),
    "eval.max_tokens": (0, 2**63 - 1),
}
# All floats end in float32, of which XLA flushes what is smaller than its smallest normal number to 0.
_LEAST_FLOAT, _LARGEST_FLOAT = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_FLOAT32_RANGE = f"0, or of a size that float32 holds: {_LEAST_FLOAT:.2e} to {_LARGEST_FLOAT:.2e}"
_LONGEST_NAME = 100  # characters: comparing takes the product of two lengths


def _check_ranges(config: Config) -> None:
    def require(field: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise UserError(f"{field} = {_shown(flat[field])}: must be {allowed}")

    m, flat = config.model, flatten(config)
    axes = [f"mesh.{axis.name}" for axis in dataclasses.fields(MeshConfig)]
    for field, value in flat.items():
        if isinstance(value, float):
            require(field, math.isfinite(value), "a finite number")
            require(field, not value or _LEAST_FLOAT <= abs(value) <= _LARGEST_FLOAT, _FLOAT32_RANGE)
        elif isinstance(value, str):
            _check_text(field, value)
        elif field in axes:
            require(field, value >= 1 or value == -1, "1 or more, or -1 for all that are left")
            require(field, value <= _MAX_SIZE, f"at most {_MAX_SIZE}")
        elif not isinstance(value, bool) and field not in ("model.topk_k", "model.n_nontopk"):
            low, high = _INTEGER_RANGES.get(field, (1, _MAX_SIZE))
            require(field, value >= low, f"{low} or more")
            require(field, value <= high, f"at most {high}")
    require("model.n_heads", m.d_model % m.n_heads == 0, f"a divisor of model.d_model ({m.d_model})")
    require(
        "model.n_heads",
        m.head_dim % 2 == 0,
        f"such that the head width d_model / n_heads (now {m.head_dim}) is even, for RoPE",
    )
    require(
        "model.n_kv_heads",
        m.n_heads % m.n_kv_heads == 0,
        f"a divisor of model.n_heads ({m.n_heads})",
    )
    require("model.topk_k", 1 <= m.topk_k <= m.d_model, f"from 1 to model.d_model ({m.d_model})")
    require(
        "model.n_nontopk",
        1 <= m.n_nontopk <= m.n_layers,
        f"from 1 to model.n_layers ({m.n_layers}, which gives the Base LM)",
    )
    for field, choices in {
        "model.topk_activation": TOPK_ACTIVATIONS,
        "model.topk_backend": backends.TOPK.names,
        "model.attention": backends.ATTENTION.names,
        "model.dtype": DTYPES,
        "model.layer_stack": LAYER_STACKS,
        "model.remat": REMAT_POLICIES,
        "train.on_bad_step": BAD_STEP_POLICIES,
        "optim.schedule": SCHEDULES,
    }.items():
        require(field, flat[field] in choices, f"one of {', '.join(choices)}")
    for field in ["model.rope_theta", "model.norm_eps", "optim.learning_rate", "optim.epsilon"]:
        require(field, flat[field] > 0, "above 0")
    for field in ["model.init_embed_std", "model.init_residual_scale", "optim.weight_decay"]:
        require(field, flat[field] >= 0, "0 or more")
    for field in ["optim.clip_norm", "optim.z_loss", "train.spike_sigmas"]:
        require(field, flat[field] >= 0, "0 or more")
    for field in ["optim.beta1", "optim.beta2"]:
        require(field, 0 <= float(np.float32(flat[field])) < 1, "at least 0 and below 1, in float32 too")
    for field in ["optim.decay_fraction", "optim.final_learning_rate_fraction"]:
        require(field, 0 <= flat[field] <= 1, "from 0 to 1")
    require("data.heldout_fraction", 0 < config.data.heldout_fraction < 1, "above 0 and below 1")
    require("data.source", bool(config.data.source.strip()), "a source of text, e.g. quickstart")
    _check_profile(config)
    require(
        "train.batch_size",
        config.train.batch_size % config.train.grad_accumulation == 0,
        f"a multiple of train.grad_accumulation ({config.train.grad_accumulation})",
    )
    for field in ["train.batch_size", "eval.batch_size"]:
        allowed = f"at most {_MAX_SIZE // m.context_length}: {_MAX_SIZE} tokens of model.context_length"
        require(field, flat[field] * m.context_length <= _MAX_SIZE, allowed)
    if sum(flat[field] == -1 for field in axes) > 1:
        raise UserError(f"mesh: only one of {', '.join(axes)} may be -1")


def _check_text(field: str, value: str) -> None:
    if value and field in ("data.dir", "data.source", "data.mixture"):
        check_name(value, field)
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{field} = {value!r}: must be text that UTF-8 can write") from e


def _check_profile(config: Config) -> None:
    steps = config.train.steps
    if not config.profile:
        return
    if not re.fullmatch("[0-9]{1,10}:[0-9]{1,10}", config.profile) or not (
        1 <= config.profiled_steps.start <= steps
    ):
        allowed = f'"A:B" for steps A to B - 1, with A from 1 to train.steps ({steps})'
        raise UserError(f"profile = {config.profile!r}: must be {allowed}, e.g. 10:13, or empty")
    if not config.profiled_steps:
        raise UserError(f"profile = {config.profile!r}: holds no step; B of A:B is the first not traced")
