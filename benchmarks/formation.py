r"""Tables and picture of docs/formation.md, from traces of several runs.

    python -m benchmarks.formation --topk runs/small-seed{0,1,2} --base runs/small-base-seed{0,1,2} \
        --wsd runs/small-wsd-seed{0,1} --base-wsd runs/small-base-wsd-seed{0,1} --facts facts-seed{0,1,2}.json

Reads every trace that `topklm trace run` left in these runs, of Base LMs those of all dictionaries, and facts
of TopK LMs (`topklm trace facts runs/small-seed0 --steps log --json FILE`). Writes
benchmarks/results/formation.json (each run's curves), docs/images/formation.svg, and the tables between the
markers of the page: means over the seeds, with the least and the largest. With --books, those of other runs
beside them: formation-books.json, formation-books.svg, and the tables whose markers begin with books.
"""

from collections.abc import Mapping, Sequence
import itertools
import pathlib
from typing import Any

import numpy as np

from benchmarks.harness import pictures, results
from benchmarks.harness.pictures import COLOURS
from topklm.neurons.store import Store
from topklm.trace import summary, tables
from topklm.trace.read import CHAINED, COORDINATES, FRESH, SAME
from topklm.trace.summary import CARRIED, WRITTEN, Summary

PAGE = results.ROOT / "docs" / "formation.md"
OUT, BOOKS_OUT = results.FOLDER / "formation.json", results.FOLDER / "formation-books.json"
PICTURE, BOOKS_PICTURE = results.IMAGES / "formation.svg", results.IMAGES / "formation-books.svg"

TOPK, WSD = "TopK", "TopK, WSD"
BASE, BASE_WSD = "Base, coordinates", "Base, coordinates, WSD"
SAES = {FRESH: "SAE, fresh seeds", SAME: "SAE, same seed", CHAINED: "SAE, chained"}
WAVE = 64, 256  # onsets after the first and up to the second step
COMMON = 10  # tokens of the text that are the commonest

# Medians over the neurons of all layers.
_OVER_LAYERS = (
    *("r_reference", "r_other", "r_shifted", "r_matched", "r_previous", "jaccard_reference"),
    *("token_entropy", "semantic_entropy", "by_token", "by_context", "lens_reference"),
)
# Of the tables, where they are traced.
_STEPS = (0, 16, 32, 64, 128, 181, 362, 724, 1300)
_STEPS_OF_BOOKS = (0, 16, 64, 128, 256, 724, 1448, 2896, 5793, 9800)


def main() -> None:
    """Reads the traces, and writes JSON, picture and page."""
    parser = results.parser(__doc__)
    for kind in ("topk", "base", "wsd", "base-wsd"):
        parser.add_argument(f"--{kind}", type=pathlib.Path, nargs="+", default=[], help="run folders")
    parser.add_argument("--facts", type=pathlib.Path, nargs="+", default=[], help="results of TopK LMs")
    parser.add_argument("--books", action="store_true", help="the runs are of books")
    arguments = parser.parse_args()
    groups: dict[str, list[Summary]] = {
        TOPK: [_open(run, "") for run in arguments.topk],
        WSD: [_open(run, "") for run in arguments.wsd],
    }
    for name, title in {COORDINATES: BASE, **SAES}.items():
        traced = [run for run in arguments.base if tables.name_of(name) in tables.names(run)]
        groups[title] = [_open(run, name) for run in traced]
    groups[BASE_WSD] = [_open(run, COORDINATES) for run in arguments.base_wsd]
    found = {name: [figures(one) for one in group] for name, group in groups.items() if group}
    pairs = list(itertools.combinations(groups[TOPK], 2))
    result = {
        "settings": tables.as_facts(groups[TOPK][0].settings),
        "groups": found,
        "facts": [results.read(path) for path in arguments.facts],
        "seeds": [{"runs": [one.name, other.name], "layers": _matched(one, other)} for one, other in pairs],
    }
    results.write(BOOKS_OUT if arguments.books else OUT, result, shown={})
    draw(found, BOOKS_PICTURE if arguments.books else PICTURE)
    parts = tables_of_books(result) if arguments.books else page_tables(result)
    page = results.fill(PAGE.read_text(encoding="utf-8"), parts, PAGE.name)
    PAGE.write_text(page, encoding="utf-8")


def _open(run: pathlib.Path, dictionary: str) -> Summary:
    return Summary(tables.TraceFolder(run, tables.name_of(dictionary)))


def _matched(one: Summary, other: Summary) -> list[dict[str, Any]]:
    steps = summary.shared_steps(one.folder, other.folder)[-1]
    return summary.against(one.folder, other.folder, steps)


