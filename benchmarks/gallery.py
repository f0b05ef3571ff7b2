"""Neurons of a TopK model and of its Base twin, for docs/gallery.md.

    python -m benchmarks.gallery --topk runs/a runs/b --base runs/a-base runs/b-base --out NAME

Reads the statistics that `topklm neurons measure` wrote for each run; the first run of each kind is shown.
Writes benchmarks/results/NAME.json, the ten neurons that the tool puts first and what they are active at, and
how the entropies of all neurons are distributed, with intervals by bootstrap over documents, and the
differences from the TopK model of the same place in the list; and draws the distributions as
docs/images/NAME.svg. With --page, fills the tables of docs/gallery.md with the first neurons of both kinds.
"""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from benchmarks import bootstrap
from benchmarks.harness import pictures, results
from benchmarks.harness.pictures import COLOURS
from topklm.checkpoint import run_folder
from topklm.data.tokenizer import Tokenizer
from topklm.neurons import DICTIONARIES, FITTED, NeuronsFolder
from topklm.neurons.statistics import table
from topklm.neurons.statistics.table import readable_first
from topklm.neurons.store import Store

PAGE = results.ROOT / "docs" / "gallery.md"
# Of the page's neurons, given by us after reading their pages.
NAMES = {
    "1:159": "*of*",
    "1:94": "the first person: *I*, *my*",
    "2:63": "speech begins",
    "2:193": "not clean: hyphen, opening quotation mark, line break in verse",
    "2:241": "*be*, *been*, *being*; line break",
    "2:19": "a sentence or a chapter is over: `.`, `##`",
    "2:126": "degree: *more*, *very*, *most*, *less*",
    "1:188": "a condition begins: *if*, *when*, *how*; comma",
    "2:47": "not clean: *can*, *may*, *might*; line break, *The*",
    "2:137": "quotation mark before speech",
}
HEADS = (
    *("neuron", "name", "strongest input tokens, share of its activation", "density", "token entropy"),
    *("semantic entropy", "ablation effect", "strongest example"),
)
SHOWN = 10
EXAMPLES = 4
BEFORE, BEHIND = 10, 4  # tokens of an example's context
TOPK, BASE, KEPT = "TopK", "Base", "Base, k largest"
WRITTEN = {kind: f"Base, {DICTIONARIES[kind]}" for kind in FITTED}
COLOUR_OF = dict(zip((TOPK, BASE, KEPT, *WRITTEN.values()), (*COLOURS, "#e69f00", "#56b4e9"), strict=True))
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SHOWN_FIGURES = (
    "layer",
    "neuron",
    "density",
    "n_distinct_tokens",
    "token_entropy_corrected",
    "semantic_entropy_corrected",
    "monosemanticity",
    "monosemanticity_shuffled",
    "ablation_effect",
    "ablation_standard_error",
    "ablation_samples",
)
FIGURES = {
    "token_entropy_corrected": "token entropy, nats",
    "semantic_entropy_corrected": "semantic entropy, nats",
    "monosemanticity": "monosemanticity",
}


