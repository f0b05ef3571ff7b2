"""`topklm bench step`: the train step of a shape or a config: tokens/s, MFU, compile time, peak memory.

TopK, the same model as Base LM, and with --peer=torch Hugging Face's Llama with TopK hooks, each in a process
of its own, in turns. The floor is that of `roofline`: the step's matrix products and traffic at the measured
rates of this machine. --explain compiles each part alone: work of XLA across parts, and remat, which
computes again, show as the difference between their sum and the whole step.
"""

import argparse
from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
from pathlib import Path
import tempfile

from benchmarks import peers
from benchmarks.harness import roofline, timing
from benchmarks.harness.report import Comparison, Report, Result
from benchmarks.harness.shapes import SHAPES, base, named, with_model
from benchmarks.harness.timing import Samples
from benchmarks.harness.worker import Worker, WorkerError, call
from topklm.compile_check.check import with_vocabulary
from topklm.config import DTYPES, Config
from topklm.errors import UserError
from topklm.training.throughput import flops_per_token

DESCRIPTION = (
    "Times the train step of a named shape, or of any --config, on random tokens: as TopK model, as Base LM, "
    "and with --peer=torch in PyTorch. --explain shows where its time goes."
)
EXAMPLE = "topklm bench step --shape=s1 --dtype=float32 --peer=torch --json=step.json"
TOPK, BASE, EAGER, COMPILED = "TopK", "Base", "torch eager", "torch.compile"

_SECONDS_PER_SAMPLE = 1.0
_SECONDS_OF_A_PART = 0.2
_BAR_WIDTH = 12  # of all of the step
_WHOLE = "step"
# On CPUs: tokens/s against the peer.
_CPU_TARGETS = {("s1", "float32"): 1.7, ("s2", "float32"): 1.8, ("s1", "bfloat16"): 1.15}
_CPU_TARGETS |= {("s2", "bfloat16"): 1.15}
_GPU_TARGET = 1.15
_TOPK_OVER_BASE = {"cpu": 1.03, "gpu": 1.02}


@dataclasses.dataclass(frozen=True)
class Case:
    """A train step."""

    shape: str
    config: Config  # with its vocabulary

    @property
    def name(self) -> str:
        """As in the tables."""
        return f"{self.shape} {self.config.model.dtype}"


@dataclasses.dataclass(frozen=True)
class _Machine:
    rates: roofline.Rates
    peak_flops_per_second: float  # MFU is a share of it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares flags of its own."""
    names = ",".join(SHAPES)
    parser.add_argument("--shape", metavar="NAME,...", help=f"without --config; default {names}")
    parser.add_argument("--dtype", choices=DTYPES, help="default: both; of a --config, its own")
    parser.add_argument(
        "--explain", action="store_true", help="show where the time of the step goes, by part"
    )


def run(arguments: argparse.Namespace, config: Config | None) -> Report:
    """Measures; see the module's description.

    Raises:
        UserError: For an unknown shape, a shape and a config, a config that the devices cannot split, or a
            peer that is not installed.
    """
    if arguments.peer:
        peers.require(arguments.peer)
    if arguments.peer and arguments.explain:
        raise UserError("--explain: shows our own step by part; leave --peer away")
    parts = []
    for case in _cases(arguments, config):
        if arguments.explain:
            parts.append(_explain(case.name, case.config, arguments.repeats))
        else:
            parts.append(_measure(case, arguments))
    return Report(
        "step",
        {"peer": arguments.peer, "cases": {k: v for part in parts for k, v in part.settings.items()}},
        [result for part in parts for result in part.results],
        [comparison for part in parts for comparison in part.comparisons],
        [note for part in parts for note in part.notes],
    )


def _cases(arguments: argparse.Namespace, config: Config | None) -> list[Case]:
    if config is not None and arguments.shape:
        raise UserError(f"--shape = {arguments.shape}: give a shape or a --config, not both")
    if config is not None:
        shapes = {"config": with_vocabulary(config)}
        dtypes = [arguments.dtype or config.model.dtype]
    else:
        shapes = named(arguments.shape or ",".join(SHAPES))
        dtypes = [arguments.dtype] if arguments.dtype else list(DTYPES)
    return [
        Case(name, with_model(config, dtype=dtype)) for name, config in shapes.items() for dtype in dtypes
    ]