def figures(trace: Summary) -> dict[str, Any]:
    """Returns the figures of one trace, lists over its steps, NaN as None."""
    layers = trace.settings.layers
    of_layers = {layer: trace.of_layer(layer) for layer in layers}
    curves = {name: trace.over_layers(name) for name in _OVER_LAYERS}
    n = [int(trace.living[layer].sum()) for layer in layers]
    best = [of_layers[layer][summary.SHARE_BEST] * count for layer, count in zip(layers, n, strict=True)]
    curves["same_is_best"] = np.sum(best, axis=0) / sum(n)
    curves |= strongest(trace)
    onsets = {name: _onsets(trace, name) for name in ("onset_50", "onset_90")}
    pairs = {
        f"{a}-{b}": {name: _list(x) for name, x in trace.of_pair(a, b).items()} for a, b in trace.pairs()
    }
    return {
        "run": trace.name,
        "steps": trace.steps,
        "living": n,
        "values": {name: _list(x) for name, x in trace.values().items()},
        "curves": {name: _list(x) for name, x in curves.items()},
        "layers": {layer: {k: _list(x) for k, x in of.items()} for layer, of in of_layers.items()},
        "pairs": pairs,
        "onsets": onsets,
    }


def strongest(trace: Summary) -> dict[str, np.ndarray]:
    """Returns figures of the strongest tokens of living neurons, float64[C].

    `common`: the share of neurons whose first is one of the text's commonest; `first_3`: the share of its
    activation that a neuron has at its first three, the median.
    """
    store = Store(trace.folder.store(trace.settings.reference))
    tokens = np.asarray(store.tokens(0, trace.settings.n_tokens))
    commonest = np.argsort(-np.bincount(tokens), kind="stable")[:COMMON]
    rows = trace.folder.read("neurons", ["layer", "top_tokens", "top_token_shares"])
    alive = np.concatenate([trace.living[layer] for layer in trace.settings.layers])
    first = np.array([ids[0] if ids else -1 for ids in rows["top_tokens"].to_pylist()])
    shares = np.array([sum((of or [0.0])[:3]) for of in rows["top_token_shares"].to_pylist()])
    shape = len(trace.steps), -1
    return {
        "common": np.isin(first.reshape(shape)[:, alive], commonest).mean(axis=1),
        "first_3": np.median(shares.reshape(shape)[:, alive], axis=1),
    }


def _onsets(trace: Summary, name: str) -> dict[str, Any]:
    steps = np.concatenate([trace.onsets(layer, name) for layer in trace.settings.layers])
    early = [steps <= step for step in trace.steps]
    return {
        "median": float(np.nanmedian(np.where(np.isnan(steps), np.inf, steps))),
        "in_wave": float(((steps > WAVE[0]) & (steps <= WAVE[1])).mean()),
        "never": float(np.isnan(steps).mean()),
        "formed": [float(at.mean()) for at in early],  # share with an onset at or before each step
    }


def _list(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(x) else round(float(x), 5) for x in values]


# Tables.


def tables_of_books(result: Mapping[str, Any]) -> dict[str, str]:
    """Returns those tables that one TopK LM and its twin fill, by their markers."""
    made = page_tables(result, _STEPS_OF_BOOKS)
    return {f"books {name}": made[name] for name in ("identity", "model", "onsets", "flows")}