def main() -> None:
    """Reads the statistics, writes the JSON and the picture."""
    parser = results.parser(__doc__)
    parser.add_argument("--topk", type=pathlib.Path, nargs="+", required=True, help="run folders")
    parser.add_argument("--base", type=pathlib.Path, nargs="+", required=True, help="of their twins")
    parser.add_argument(
        "--kept", type=pathlib.Path, nargs="*", default=[], help="of the twins, harvested with --keep"
    )
    for kind in FITTED:
        parser.add_argument(
            f"--{kind}", type=pathlib.Path, nargs="*", default=[], help=f"harvested with --dictionary {kind}"
        )
    parser.add_argument("--draws", type=int, default=200, help="of documents; default %(default)s")
    parser.add_argument("--out", required=True, help="name of the JSON and of the picture")
    parser.add_argument("--page", action="store_true", help="fill the tables of docs/gallery.md")
    arguments = parser.parse_args()
    groups = {TOPK: arguments.topk, BASE: arguments.base, KEPT: arguments.kept}
    groups |= {name: getattr(arguments, kind) for kind, name in WRITTEN.items()}
    groups = {name: folders for name, folders in groups.items() if folders}
    runs = {kind: [_folder(run) for run in folders] for kind, folders in groups.items()}
    layers = table.read(runs[TOPK][0].table)[1].layers
    drawn = {
        kind: [bootstrap.draw(folder, layers, arguments.draws) for folder in folders]
        for kind, folders in runs.items()
    }
    result = {
        "rule": "topklm.neurons.statistics.table.readable_first",
        "runs": {kind: [_describe(folder) for folder in folders] for kind, folders in runs.items()},
        "bootstrap": {
            "draws": arguments.draws,
            "intervals": {
                kind: [bootstrap.of_run(run) for run in of_kind] for kind, of_kind in drawn.items()
            },
            "less_topk": {
                kind: [
                    bootstrap.of_difference(run, topk)
                    for run, topk in zip(of_kind, drawn[TOPK], strict=False)
                ]
                for kind, of_kind in drawn.items()
                if kind != TOPK
            },
        },
        "first": {kind: _first(folders[0]) for kind, folders in runs.items()},
    }
    results.save(results.FOLDER / f"{arguments.out}.json", result)
    rows = {kind: [table.read(folder.table)[0] for folder in folders] for kind, folders in runs.items()}
    draw(rows, results.IMAGES / f"{arguments.out}.svg")
    if arguments.page:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(results.fill(text, page_tables(result), PAGE.name), encoding="utf-8")


def page_tables(result: Mapping[str, Any]) -> dict[str, str]:
    """Returns the tables of the first neurons of TopK LM and Base LM, by their markers."""
    return {
        f"first {kind}": results.markdown(HEADS, [_row(one) for one in result["first"][kind]])
        for kind in (TOPK, BASE)
    }


def _row(neuron: Mapping[str, Any]) -> list[str]:
    number = f"{neuron['layer']}:{neuron['neuron']}"
    tokens = ", ".join(f"`{_visible(token)}` {share:.0%}" for token, share in neuron["top_tokens"][:5])
    before, at, after = (_visible(text, " ") for text in neuron["examples"][0])
    gap = at[: len(at) - len(at.lstrip(" "))]  # Markdown's bold begins with no space
    example = f"…{before[-30:]}{gap}**{at.strip(' ') or '␣'}**{after}"
    effect = f"{neuron['ablation_effect']:+.3f} ± {neuron['ablation_standard_error']:.3f}"
    entropies = (f"{neuron[name]:.2f}" for name in ("token_entropy_corrected", "semantic_entropy_corrected"))
    return [number, NAMES.get(number, ""), tokens, f"{neuron['density']:.2%}", *entropies, effect, example]


def _visible(text: str, space: str = "␣") -> str:
    """Writes spaces and line breaks as signs, and escapes what Markdown would read."""
    for sign, by in (("\r\n", "↵"), ("\n", "↵"), ("\r", "←"), (" ", space), ("|", "\\|"), ("*", "\\*")):
        text = text.replace(sign, by)
    return text


def _folder(run: pathlib.Path) -> NeuronsFolder:
    steps = [int(path.parent.name) for path in run.glob("neurons/*/neurons.parquet")]
    return NeuronsFolder(run, max(steps))


def _describe(folder: NeuronsFolder) -> dict[str, Any]:
    rows, measured = table.read(folder.table)
    layers = {}
    for layer in measured.layers:
        of_layer = rows.filter(pa.compute.equal(rows["layer"], layer))
        figures = ("density", "ablation_effect", *FIGURES)
        quantiles = {name: _quantiles(numbers(of_layer, name)) for name in figures}
        dead = int((numbers(of_layer, "n_active") == 0).sum())
        layers[layer] = {"dead": dead, "quantiles": quantiles}
    return {
        "kind": measured.kind,
        "step": measured.step,
        "source": measured.source,
        "n_tokens": measured.n_tokens,
        "n_documents": measured.n_documents,
        "n_clusters": measured.n_clusters,
        "details": dict(measured.details),
        "dictionary": measured.dictionary,
        "quantiles": QUANTILES,
        "layers": layers,
    }


