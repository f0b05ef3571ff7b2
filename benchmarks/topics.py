"""Measures neurons that tell what a text is about, and fills their tables in docs/readability.md.

    topklm neurons card runs/topics-seed0 --no-steering --conllu ud.conllu.gz --json topics-card-0.json
    python -m benchmarks.topics runs/topics-seed{0,1,2} --cards topics-card-{0,1,2}.json --control runs/groups

Runs are of `configs/small.py:topics`, the control's the same with `optim.topic_weight=0`. Of each neuron of
the first group, in the last layer with TopK: its density, how often the next token has it active too, the
topic of articles that its mean over an article's first tokens tells best on one part of the articles, with
its area under the ROC curve on the others, and the tokens that it raises most by the identity lens. Of each
topic the neuron that tells it best on the first part, with its area on the others. Writes
benchmarks/results/readability/topics.json; with --page alone the tables are filled from it.
"""

from collections.abc import Sequence
import pathlib
from typing import Any

import numpy as np

from benchmarks.harness import results
import topklm
from topklm.explorer import card as card_run
from topklm.layout import one_device
from topklm.neurons import labelled_texts, probing

PAGE = results.ROOT / "docs" / "readability.md"
OUT = results.FOLDER / "readability" / "topics.json"
TOKENS = 25_000
SHOWN = 12  # neurons of the page's table


def main() -> None:
    """Measures what is asked for, and fills the page."""
    parser = results.parser(__doc__)
    parser.add_argument("runs", type=pathlib.Path, nargs="*")
    parser.add_argument(
        "--cards", type=pathlib.Path, nargs="+", default=[], help="of these runs, by the command"
    )
    parser.add_argument("--control", type=pathlib.Path, help="a run of the same groups without the loss")
    parser.add_argument("--page", action="store_true", help="fill the page alone")
    arguments = parser.parse_args()
    if not arguments.page:
        given = zip(arguments.runs, arguments.cards, strict=True)
        found = [{**_of_card(results.read(card)), **of_group(run)} for run, card in given]
        control = of_group(arguments.control) if arguments.control else None
        results.write(OUT, {"tokens": TOKENS, "runs": found, "control": control}, shown={})
    page = results.fill(PAGE.read_text(encoding="utf-8"), tables(results.read(OUT)), PAGE.name)
    PAGE.write_text(page, encoding="utf-8")