def page_tables(result: Mapping[str, Any], chosen: Sequence[int] = _STEPS) -> dict[str, str]:
    """Returns the tables of the page by their markers, at those of the chosen steps that were traced."""
    groups = result["groups"]
    steps = [step for step in chosen if step in groups[TOPK][0]["steps"]]

    def row(title: str, group: str, *path: Any, digits: int = 2) -> list[str]:
        return [title, *(spread(groups[group], path, step, digits) for step in steps)]

    heads = ["", *(f"{step:,}" for step in steps)]
    identity = [row(f"{TOPK}: r, same index", TOPK, "curves", "r_reference")]
    identity += [row("null: best other index", TOPK, "curves", "r_other")]
    identity += [row("same index is the best of all", TOPK, "curves", "same_is_best")]
    identity += [row("Jaccard, active tokens", TOPK, "curves", "jaccard_reference")]
    for name in (WSD, BASE, BASE_WSD, *SAES.values()):
        if name in groups:
            identity.append(row(f"{name}: r, same index", name, "curves", "r_reference"))
    for name in SAES.values():
        if name in groups:
            identity.append(row(f"{name}: one-to-one match", name, "curves", "r_matched"))
    model = [row("loss, nats", TOPK, "values", "loss")]
    for name, title in (
        ("kl_unigram", "KL to unigrams, nats"),
        ("kl_bigram", "KL to bigrams, nats"),
        ("uas", "UAS, best head of each relation"),
        ("uas_distance", "UAS, best fixed distance"),
        ("blimp", "BLiMP"),
        ("copy_gain", "gain by copying, nats"),
        ("prefix_matching", "prefix matching, best head"),
    ):
        if name in groups[TOPK][0]["values"]:
            model.append(row(title, TOPK, "values", name))
    for name, title in (
        ("token_entropy", "token entropy, nats"),
        ("semantic_entropy", "semantic entropy, nats"),
        ("by_token", "explained by the token"),
        ("by_context", "explained by the token before"),
        ("r_previous", "r to the step before"),
        ("common", "strongest token is one of the 10 commonest"),
        ("first_3", "share at the three strongest tokens"),
    ):
        model.append(row(title, TOPK, "curves", name))
    flows = []
    for group in (TOPK, BASE):
        if group not in groups:
            continue
        layers = groups[group][0]["layers"]
        for layer in layers:
            if CARRIED in layers[layer]:
                flows.append(row(f"{group}, layer {layer}: carried", group, "layers", layer, CARRIED))
        for pair, at in groups[group][0]["pairs"].items():
            if WRITTEN in at and not pair.startswith("-1"):  # neighbours
                flows.append(row(f"{group}, layers {pair}: r", group, "pairs", pair, "r"))
                upper = pair.rpartition("-")[2]
                flows.append(row(f"{group}, layer {upper}: r written", group, "pairs", pair, WRITTEN))
    onset_heads = ["", "r .5: median step", f"in {WAVE[0]} to {WAVE[1]}", "r .9: median step", "never"]
    onsets = []
    for name, group in groups.items():
        cells = []
        for level, keys in (("onset_50", ("median", "in_wave")), ("onset_90", ("median", "never"))):
            for key in keys:
                values = [one["onsets"][level][key] for one in group]
                cells.append(_spread(values, 0 if key == "median" else 2))
        onsets.append([name, *cells])
    seeds = [
        [f"{pair['runs'][0]}, {pair['runs'][1]}", str(at["layer"])]
        + [f"{at[key]:.2f}" for key in ("same_index", "other_index", "matched", "matched_shifted")]
        + [f"{at[key]:.1%}" for key in ("matched_same_index", "matched_strong")]
        for pair in result["seeds"]
        for at in pair["layers"]
    ]
    seed_heads = ["runs", "layer", "r, same index", "best other index", "match", "match, shifted"]
    of_steps = [{one["step"]: one for one in of["steps"]} for of in result["facts"]]

    def fact_row(title: str, value: Any, digits: int) -> list[str]:
        return [
            title,
            *(_spread([value(of[step]) for of in of_steps if step in of], digits) for step in steps),
        ]

    n_layers = len(next(iter(of_steps[0].values()))["layers"]) if of_steps else 0
    facts = [fact_row("known", lambda of: of["n_known"] / (of["n_known"] + of["n_forgotten"]), 3)]
    for layer in range(n_layers):
        of_all = {"held_out": "held out", "held_out_shuffled": "held out, shuffled"}
        of_last = {"in_sample": "in sample", "in_sample_shuffled": "in sample, shuffled"}
        for key, title in (of_all | of_last if layer == n_layers - 1 else of_all).items():

            def of_layer(of: Any, layer: int = layer, key: str = key) -> float:
                return float(of["layers"][layer][key])

            facts.append(fact_row(f"layer {layer}: {title}", of_layer, 3))
    return {
        "facts": results.markdown(heads, facts),
        "identity": results.markdown(heads, identity),
        "model": results.markdown(heads, model),
        "flows": results.markdown(heads, flows),
        "onsets": results.markdown(onset_heads, onsets),
        "seeds": results.markdown([*seed_heads, "matched by index", "match of .5 or more"], seeds),
    }


def spread(group: Sequence[Any], path: Sequence[Any], step: int, digits: int) -> str:
    """Formats a figure at a step: the mean over runs, the least and the largest."""
    values = []
    for one in group:
        curve = one
        for key in path:
            curve = curve[key] if key in curve else curve[str(key)]
        if step in one["steps"] and (value := curve[one["steps"].index(step)]) is not None:
            values.append(value)
    return _spread(values, digits)


def _spread(values: Sequence[float], digits: int) -> str:
    """Formats a mean, the least and the largest; infinite is never."""
    if not values:
        return "-"
    if not np.isfinite(values).all():
        return "never"
    figures_of = (
        np.array([min(values), max(values), np.mean(values)]).round(digits) + 0.0
    )  # no minus before 0
    low, high, mean = (f"{x:.{digits}f}" for x in figures_of)
    return mean if low == high else f"{mean} ({low} to {high})"


# Picture.


