"""Before the first step: the run folder is taken, the data prepared, devices and memory checked.

With several processes the first one does each thing, and the others make sure that they see the same.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import functools
from hashlib import sha256
import math
import os
import pathlib
import re
import resource
from typing import Any

import jax

from topklm import distributed
from topklm.checkpoint import run_folder
from topklm.config import Config, ModelConfig, from_saved, warnings
from topklm.data.building.build import prepare
from topklm.data.dataset import Mixture
from topklm.errors import UserError
from topklm.inference.load import describe_run, load
from topklm.layout import Layout, make_layout
from topklm.model import backends, transformer
from topklm.storage.files import AnyPath, as_path, storage_errors_are_user_errors
from topklm.training.metrics import Console
from topklm.training.throughput import parameter_count

# The first process may prepare a large corpus while the others wait; if it fails they hear of it at once.
_DATA_PATIENCE_SECONDS = 24 * 3600.0
_PATIENCE_SECONDS = 600.0


@dataclasses.dataclass(frozen=True)
class PreparedRun:
    """A run that this process may train: all that is fixed from its first step to its last."""

    config: Config  # with its vocabulary filled in
    folder: AnyPath
    mixture: Mixture
    layout: Layout

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a batch, over all processes."""
        return self.config.train.batch_size * self.config.model.context_length

    def facts(self) -> dict[str, Any]:
        """Returns the facts that a checkpoint holds of the run; `check_facts` compares them."""
        return {
            "config": self.config.to_dict(),
            "tokenizer_sha256": self.mixture.tokenizer.sha256,
            "data_fingerprint": self.mixture.fingerprint,
        }

    def check_facts(self, step: int, facts: Mapping[str, Any]) -> None:
        """Refuses a checkpoint, naming what differs, if config, tokenizer or data are not this run's."""
        run_folder.check_same_config(self.folder, from_saved(facts["config"]), self.config)
        if facts["tokenizer_sha256"] != self.mixture.tokenizer.sha256:
            raise UserError(
                f"checkpoint {step} of {self.folder} belongs to another tokenizer than the data: put the "
                "run's own checkpoints back, or start a new run with --workdir"
            )
        # Absent from checkpoints of earlier versions.
        if facts.get("data_fingerprint", self.mixture.fingerprint) != self.mixture.fingerprint:
            raise UserError(
                f"data.source, data.mixture: not the data that {self.folder} was trained on (fingerprint "
                f"{self.mixture.fingerprint[:12]}, not {facts['data_fingerprint'][:12]}): name the data it "
                "began with, wherever it lies now, or start a new run with --workdir"
            )


def _check_initial_run(config: Config, folder: AnyPath) -> None:
    """Refuses a new run in `folder` that is to begin with the parameters of one without a checkpoint."""
    if run_folder.holds_parameters_alone(folder):
        advice = f"train in another one, with --config.train.init={folder}"
        raise UserError(f"--workdir = {folder}: was made by topklm import, and holds no optimizer: {advice}")
    other = config.train.init
    if not other or run_folder.has_checkpoint(folder):
        return
    if not run_folder.has_checkpoint(as_path(other, "train.init")):
        raise UserError(f"train.init = {other}: has no checkpoint: train it first, or check the path")


