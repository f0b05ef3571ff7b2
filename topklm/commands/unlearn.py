"""`topklm unlearn`: makes a run that no longer serves one text, beside plain ways to do so."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from topklm.commands import eval as eval_command
from topklm.commands import neurons_compare, shared
from topklm.commands.shared import Output
from topklm.errors import UserError
from topklm.imports import when_used
from topklm.neurons import contrast
from topklm.storage.files import json_digest, local_path, new_folder, write_atomically

with when_used():
    from topklm.checkpoint import checksums
    from topklm.convert import huggingface
    from topklm.eval import tasks
    from topklm.inference import load
    from topklm.neurons import ablate_set, harvest
    from topklm.neurons import documents as documents_lib
    from topklm.steering import survey
    from topklm.training import unlearn

if TYPE_CHECKING:
    from topklm.commands.neurons_compare import ComparedText
    from topklm.eval.tasks import TokenizedTask
    from topklm.inference.language_model import LanguageModel
    from topklm.neurons.ablate_set import Neuron
    from topklm.neurons.documents import TextModel
    from topklm.progress import Progress
    from topklm.training.unlearn import Method, Result, Settings

DESCRIPTION = (
    "Chooses neurons that are more active in one text than in another, fine-tunes their parameters alone so "
    "that the first text is no longer served (SSPU), and saves that as a run. Beside it, in one table: the "
    "same neurons set to 0, random neurons, all parameters, gradient ascent; and what relearning on half of "
    "the text brings back. Documents are halved: one half chooses and trains, the other measures."
)
EXAMPLE = 'topklm unlearn runs/small --forget-regex "music|song" --out runs/unlearned'

REPORT_FILE = "unlearn.json"  # in the new run folder
_STATE = ".begun"  # ends the name of a folder beside the new run's, which holds what is done
_ELSEWHERE = ("run", "out", "resume", "json")  # arguments that decide no result, or are told in other words
_TEXTS = ("forget", "retain")
_HEADS = {
    "forget": "forget",
    "retain": "retain",
    "blimp": "BLiMP",
    "bits_per_byte": "bits/byte",
    "relearned": "relearned",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    texts = {"forget": "text to be forgotten", "retain": "text to be known as before"}
    add = neurons_compare.text_flags(parser, texts, 24_000, split="train")
    add("--out RUN", "the run folder to be made", required=True)
    add("--count N", "neurons of each layer", 16)
    text = "leave out neurons that are active at more than this share of the retain text's tokens"
    add("--retain-frequency F", text, 0.1)
    add("--steps N", "of each fine-tuning, at most", 40)
    text = (
        "by which a fine-tuning may raise the loss, per token, of retain documents that are held back from "
    )
    add("--budget NATS", text + "it: steps that raise it more are taken back", 0.05)
    add("--learning-rate X", "of Adam, halved where the budget is exceeded", 3e-3)
    add("--relearning-rate X", "of Adam when the text is learned again", 1e-4)
    add("--batch-size B", "rows of each text in a step", 4)
    text = "c, the length to which forget states are pushed, in mean lengths before"
    add("--coefficient C", text, 1.0)
    add("--alpha A", "weight of the retain states in the loss", 1.0)
    add("--random-sets R", "random masks of as many neurons of the same layers and densities", 3)
    add("--relearn-steps N", "on the forget text's first half, all parameters", 20)
    add("--limit N", "of BLiMP, only the first N items of each paradigm", 5)
    add("--data DIR", "folder with a blimp.jsonl in place of the BLiMP that ships")
    add("--resume", "go on with unlearning that was begun for the same --out", False)
    add("--eval-tokens N", "of held-out text, at most, for bits per byte", 12_000)


def run(arguments: argparse.Namespace) -> None:
    """Carries the verb out."""
    for name in ("budget", "coefficient", "alpha"):
        shared.check_at_least(arguments, 0, name)
    for name in ("retain_frequency", "learning_rate", "relearning_rate"):
        if not 0 < getattr(arguments, name) <= 1:
            raise shared.wrong(arguments, name, allowed="above 0, at most 1")
    counts = ("count", "steps", "batch_size", "random_sets", "relearn_steps", "limit", "eval_tokens")
    output, out = Output(arguments.json), local_path(arguments.out, "--out")
    named = out if out.name else out.absolute()
    state = named.parent / f"{named.name}{_STATE}"
    _check_begun(state, arguments.resume)
    with new_folder(out) as folder:
        model, text_model, texts = neurons_compare.open_texts(arguments, _TEXTS, *counts)
        layers = _layers(arguments, model)
        train, test = neurons_compare.halves_of(texts, arguments.seed)
        tokenized = _tasks(arguments, model, text_model)
        neurons, random, facts = _chosen(arguments, text_model, layers, train, output.progress)
        settings = _settings(arguments, max(layers))
        work = unlearn.Unlearning(
            text_model,
            settings,
            dict(zip(_TEXTS, train, strict=True)),
            dict(zip(_TEXTS, test, strict=True)),
            tokenized,
        )
        methods = [
            unlearn.Method("chosen neurons", unlearn.SSPU, neurons, is_masked=True),
            unlearn.Method("chosen set to 0", None, neurons),
            *(
                unlearn.Method(f"random neurons {number}", unlearn.SSPU, drawn, is_masked=True)
                for number, drawn in enumerate(random, 1)
            ),
            unlearn.Method("all parameters", unlearn.SSPU, neurons),
            unlearn.Method("gradient ascent", unlearn.ASCENT),
        ]
        parts = unlearn.Parts(state, _begun_with(arguments, model, (train, test), tokenized), model.params)
        with output.progress.phase("unlearning", work.n_steps(methods)) as tell:

            def result(method: Method) -> Result:
                done, n_steps = 0, work.n_steps([method]) - work.n_steps([])

                def report(steps: int) -> None:
                    nonlocal done
                    done += steps
                    tell(steps)

                found = parts.get(method, lambda: _without_others(work.run(method, report), methods[0]))
                report(n_steps - done)
                return found

            before, *results = map(result, (unlearn.AS_IT_WAS, *methods))
        content = {
            "run": arguments.run,
            "step": model.step,
            "out": str(out),
            **{text.name: text.facts for text in texts},
            "documents": {"train": list(map(len, train)), "test": list(map(len, test))},
            "settings": dataclasses.asdict(settings) | {"limit": arguments.limit},
            "neurons": facts,
            "methods": [_facts(one, before, arguments.seed) for one in (before, *results)],
            "warnings": [line for text in texts for line in text.warnings],
        }
        content = survey.without_nan(content)
        load.create_run(
            folder, huggingface.Model(model.config, model.tokenizer, results[0].params, step=model.step)
        )
        write_atomically(folder / REPORT_FILE, (json.dumps(content, indent=1) + "\n").encode())
    for part in state.glob("*.npz"):
        part.unlink()
    with contextlib.suppress(OSError):  # nothing was kept, or there is more in it than ours
        state.rmdir()
    output.give(content, lambda: _show(output, content, texts))


def _check_begun(state: Path, resume: bool) -> None:
    is_begun = any(state.glob("*.npz"))
    if is_begun and not resume:
        text = f"{state} holds unlearning that was begun for it: give --resume, or delete that"
        raise UserError(text, field="--out", value=str(state).removesuffix(_STATE))
    if resume and not is_begun:
        raise UserError(f"--resume: {state} holds nothing to go on from: leave --resume out")


def _begun_with(
    arguments: argparse.Namespace,
    model: LanguageModel,
    halves: Sequence[Sequence[Sequence[np.ndarray]]],
    tokenized: Mapping[str, TokenizedTask],
) -> dict[str, Any]:
    """Returns all that decides the results, by flag: they are not to be mixed with others'."""
    given = {shared.flag(name): value for name, value in vars(arguments).items() if name not in _ELSEWHERE}
    texts = [[hashlib.sha256(ids.tobytes()).hexdigest() for ids in part] for half in halves for part in half]
    found = {"texts": texts, "tasks": {name: one.task.sha256 for name, one in tokenized.items()}}
    digests = {name: json_digest(value) for name, value in found.items()}
    return {"RUN": f"{Path(model.run).name}, {checksums.fingerprint(model.params)}", **given, **digests}


