"""`topklm bench step --explain`: where the time of a train step goes, part by part, beside each part's floor.

A part is compiled alone. Work of XLA across parts, and remat, which computes again, show as the difference
between their sum and the whole step.
"""

import dataclasses

from benchmarks.harness import roofline, timing
from benchmarks.harness.report import Comparison, Report, Result
from benchmarks.harness.timing import Samples
from benchmarks.harness.worker import Worker
from topklm.config import Config

_SECONDS_PER_SAMPLE = 0.2
_BAR_WIDTH = 30
_WHOLE = "step"


def explain(name: str, config: Config, repeats: int) -> Report:
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
        found = timing.alternate(subjects, repeats, at_least=_SECONDS_PER_SAMPLE, label=f"{name} by part")
        facts = whole.facts
    parts = [part for part in roofline.parts_of_step(config) if part.name in found]
    layers = {part.name: _layers(config, part.name) for part in parts}
    step = found.pop(_WHOLE)
    results = [_part(name, part, found[part.name], layers[part.name], step.median, rates) for part in parts]
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


def _part(
    name: str, part: roofline.Part, samples: Samples, layers: int, whole: float, rates: roofline.Rates
) -> Result:
    seconds = tuple(layers * s for s in samples.seconds)
    share = layers * samples.median / whole
    note = f"{'█' * round(share * _BAR_WIDTH)} {share:.1%} of the step"
    facts = {
        "part": part.name,
        "layers": layers,
        "share_of_step": share,
        "flops": part.flops,
        "bytes": part.bytes,
    }
    return Result(f"{name}: {part.name}", "s", seconds, part.seconds(rates) or None, facts, note)