def initial_parameters(run: PreparedRun) -> transformer.Parameters:
    """Reads the parameters that a new run begins with: of the newest checkpoint of `train.init`.

    Where this run's model has more coordinates, they are put into a wider one. UserError if there is none, it
    is damaged, or its tokenizer or the shape of its parameters differs in another way.
    """
    other, asked = run.config.train.init, run.config.model
    saved = run_folder.saved_config(as_path(other, "train.init"))
    narrow = asked
    if saved is not None and saved.model.d_model < asked.d_model:
        narrow = dataclasses.replace(asked, d_model=saved.model.d_model, head_dim=asked.head_width)
    if saved is not None and _reshaping_fields(saved.model, narrow):
        fields, advice = _reshaping_fields(saved.model, asked), "give this run the same"
        if narrow is not asked and asked.head_width != saved.model.head_width:
            advice += f", or of a wider model model.head_dim={saved.model.head_width}"
        raise UserError(f"train.init = {other}: its parameters have another shape ({fields}): {advice}")
    model = load(other, mesh=run.layout.mesh)
    if model.tokenizer.sha256 != run.mixture.tokenizer.sha256:
        raise UserError(
            f"train.init = {other}: was trained with another tokenizer than the data has: prepare the data "
            f"with --tokenizer {other}/{run_folder.TOKENIZER_FILE}, or name a run with the data's tokenizer"
        )
    if narrow is asked:
        return model.params
    widened = functools.partial(transformer.widened, asked, run.config.train.seed)
    shardings = run.layout.shardings(jax.eval_shape(widened, model.params))
    return jax.jit(widened, out_shardings=shardings)(model.params)


def _reshaping_fields(saved: ModelConfig, asked: ModelConfig) -> str:
    """Lists the fields in which models differ and that change the shape of parameters, with their values."""

    def shapes(model: ModelConfig) -> Any:
        return jax.eval_shape(functools.partial(transformer.create, model, 0))

    here = shapes(asked)
    if shapes(saved) == here:
        return ""
    old, new = dataclasses.asdict(saved), dataclasses.asdict(asked)
    differing = [name for name in old if old[name] != new[name]]

    # Alone it may be impossible, as a width that its heads do not divide: then it matters.
    def matters(name: str) -> bool:
        try:
            return shapes(dataclasses.replace(asked, **{name: old[name]})) != here
        except (ValueError, TypeError, ZeroDivisionError):
            return True

    return "; ".join(f"model.{n} was {old[n]!r}, now {new[n]!r}" for n in differing if matters(n))


@contextlib.contextmanager
def prepare_run(config: Config, folder: AnyPath, console: Console) -> Iterator[PreparedRun]:
    """Arranges the devices, holds the run folder and prepares the data.

    UserError for a mesh that does not fit the devices or the model; if the folder is in use, not shared by
    all hosts or holds another run; or for data that cannot be trained on.
    """
    layout = make_layout(config.mesh)
    # Refused before the data is prepared, which can take hours, and not first where the steps are made.
    backends.TOPK.check_platform(config.model.topk_backend, layout.platform)
    backends.ATTENTION.choose(config.model.attention, layout.platform, config.model.dtype, config.model)
    console.say(f"devices: {layout.describe_devices()}")
    for line in warnings(config):
        console.say(f"warning: {line}")
    with contextlib.ExitStack() as stack:
        if distributed.is_primary():
            stack.enter_context(run_folder.owned(folder, console.say))
        _check_initial_run(config, folder)
        run_folder.check_shared(folder, "--workdir")
        config, mixture = prepare_data(config, console.say)
        layout.check(config)
        if distributed.is_primary():
            _describe(config, folder, mixture)
        distributed.barrier("run folder", _PATIENCE_SECONDS)
        yield PreparedRun(config, folder, mixture, layout)