def draw(groups: Mapping[str, Sequence[Any]], path: pathlib.Path) -> None:
    """Draws six panels over the steps; of groups the mean, and thin lines for each run."""
    figure, axes = pictures.panels(2, 3, figsize=(14, 7.6), layout="constrained", font_size=9)

    def plot(axis: Any, group: str, keys: Sequence[Any], name: str, colour: str, style: str = "-") -> None:
        if group not in groups:
            return
        found = []
        for one in groups[group]:
            curve: Any = one
            for key in keys:
                curve = curve.get(key, {})
            if not curve:
                continue  # not measured
            values = np.array([np.nan if x is None else x for x in curve], float)
            values[np.isclose(values, 1) & ("r_" in keys[-1])] = np.nan  # of the reference with itself
            steps = np.maximum(one["steps"], 0.5)
            axis.plot(steps, values, color=colour, lw=0.5, ls=style, alpha=0.6)
            found.append(values)
        if len({len(curve) for curve in found}) == 1:
            axis.plot(steps, np.mean(found, axis=0), color=colour, lw=1.8, ls=style, label=name)

    blue, orange, green, pink = COLOURS
    at = axes[0][0]
    plot(at, TOPK, ("curves", "r_reference"), "TopK neurons", blue)
    plot(at, BASE, ("curves", "r_reference"), "Base coordinates", orange)
    plot(at, SAES[CHAINED], ("curves", "r_reference"), "SAE, chained", green)
    plot(at, SAES[SAME], ("curves", "r_reference"), "SAE, same seed", green, "--")
    plot(at, SAES[FRESH], ("curves", "r_matched"), "SAE, fresh, matched", pink)
    plot(at, SAES[FRESH], ("curves", "r_reference"), "SAE, fresh, by index", pink, "--")
    plot(at, TOPK, ("curves", "r_other"), "null: best other index", "#888888")
    plot(at, TOPK, ("curves", "r_shifted"), "null: tokens shifted", "#888888", ":")
    _finish(at, "a  Who keeps its index?", "r to the last step, median")
    at = axes[0][1]
    plot(at, TOPK, ("values", "loss"), "held-out loss", "#000000")
    plot(at, TOPK, ("values", "kl_unigram"), "KL to unigrams", blue)
    plot(at, TOPK, ("values", "kl_bigram"), "KL to bigrams", blue, "--")
    plot(at, TOPK, ("curves", "token_entropy"), "token entropy, median", orange)
    plot(at, TOPK, ("curves", "semantic_entropy"), "semantic entropy, median", orange, "--")
    _finish(at, "b  The model and its neurons", "nats")
    at = axes[0][2]
    plot(at, TOPK, ("layers", 0, CARRIED), "layer 0: carried from the embedding", blue)
    plot(at, TOPK, ("layers", 1, CARRIED), "layer 1: carried from layer 0", orange)
    plot(at, TOPK, ("layers", 2, CARRIED), "layer 2: carried from layer 1", green)
    plot(at, TOPK, ("curves", "common"), "strongest token is one of the 10 commonest", pink)
    plot(at, TOPK, ("curves", "r_previous"), "r to the step before, median", "#888888")
    _finish(at, "c  Layer 0 takes over from the embedding", "share, or r")
    at = axes[1][0]
    for group, colour in ((TOPK, blue), (WSD, green), (BASE, orange)):
        plot(at, group, ("onsets", "onset_50", "formed"), f"{group}, r .5", colour)
        plot(at, group, ("onsets", "onset_90", "formed"), f"{group}, r .9", colour, "--")
    _finish(at, "d  Neurons that have come to stay", "share of living neurons")
    at = axes[1][1]
    for group, colour in ((TOPK, blue), (BASE, orange)):
        plot(at, group, ("pairs", "0-1", "r"), f"{group}: layers 0 and 1, r", colour)
        plot(at, group, ("pairs", "0-1", WRITTEN), f"{group}: layer 1, r written", colour, "--")
        plot(at, group, ("pairs", "1-2", WRITTEN), f"{group}: layer 2, r written", colour, ":")
    _finish(at, "e  The same index in the next layer", "r, median")
    at = axes[1][2]
    if "uas" in groups[TOPK][0]["values"]:
        plot(at, TOPK, ("values", "uas"), "UAS, best head", blue)
        plot(at, TOPK, ("values", "uas_distance"), "UAS, best distance", blue, ":")
        plot(at, BASE, ("values", "uas"), "UAS, Base", orange)
    if "blimp" in groups[TOPK][0]["values"]:
        plot(at, TOPK, ("values", "blimp"), "BLiMP accuracy", green)
    plot(at, TOPK, ("values", "prefix_matching"), "prefix matching, best head", pink)
    _finish(at, "f  Syntax, minimal pairs, copying", "share")
    pictures.save(figure, path)


def _finish(axis: Any, title: str, y_title: str) -> None:
    axis.set_title(title, loc="left")
    axis.set(xscale="log", xlabel="training step (0 at the left end)", ylabel=y_title)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, frameon=False)
    else:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color="#888888")


if __name__ == "__main__":
    main()