def _of_card(card: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of a card of one run that the page shows, lists over layers."""
    run = card["runs"][0]
    own = next(basis for basis in run["bases"] if basis["name"] == "own")["layers"]

    def probed(name: str, control: str = "") -> list[float]:
        entries = [layer["probing"][name] for layer in own]
        return [(entry[control] if control else entry)["auc"]["1"]["value"] for entry in entries]

    return {
        "run": run["run"],
        "train_seed": run["train_seed"],
        "bits_per_byte": run["bits_per_byte"],
        **{name: [layer[name]["value"] for layer in own] for name in ("dead", "token_entropy", "by_token")},
        "probing": {
            name: {
                "auc": probed(name),
                "less_random": probed(name, "less_random"),
                "less_random_cut": probed(name, "less_random_cut"),
            }
            for name in ("topic", "part of speech")
        },
    }


def of_group(folder: pathlib.Path) -> dict[str, Any]:
    """Measures the first group in the last layer with TopK: each neuron, and the best of each topic."""
    model = topklm.load(str(folder))
    run = card_run.Run(folder.name, model, one_device())
    layer, n_neurons = model.cfg.n_topk_layers - 1, model.cfg.groups[0][0]
    hook = f"blocks.{layer}.hook_topk"
    context = model.cfg.context_length

    def active(ids: np.ndarray) -> np.ndarray:
        return np.asarray(model.run_with_cache(ids[None, :context])[1][hook])[0, :, :n_neurons]

    counts, stays = np.zeros(n_neurons), np.zeros(n_neurons)
    n_tokens = 0
    for ids in card_run.documents(run, TOKENS):
        is_active = active(ids) > 0
        counts += is_active.sum(axis=0)
        stays += (is_active[1:] & is_active[:-1]).sum(axis=0)
        n_tokens += len(is_active)
    articles = labelled_texts.topics(0)
    located = labelled_texts.locate(articles, model.tokenizer, context)
    states = np.concatenate([active(ids) for ids in located.documents])
    means = located.pooling @ states
    kept = located.kept
    questions, _ = probing.ask(articles.labels[kept], articles.families[kept], articles.to_fit[kept])
    names = model.tokenizer.token_strings(range(model.cfg.vocab_size))
    raised = np.asarray(model.W_U, np.float64)[:n_neurons, : len(names)]
    raised = raised - raised.mean(axis=0)
    topics = {}
    for question in questions:
        best = max(range(n_neurons), key=lambda n: score(means[:, n], question.fit, question.is_fit))
        told = score(means[:, best], question.test, question.is_test)
        topics[question.label] = {"neuron": f"{layer}:{best}", "auc": told}
    found = []
    for neuron in np.argsort(-counts, kind="stable"):
        label, told = best_label(means[:, neuron], questions)
        found.append(
            {
                "neuron": f"{layer}:{neuron}",
                "density": counts[neuron] / n_tokens,
                "stays": stays[neuron] / max(counts[neuron], 1),
                "topic": label,
                "auc": told,
                "raises": [names[token] for token in np.argsort(-raised[neuron], kind="stable")[:8]],
            }
        )
    return {"topics": topics, "neurons": found}


def best_label(means_n: np.ndarray, questions: Sequence[probing.Question]) -> tuple[str, float]:
    """Finds the label that means tell best among examples to fit, and their AUC on those to test."""
    best = max(questions, key=lambda question: score(means_n, question.fit, question.is_fit))
    return best.label, score(means_n, best.test, best.is_test)


def score(means_n: np.ndarray, examples: np.ndarray, is_label: np.ndarray) -> float:
    """Returns the area under the ROC curve of means, float[n], at examples int[m], labelled by bool[m]."""
    return float(probing.auc(means_n[examples], is_label, np.ones((len(examples), 1)))[0])


def tables(found: dict[str, Any]) -> dict[str, str]:
    """Makes the page's tables: rows of seeds, of topics, and of neurons of the first run."""
    columns = "seed", "bits per byte", "dead, %", "token entropy, nats", "by_token", "topic", "part of speech"
    runs = []
    for run in found["runs"]:
        probed = [
            "; ".join(_three(run["probing"][name][of], f) for of, f in _PROBED)
            for name in ("topic", "part of speech")
        ]
        dead = [100 * share for share in run["dead"]]
        runs.append(
            [
                str(run["train_seed"]),
                f"{run['bits_per_byte']:.3f}",
                _three(dead, "{:.0f}"),
                _three(run["token_entropy"], "{:.2f}"),
                _three(run["by_token"], "{:.2f}"),
                *probed,
            ]
        )
    seeds = [f"seed {run['train_seed']}" for run in found["runs"]]
    groups = [*found["runs"], found["control"]]
    told = [
        [label, *(f"{group['topics'][label]['auc']:.2f}" for group in groups)]
        for label in sorted(groups[0]["topics"], key=lambda x: -groups[0]["topics"][x]["auc"])
    ]
    of_neurons = "neuron", "active, %", "stays, %", "topic told best", "AUC", "raises most"
    neurons = []
    for one in found["runs"][0]["neurons"][:SHOWN]:
        words = ", ".join(f"`{word.strip()}`" for word in one["raises"])
        shares = [f"{100 * one[name]:.0f}" for name in ("density", "stays")]
        neurons.append([one["neuron"], *shares, one["topic"], f"{one['auc']:.2f}", words])
    return {
        "topics": results.markdown(columns, runs),
        "topics told": results.markdown(("topic", *seeds, "without the loss"), told),
        "topic neurons": results.markdown(of_neurons, neurons),
    }


_PROBED = (("auc", "{:.2f}"), ("less_random", "{:+.2f}"), ("less_random_cut", "{:+.2f}"))


def _three(values: Sequence[float], form: str) -> str:
    return " / ".join(form.format(value) for value in values)


if __name__ == "__main__":
    main()
