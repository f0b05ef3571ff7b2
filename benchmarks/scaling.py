"""Weak scaling on paper: compiles the recipes of configs/paper.py for TPU slices.

    python -m benchmarks.scaling

No TPU is needed, only libtpu. A compilation takes minutes, all of them most of an hour. Checks whose config
and versions are those of the results are not run again. The table of recipes in docs/scaling.md and all of
benchmarks/results/scaling.md are written from the results; `--render` does nothing else.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import importlib.metadata
import json
import math
import subprocess
import sys
from typing import Any

import jax

from benchmarks.harness import results
from configs import paper
from topklm.compile_check.check import GIB, Chip, Report, as_text, from_dict, with_vocabulary
from topklm.compile_check.cost import KINDS
from topklm.config import Config, resolve
from topklm.storage.files import write_atomically

RESULT = results.FOLDER / "scaling.json"
DOCUMENT = results.ROOT / "docs" / "scaling.md"
TABLES = results.FOLDER / "scaling.md"
VERSIONS = ("jax", "jaxlib", "libtpu")


@dataclasses.dataclass(frozen=True)
class Check:
    """One recipe on one topology."""

    recipe: str
    topology: str
    n_slices: int = 1
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Its key in the results."""
        slices = f"{self.n_slices} x " if self.n_slices > 1 else ""
        settings = "".join(f" {name}={value}" for name, value in self.settings)
        return f"{self.recipe} on {slices}{self.topology}{settings}"

    def config(self) -> Config:
        """Resolves it as the trainer would."""
        raw = paper.get_config(self.recipe)
        raw.update_from_flattened_dict(dict(self.settings))
        return with_vocabulary(resolve(raw))

    def run(self) -> dict[str, Any]:
        """Compiles it in a process of its own."""
        command = [sys.executable, "-m", "topklm", "compile-check", "--json"]
        command += [f"--config=configs/paper.py:{self.recipe}", f"--topology={self.topology}"]
        command += [f"--slices={self.n_slices}"]
        command += [f"--config.{name}={value}" for name, value in self.settings]
        done = subprocess.run(command, cwd=results.ROOT, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout)


RECIPES = [
    Check(f"{size}{twin}", topology) for size, topology in paper.TOPOLOGIES.items() for twin in ("", "-base")
]
# Other choices for one recipe. TopK communicates nothing, so the twin, which compiles faster, will do.
CHOICES = [
    Check("1.4b-base", "v5e:16x16", settings=(("mesh.fsdp", 256),)),
    Check("1.4b-base", "v5e:16x16", settings=(("mesh.tensor", 4),)),
    Check("1.4b-base", "v5e:16x16", 2, settings=(("train.batch_size", 2048),)),
    Check("1.4b-base", "v5e:16x16", settings=(("model.remat", "minimal"),)),
]


def main() -> None:
    """Runs what is missing, saving after each, and renders the document."""
    parser = results.parser(__doc__)
    parser.add_argument("--render", action="store_true", help="only write docs/scaling.md from the results")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    content: dict[str, Any] = results.read(RESULT) if RESULT.exists() else {"checks": {}}
    if not arguments.render:
        versions = {name: importlib.metadata.version(name) for name in VERSIONS}
        old = content["checks"]
        content = {"machine": results.describe_machine(), "versions": versions, "checks": {}}
        for check in (*RECIPES, *CHOICES):
            print(check.name, flush=True)
            key = {"config": check.config().to_dict(), "versions": versions}
            done = old.get(check.name, {})
            fresh = {name: done.get(name) for name in key} == key
            content["checks"][check.name] = done if fresh else {**key, "report": check.run()}
            results.save(RESULT, content)
    write_atomically(DOCUMENT, render(DOCUMENT.read_text(encoding="utf-8"), content["checks"]).encode())
    write_atomically(TABLES, tables(content["checks"]).encode())


def render(document: str, checks: Mapping[str, Any]) -> str:
    """Fills the table of recipes in the document in."""
    recipes = _table_of_recipes(_with_reports(RECIPES, checks))
    return results.fill(document, {"recipes": recipes}, DOCUMENT.name)


def tables(checks: Mapping[str, Any]) -> str:
    """Renders all other tables, and every report as it is printed."""
    recipes, choices = (_with_reports(some, checks) for some in (RECIPES, CHOICES))
    twins = [(check, report) for check, report in recipes if check.recipe.endswith("-base")]
    parts = {
        "Bytes that a device sends in a step: the formulas beside the compiler": _table_of_bytes(
            [*twins, *choices]
        ),
        "Tokens a chip and step, below which communication is the limit": _table_of_bounds(
            [*twins, *choices]
        ),
        "The 1.4B recipe, and other choices": _table_of_recipes([twins[2], *choices]),
        "As printed": "\n".join(f"```\n{as_text(report)}```\n" for _, report in (*recipes, *choices)),
    }
    text = "\n\n".join(f"## {title}\n\n{part}" for title, part in parts.items())
    return f"# scaling.json\n\nWritten by `python -m benchmarks.scaling`.\n\n{text}\n"


def _with_reports(checks: Iterable[Check], found: Mapping[str, Any]) -> list[tuple[Check, Report]]:
    return [(check, from_dict(found[check.name]["report"])) for check in checks]


