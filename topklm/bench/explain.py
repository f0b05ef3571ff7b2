"""`topklm bench step --explain`: where the time of a train step goes, part by part, beside each part's floor.

A part is compiled alone. What XLA does across parts, and what remat computes again, shows as the difference
between their sum and the whole step.
"""

import dataclasses

from topklm.bench import floors, timing
from topklm.bench.processes import Worker
from topklm.bench.report import Comparison, Report, Result
from topklm.bench.timing import Samples
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
        Worker("topklm.bench.sides.train_step", spec) as whole,
        Worker("topklm.bench.sides.parts", spec) as pieces,
    ):
        rates = floors.measure_rates(config.model.dtype, repeats)
        sides = {**whole.sides(), **pieces.sides()}
        found = timing.alternate(sides, repeats, at_least=_SECONDS_PER_SAMPLE, label=f"{name} by part")
        facts = whole.facts
    parts = [part for part in floors.parts_of_step(config) if part.name in found]
    layers = {part.name: _layers(config, part.name) for part in parts}
    step = found.pop(_WHOLE)
    results = [_part(name, part, found[part.name], layers[part.name], step.median, rates) for part in parts]
    sums = [sum(found[part].seconds[i] * layers[part] for part in found) for i in range(repeats)]
    floor = floors.step_seconds(parts, rates)
    results.append(Result(f"{name}: sum of the parts", "s", tuple(sums), floor, {"part": "sum"}))
    results.append(Result(f"{name}: whole step", "s", step.seconds, floor, {"part": "whole"}))
    comparison = Comparison(f"{name}: sum of the parts / whole step", step.speedup_over(Samples(tuple(sums))))
    settings = {"config": config.to_dict(), "allocator": facts["allocator"], "platform": facts["platform"]}
    settings["rates"] = dataclasses.asdict(rates)
    return Report("step", {name: settings}, results, [comparison])


def _layers(config: Config, part: str) -> int:
    """How often the step has what was measured."""
    model = config.model
    return {"attention": model.n_layers, "MLP": model.n_layers, "TopK": model.n_topk_layers}.get(part, 1)


def _part(
    name: str, part: floors.Part, samples: Samples, layers: int, whole: float, rates: floors.Rates
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