def _layers(arguments: argparse.Namespace, model: LanguageModel) -> list[int]:
    """Returns the layers whose neurons are chosen; UserError for one that no other layer reads."""
    followed = range(model.cfg.n_followed_layers)
    layers = sorted(arguments.layers or followed)
    if not layers or layers[-1] not in followed:
        allowed = f"from 0 to {len(followed) - 1}: a layer after it must read its neurons"
        allowed = allowed if followed else "of a model with more layers than one"
        raise UserError(field="--layers", value=",".join(map(str, layers)), allowed=allowed)
    return layers


def _chosen(
    arguments: argparse.Namespace,
    model: TextModel,
    layers: Sequence[int],
    train: Sequence[Sequence[np.ndarray]],
    progress: Progress,
) -> tuple[tuple[Neuron, ...], list[tuple[Neuron, ...]], list[dict[str, Any]]]:
    """Chooses neurons on the training halves, and random sets; returns facts of the chosen ones too."""
    counts = []
    for name, documents in zip(_TEXTS, train, strict=True):
        with progress.phase_of_tokens(f"reading activations, {name}", sum(map(len, documents))) as tell:
            counts.append(harvest.count(model, documents, report=tell))
    frequency = np.stack([one.active.sum(axis=0) / one.n_tokens.sum() for one in counts])[:, layers]
    activation = np.stack([one.activation for one in counts])[:, layers]
    rng = np.random.default_rng(arguments.seed)
    with shared.arguments_are_flags(arguments):
        neurons = contrast.more_activated(
            activation, frequency, layers, arguments.count, arguments.retain_frequency
        )
        density = frequency.mean(axis=0)
        random = [ablate_set.matched_set(neurons, density, layers, rng) for _ in range(arguments.random_sets)]
    rows = {layer: row for row, layer in enumerate(layers)}
    facts = [
        {
            "layer": layer,
            "neuron": neuron,
            "activation": activation[:, rows[layer], neuron].tolist(),
            "frequency": frequency[:, rows[layer], neuron].tolist(),
        }
        for layer, neuron in neurons
    ]
    return neurons, random, facts