def _measure(case: Case, arguments: argparse.Namespace) -> Report:
    notes: list[str] = []
    ours = _ours(case)
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(worker) for name, worker in _our_workers(case)}
        if arguments.peer:
            if workers[ours].facts["devices"] > 1:
                raise UserError("--peer = torch: runs on one device; make one visible, or leave it away")
            workers |= {name: stack.enter_context(w) for name, w in _peer_workers(case, notes)}
        rates = roofline.measure_rates(case.config.model.dtype, arguments.repeats)
        subjects = {name: worker.subjects()["step"] for name, worker in workers.items()}
        found = timing.alternate(subjects, arguments.repeats, at_least=_SECONDS_PER_SAMPLE, label=case.name)
        peaks = {name: worker.peak_bytes() for name, worker in workers.items()}
        facts = {name: worker.facts for name, worker in workers.items()}
    losses = ", ".join(f"{name} {fact['first_loss']:.5f}" for name, fact in facts.items())
    notes.append(f"{case.name}: loss of the first step, nats per token: {losses}")
    mine = facts[ours]
    # MFU of an accelerator is against its data sheet, as everybody has it; of a CPU against this run's rate.
    peak_flops = rates.flops_per_second if mine["platform"] == "cpu" else mine["peak_flops_per_second"]
    machine = _Machine(rates, peak_flops)
    settings = {
        "config": case.config.to_dict(),
        "allocator": mine["allocator"],
        "platform": mine["platform"],
        **dataclasses.asdict(machine),
    }
    results = [
        result
        for name in found
        for result in _results(case, name, found[name], peaks[name], facts[name]["compile_seconds"], machine)
    ]
    comparisons = [*_comparisons(case, mine["platform"], found, peaks)]
    return Report("step", {case.name: settings}, results, comparisons, notes)


def _ours(case: Case) -> str:
    """Names the subject that is the config itself."""
    return TOPK if case.config.model.n_topk_layers else BASE


def _our_workers(case: Case) -> Iterator[tuple[str, Worker]]:
    """Starts the config's own worker first; a Base LM has no twin."""
    module = "benchmarks.subjects.train_step"
    if case.config.model.n_topk_layers:
        yield TOPK, Worker(module, {"config": case.config.to_dict()})
    yield BASE, Worker(module, {"config": base(case.config).to_dict()})


def _peer_workers(case: Case, notes: list[str]) -> Iterator[tuple[str, Worker]]:
    """Starts workers from our first weights. Where `torch.compile` fails, eager stands alone."""
    with tempfile.TemporaryDirectory() as folder:
        spec = {"config": case.config.to_dict(), "weights": str(Path(folder) / "weights.npz")}
        call("benchmarks.peers.llama:write_weights", spec["config"], spec["weights"])
        yield EAGER, Worker("benchmarks.peers.torch_step", {**spec, "compile": False})
        try:
            compiled = Worker("benchmarks.peers.torch_step", {**spec, "compile": True})
        except WorkerError as e:
            notes.append(f"{case.name}: without torch.compile, which failed: {str(e).splitlines()[-1]}")
        else:
            yield COMPILED, compiled


def _results(
    case: Case, name: str, samples: Samples, peak_bytes: int, compile_seconds: float, machine: _Machine
) -> Iterator[Result]:
    config = base(case.config) if name == BASE else case.config
    floor = roofline.step_seconds(roofline.parts_of_step(config), machine.rates)
    rate = config.train.batch_size * config.model.context_length / samples.median
    mfu = rate * flops_per_token(config.model) / machine.peak_flops_per_second
    # Above 1 the peak, a rate measured in another moment, is not that of the machine.
    shown = f"{mfu:.1%}" if mfu <= 1 else "?"
    note = f"{rate:,.0f} tokens/s, MFU {shown}, compiled in {compile_seconds:.1f} s"
    side = {"shape": case.shape, "dtype": config.model.dtype, "side": name}
    facts = {**side, "tokens_per_second": rate, "mfu": mfu, "compile_seconds": compile_seconds}
    yield Result(f"{case.name}: step, {name}", "s", samples.seconds, floor, facts, note)
    yield Result(f"{case.name}: peak memory, {name}", "bytes", (float(peak_bytes),), facts=side)