def check_memory(state: Any, layout: Layout) -> None:
    """Refuses a `TrainState` (shapes) that does not fit, before it is made: XLA on CPUs would wait for ever.

    Counts parameters, optimizer and gradients, on devices or the host whose memory they are; activations come
    on top.
    """

    def n_bytes(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    needed = 0
    for tree in (state, state.params):
        needed += sum(jax.tree.leaves(jax.tree.map(n_bytes, tree, layout.shardings(tree))))
    devices = layout.mesh.local_devices
    if devices[0].platform == "cpu":
        needed *= len(devices)
        limit, whose = min(host_limits())
    else:
        stats = devices[0].memory_stats() or {}
        limit, whose = stats.get("bytes_limit", math.inf), f"the memory of {devices[0].device_kind}"
    if needed > limit:
        raise UserError(
            f"config.model: {parameter_count(state.params):,} parameters with their optimizer and gradients "
            f"take {_gib(needed)}, more than {whose}, {_gib(limit)}: make the model smaller, or split it "
            "over more devices with --config.mesh.fsdp"
        )


def _describe(config: Config, folder: AnyPath, mixture: Mixture) -> None:
    """Checks that the folder holds this run or none, and writes what makes it self-contained."""
    if run_folder.has_checkpoint(folder):
        run_folder.check_same_run(folder, config)
        path = folder / run_folder.TOKENIZER_FILE
        with storage_errors_are_user_errors(f"reading {path}", path):
            differs = path.exists() and sha256(path.read_bytes()).hexdigest() != mixture.tokenizer.sha256
        if differs:
            raise UserError(
                f"{path} is not the tokenizer of the data (the text or its settings changed, or the file is "
                "damaged): restore the data, or start a new run with --workdir; a damaged file is written "
                "again once it is deleted"
            )
    with storage_errors_are_user_errors(f"writing to the run folder {folder}", folder):
        describe_run(folder, config, mixture.tokenizer)


def prepare_data(config: Config, say: Callable[[str], None]) -> tuple[Config, Mixture]:
    """Prepares data in the first process; others find it done, or do the same on a disk of their own.

    Returns the config with model.vocab_size of the tokenizer, and the data.
    """
    if not distributed.is_primary():
        distributed.barrier("data of the first process", _DATA_PATIENCE_SECONDS)
    mixture = prepare(config.data, say)
    if distributed.is_primary():
        distributed.barrier("data of the first process", _DATA_PATIENCE_SECONDS)
    fingerprints = distributed.gather("data", mixture.fingerprint, _DATA_PATIENCE_SECONDS)
    if len(set(fingerprints)) > 1:
        other = next(i for i, found in enumerate(fingerprints) if found != fingerprints[0])
        raise UserError(
            f"data.source, data.mixture: process {other} has other data than process 0 (fingerprint "
            f"{fingerprints[other][:12]}, not {fingerprints[0][:12]}): give all hosts the same"
        )
    size, asked = mixture.tokenizer.vocab_size, config.model.vocab_size
    if asked not in (0, size):
        raise UserError(f"model.vocab_size = {asked}: must be 0 (the tokenizer's) or the tokenizer's {size}")
    if not mixture.heldout_text_tokens:
        raise UserError(
            "data.source, data.mixture: no dataset has held-out text to evaluate on; prepare one with "
            "--heldout or --heldout-fraction"
        )
    model = dataclasses.replace(config.model, vocab_size=size)
    return dataclasses.replace(config, model=model), mixture


def host_limits() -> list[tuple[float, str]]:
    """Lists the bytes that this process may still take, and the limit that says so."""
    limits: list[tuple[float, str]] = []
    with contextlib.suppress(OSError, ValueError):  # no such names outside of Linux and macOS
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limits.append((memory + _proc("/proc/meminfo", "SwapTotal"), "the machine's memory"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            limits.append((int(pathlib.Path(file).read_text()), "the container's memory"))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append(
            (max(soft - _proc("/proc/self/status", "VmSize"), 0), "the limit of this process (ulimit -v)")
        )
    return limits or [(math.inf, "")]


def _proc(file: str, field: str) -> int:
    """Reads a field in kB of a file of proc(5), in bytes; 0 where there is none."""
    with contextlib.suppress(OSError):
        if found := re.search(rf"^{field}:\s+(\d+) kB$", pathlib.Path(file).read_text(), re.M):
            return int(found[1]) * 1024
    return 0


def free_memory() -> int:
    """Returns the bytes of this machine's memory that programs can still get; 0 where nobody tells."""
    return _proc("/proc/meminfo", "MemAvailable")


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:,.1f} GiB"