def _settings(arguments: argparse.Namespace, layer: int) -> Settings:
    names = {field.name for field in dataclasses.fields(unlearn.Settings)} - {"layer"}
    return unlearn.Settings(layer=layer, **{name: getattr(arguments, name) for name in names})


def _tasks(
    arguments: argparse.Namespace, model: LanguageModel, text_model: TextModel
) -> dict[str, TokenizedTask]:
    blimp = tasks.find("blimp", eval_command.tasks_folder(arguments.data), arguments.limit)
    documents = documents_lib.open_documents(model.tokenizer, model.config.data)
    texts = tasks.beginning(documents, model.tokenizer, arguments.eval_tokens)
    if not texts:
        raise documents_lib.no_text(documents, f"{model.run}: held-out text")
    found = tasks.of_text("heldout", texts, documents.name), blimp
    return {task.name: tasks.tokenize(task, text_model, model.tokenizer) for task in found}


def _without_others(result: Result, kept: Any) -> Result:
    """Lets go of parameters that are not to be saved."""
    return result if result.method is kept else dataclasses.replace(result, params={})


def _facts(result: Result, before: Result, seed: int) -> dict[str, Any]:
    method = result.method
    figures = {}
    for name, figure in result.figures.items():
        found = dataclasses.asdict(unlearn.change(result, before, name, seed))
        figures[name] = {**dataclasses.asdict(figure.estimate(seed)), "change": found}
    return {
        "method": method.name,
        "loss": method.loss,
        "neurons": method.neurons,
        "parameters": result.n_parameters,
        "steps": result.steps,
        **figures,
    }


def _show(output: Output, content: dict[str, Any], texts: Sequence[ComparedText]) -> None:
    first, *others = content["methods"]
    rows: list[Sequence[str] | None] = [
        (first["method"], "", "", *(f"{first[name]['value']:.3f}" for name in _HEADS)),
        None,
    ]
    for one in others:
        cells = [_cell(one[name]["change"]) for name in _HEADS]
        rows.append((one["method"], f"{one['parameters']:,}", str(one["steps"]), *cells))
    heads = ("method", "params", "steps", *_HEADS.values())
    output.console.print(shared.table(heads, rows, left=["method"]))
    s, (n_train, n_test) = content["settings"], content["documents"].values()
    output.say(
        f"forget, retain: nats per token of {n_test[0]:,} and {n_test[1]:,} documents, {n_train[0]:,} and "
        f"{n_train[1]:,} others chose and trained; below the first line: changes, with 95 % by bootstrap "
        "over documents (BLiMP: paradigms)"
    )
    output.say(
        f"relearned: forget after {s['relearn_steps']} steps on the documents that trained; 0: no more is "
        "forgotten than by the model as it was, trained likewise. params: that may move; steps: "
        f"those after which retain documents held back had risen by no more than {s['budget']:g}"
    )
    for text in texts:
        for line in text.warnings:
            output.say(f"note: {line}")
    output.say(f"wrote {content['out']}: the model of chosen neurons")


def _cell(change: dict[str, Any]) -> str:
    if None in change.values():  # no number
        return "-"
    return "{value:+.3f}\n[{low:+.3f}, {high:+.3f}]".format(**change)