def _quantiles(values: np.ndarray) -> list[float] | None:
    values = values[~np.isnan(values)]
    return np.quantile(values, QUANTILES).tolist() if len(values) else None


def _first(folder: NeuronsFolder) -> list[dict[str, Any]]:
    """Describes the neurons that the tool puts first; of one number in several layers, the first."""
    rows, _ = table.read(folder.table)
    tokenizer = Tokenizer.load(folder.run / run_folder.TOKENIZER_FILE)
    store = Store(folder.store)
    found: dict[int, dict[str, Any]] = {}
    for place in readable_first(rows):
        row = rows.slice(int(place), 1).to_pylist()[0]
        if row["neuron"] not in found:
            found[row["neuron"]] = _neuron(row, tokenizer, store)
        if len(found) == SHOWN:
            break
    return list(found.values())


def _neuron(row: Mapping[str, Any], tokenizer: Tokenizer, store: Store) -> dict[str, Any]:
    figures = {name: row[name] for name in SHOWN_FIGURES}
    shares = zip(tokenizer.token_strings(row["top_tokens"]), row["top_token_shares"], strict=True)
    examples, bounds = [], store.document_bounds()
    for at in row["examples"][:EXAMPLES]:
        begin, end = bounds[np.searchsorted(bounds, at, side="right") - [1, 0]].tolist()
        before = tokenizer.decode(store.tokens(max(begin, at - BEFORE), at))
        behind = tokenizer.decode(store.tokens(at + 1, min(end, at + 1 + BEHIND)))
        examples.append([before, tokenizer.decode(store.tokens(at, at + 1)), behind])
    return {
        **figures,
        "top_tokens": [[token, round(share, 4)] for token, share in shares],
        "jacobian_top": tokenizer.token_strings(row["jacobian_top"]),
        "examples": examples,
    }


def numbers(rows: pa.Table, name: str) -> np.ndarray:
    """Returns float64[n], NaN where there is none."""
    return rows[name].to_numpy().astype(np.float64)


def draw(rows: Mapping[str, Sequence[pa.Table]], path: pathlib.Path) -> None:
    """Draws distributions of figures over neurons, a panel for each figure and layer.

    Args:
        rows: Tables of several seeds, by kind of model.
        path: Of the picture.
    """
    layers = sorted(set(rows[TOPK][0]["layer"].to_pylist()))
    shape = (len(FIGURES), len(layers))
    figure, axes = pictures.panels(
        *shape, font_size=9, figsize=(9, 6.5), sharex="row", sharey=True, squeeze=False
    )
    for row, (across, (name, label)) in enumerate(zip(axes, FIGURES.items(), strict=True)):
        for panel, layer in zip(across, layers, strict=True):
            for kind, tables in rows.items():
                for seed, of_seed in enumerate(tables):
                    of_layer = of_seed.filter(pa.compute.equal(of_seed["layer"], layer))
                    values = np.sort(numbers(of_layer, name))
                    values = values[~np.isnan(values)]
                    shares = np.arange(1, len(values) + 1) / len(values)
                    style = {"color": COLOUR_OF[kind], "linestyle": ("-", "--")[seed % 2], "linewidth": 1.4}
                    named = None if seed else kind  # the second seed is dashed
                    panel.plot(values, shares, label=named, **style)
            panel.set_xlabel(label)
            panel.grid(alpha=0.25)
            if row == 0:
                panel.set_title(f"layer {layer}", fontsize=10)
        across[0].set_ylabel("share of neurons below")
    lines, kinds = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, kinds, loc="lower center", ncols=6, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    pictures.save(figure, path)


if __name__ == "__main__":
    main()