def _table_of_recipes(checks: Iterable[tuple[Check, Report]]) -> str:
    columns = ["", "slice", "mesh", "parameters", "tokens a step", "of a chip", "memory, GiB", "of"]
    columns += ["compiled / model FLOPs", "products, ms", "memory traffic, ms", "communication, ms", "share"]
    rows = []
    for check, report in checks:
        chip = _chip(report)
        row = [_title(check), _slice(report), _mesh(report), f"{report.parameters / 1e6:,.0f} M"]
        row += [f"{report.tokens_per_device * math.prod(report.mesh.values()):,.0f}"]
        row += [
            f"{report.tokens_per_device:,.0f}",
            f"{report.memory.total / GIB:.2f}",
            f"{chip.hbm_bytes / GIB:.2f}",
        ]
        row += [f"{report.compiled_flops / report.model_flops:.2f}", _ms(report.compute_seconds)]
        row += [
            _ms(report.hbm_seconds),
            _ms(report.communication_seconds),
            f"{report.communication_share:.0%}",
        ]
        rows.append(row)
    return results.markdown(columns, rows)


def _table_of_bytes(checks: Iterable[tuple[Check, Report]]) -> str:
    """Lists the MB that a device sends in a step, by the formulas of the text and as compiled."""
    columns = ["", "slice", "mesh"]
    for what in ("fsdp gathers", "fsdp sums", "data sums", "between slices"):
        columns += [f"{what}: formula", "compiled"]
    rows = []
    for check, report in checks:
        formulas = predicted_bytes(check.config(), report.mesh, report.n_slices)
        compiled = (
            _sent(report, "fsdp", ("all-gather",)),
            _sent(report, "fsdp", ("reduce-scatter", "all-reduce")),
            _sent(report, "data", KINDS),
            _sent(report, "data", KINDS, across_slices=True),
        )
        pairs = [_mb(n) for pair in zip(formulas, compiled, strict=True) for n in pair]
        rows.append([_title(check), _slice(report), _mesh(report), *pairs])
    return results.markdown(columns, rows)


def _table_of_bounds(checks: Iterable[tuple[Check, Report]]) -> str:
    """Lists the tokens of a chip and step below which communication takes longer than the products."""
    columns = ["", "slice", "mesh", "peak / bandwidth along fsdp", "bound below, tokens", "now, tokens"]
    rows = []
    for check, report in checks:
        bandwidth = _fsdp_bandwidth(report)
        ratio = f"{_chip(report).flops_per_second / bandwidth:,.0f}" if bandwidth else ""
        bound = "always" if math.isinf(report.critical_tokens) else f"{report.critical_tokens:,.0f}"
        now = f"{report.tokens_per_device:,.0f}"
        rows.append([_title(check), _slice(report), _mesh(report), ratio, bound, now])
    return results.markdown(columns, rows)


def predicted_bytes(config: Config, mesh: Mapping[str, int], n_slices: int) -> tuple[float, ...]:
    """Computes the bytes that a device sends in a step, from the sizes alone.

    Returns:
        Bytes to gather parameters along fsdp (bfloat16, blocks twice), to sum and scatter gradients along
        fsdp (float32), to sum what is left of them along data inside a slice, and to sum that between slices.
    """
    blocks, vocabulary = (n / mesh["tensor"] for n in _matrices(config))
    within = mesh["data"] // n_slices
    gradients = 4 * (blocks + vocabulary)
    part = gradients / mesh["fsdp"]
    return (
        _share(mesh["fsdp"]) * 2 * (2 * blocks + vocabulary) * config.train.grad_accumulation,
        _share(mesh["fsdp"]) * gradients * config.train.grad_accumulation,
        2 * _share(within) * part,
        2 * _share(n_slices) * part / within,
    )


def _share(n: int) -> float:
    """Computes the share of an array that a device sends to gather or scatter it over a ring of n."""
    return (n - 1) / n


def _matrices(config: Config) -> tuple[int, int]:
    """Counts the parameters of all blocks, and of embedding and unembedding, without norms."""
    m = config.model
    attention = 2 * m.d_model * m.head_width * (m.n_heads + m.n_kv_heads)
    return m.n_layers * (attention + 3 * m.d_model * m.d_mlp), 2 * m.padded_vocab_size * m.d_model


def _sent(report: Report, axis: str, kinds: Iterable[str], across_slices: bool = False) -> float:
    rows = (row for row in report.traffic if row.axes == (axis,) and row.across_slices == across_slices)
    return sum(row.bytes_sent for row in rows if row.kind in kinds)


def _fsdp_bandwidth(report: Report) -> float:
    """Computes the bytes per second at which parameters are gathered; 0 where they are not."""
    rows = [row for row in report.traffic if row.kind == "all-gather" and row.axes == ("fsdp",)]
    return sum(row.bytes_sent for row in rows) / (sum(row.seconds for row in rows) or 1.0)


def _chip(report: Report) -> Chip:
    if report.chip is None:
        raise ValueError(f"{report.topology}: no TPU")
    return report.chip


def _title(check: Check) -> str:
    return f"`{check.recipe}`" + "".join(f", {name} {value}" for name, value in check.settings)


def _slice(report: Report) -> str:
    return f"{report.n_slices} x {report.topology}" if report.n_slices > 1 else report.topology


def _mesh(report: Report) -> str:
    return " ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}"


def _mb(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:,.0f}"


if __name__ == "__main__":
    main()