def _comparisons(
    case: Case, platform: str, found: Mapping[str, Samples], peaks: Mapping[str, int]
) -> Iterator[Comparison]:
    ours = _ours(case)
    if ours == TOPK:
        slowdown = found[BASE].speedup_over(found[TOPK])
        target = _TOPK_OVER_BASE.get(platform)
        yield Comparison(f"{case.name}: step, TopK / Base", slowdown, at_most=target)
    torch = [name for name in (EAGER, COMPILED) if name in found]
    if torch:
        better = min(torch, key=lambda name: found[name].median)
        target = _GPU_TARGET
        if platform == "cpu":
            target = _CPU_TARGETS.get((case.shape, case.config.model.dtype))
        speedup = found[ours].speedup_over(found[better])
        yield Comparison(f"{case.name}: tokens/s, {ours} / {better}", speedup, at_least=target)
        memory = peaks[ours] / peaks[better]
        yield Comparison(f"{case.name}: peak memory, {ours} / {better}", (memory,), at_most=1.0)


def _explain(name: str, config: Config, repeats: int) -> Report:
    """Measures the parts of a step in turns with the whole.

    Args:
        name: Of the case.
        config: The train step, with its vocabulary.
        repeats: Samples of each part.

    Raises:
        UserError: On several devices.
    """
    spec = {"config": config.to_dict()}
    with (
        Worker("benchmarks.subjects.train_step", spec) as whole,
        Worker("benchmarks.subjects.parts", spec) as pieces,
    ):
        rates = roofline.measure_rates(config.model.dtype, repeats)
        subjects = {**whole.subjects(), **pieces.subjects()}
        found = timing.alternate(subjects, repeats, at_least=_SECONDS_OF_A_PART, label=f"{name} by part")
        facts = whole.facts
    parts = [part for part in roofline.parts_of_step(config) if part.name in found]
    layers = {part.name: _layers(config, part.name) for part in parts}
    step = found.pop(_WHOLE)
    results = [
        _part_result(name, part, found[part.name], layers[part.name], step.median, rates) for part in parts
    ]
    sums = [sum(found[part].seconds[i] * layers[part] for part in found) for i in range(repeats)]
    floor = roofline.step_seconds(parts, rates)
    results.append(Result(f"{name}: sum of the parts", "s", tuple(sums), floor, {"part": "sum"}))
    results.append(Result(f"{name}: whole step", "s", step.seconds, floor, {"part": "whole"}))
    comparison = Comparison(f"{name}: sum of the parts / whole step", step.speedup_over(Samples(tuple(sums))))
    settings = {"config": config.to_dict(), "allocator": facts["allocator"], "platform": facts["platform"]}
    settings["rates"] = dataclasses.asdict(rates)
    return Report("step", {name: settings}, results, [comparison])


def _layers(config: Config, part: str) -> int:
    """Counts how often a step has the part that was measured."""
    model = config.model
    return {"attention": model.n_layers, "MLP": model.n_layers, "TopK": model.n_topk_layers}.get(part, 1)


def _part_result(
    name: str, part: roofline.Part, samples: Samples, layers: int, whole: float, rates: roofline.Rates
) -> Result:
    seconds = tuple(layers * s for s in samples.seconds)
    share = layers * samples.median / whole
    note = f"{share:.1%} of it {'█' * round(share * _BAR_WIDTH)}"
    facts = {
        "part": part.name,
        "layers": layers,
        "share_of_step": share,
        "flops": part.flops,
        "bytes": part.bytes,
    }
    return Result(f"{name}: {part.name}", "s", seconds, part.seconds(rates) or None, facts, note)
