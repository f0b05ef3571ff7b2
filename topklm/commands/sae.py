"""`topklm sae`: trains sparse autoencoders of a Base LM's hidden states, and measures them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import topklm
from topklm.commands import shared
from topklm.commands.shared import Output, Verb
from topklm.config import MeshConfig
from topklm.errors import UserError
from topklm.imports import when_used
from topklm.neurons import DICTIONARY_TOKENS
from topklm.progress import Progress
from topklm.runtime.process import StopRequest, stop_on_signal
from topklm.storage.files import local_path

with when_used():
    from topklm import layout as layout_lib
    from topklm.neurons import documents as documents_lib
    from topklm.neurons import fit_dictionary
    from topklm.neurons import harvest as harvest_lib
    from topklm.runtime import compilation_cache
    from topklm.sae import ensemble, folder, kinds, measure, text, train
    from topklm.steering import survey

if TYPE_CHECKING:
    from topklm.inference.language_model import LanguageModel
    from topklm.neurons.dictionary import Dictionary
    from topklm.neurons.documents import TextModel

DESCRIPTION = "Trains sparse autoencoders of a Base LM's hidden states, and measures them."
EXAMPLE = "topklm sae train runs/small-base --kind batchtopk --width 1024 --k 16 --out saes/batchtopk"

_AUTO = "auto"
_HEADS = {  # of columns, short enough for a terminal
    "explained_variance": "EV",
    "loss_reconstructed": "loss SAE",
    "recovered_zero": "rec. zero",
    "recovered_mean": "rec. mean",
    "decoder_cosine": "cos",
    "stability": "stable",
    "stable_share": "> .9",
    "matched": "1:1",
}
_KINDS = ("topk", "batchtopk", "matryoshka", "jumprelu", "gba")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    verbs = {
        "train": Verb(
            "train autoencoders of layers side by side",
            "Trains sparse autoencoders on the hidden states that layers of a Base LM hand on, streamed from "
            "its training text. Started again it goes on. The processes of a launcher share each minibatch.",
            EXAMPLE,
            _add_train,
            _train,
        ),
        "measure": Verb(
            "measure trained autoencoders on held-out text",
            "Measures codes of a token, dead codes, explained variance, loss recovered, how alike decoder "
            "rows are, and how many are found again in folders of other seeds.",
            "topklm sae measure saes/seed-0 saes/seed-1 --run runs/small-base",
            _add_measure,
            _measure,
        ),
    }
    shared.add_verbs(parser, verbs, "train|measure")


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = shared.flags(parser, "run", "step", "layers", "seed", "json")
    add("--out DIR", "folder for the autoencoders", required=True)
    add("--kind", f"one of {', '.join(_KINDS)}", "topk")
    add("--width M", "codes of a layer, also more than the model has coordinates; default as many", int)
    add("--k K", f"codes of a token; {_AUTO}: by the cosine of decoder rows; default the config's topk_k")
    add("--tokens N", "of training text", DICTIONARY_TOKENS)
    add("--ensemble", "members make one dictionary by bag or boost", choices=("bag", "boost"))
    add("--members J", "of an ensemble; default 4", int)
    add("--learning-rate X", "the highest; default 0.002", float)
    add("--minibatch N", "tokens of a step; default 1024", int)
    add("--sparsity", "penalty of jumprelu: quadratic, around K; or tanh")
    add("--coefficient X", "of that penalty; default 0.3", float)
    add("--resume", "refuse to begin: there has to be training in the folder that goes on", False)
    add("--save-every S", "seconds between two states on the disk", 60.0)


def _add_measure(parser: argparse.ArgumentParser) -> None:
    add = shared.flags(parser, "step", "json")
    add("folders DIR", "folders of topklm sae train, all of the model", nargs="*")
    add("--run RUN", "the model that they are of; a TopK LM is measured by itself", required=True)
    add("--tokens N", "of held-out text", 100_000)
    text = "train on with and without so many new codes, which says how far old rows move for them"
    add("--hedging N", text, int)
    add("--against RUN", "TopK LMs of other seeds, for the stability of neurons", nargs="+", default=[])
    add("--wider RUN", "begun like the TopK LM --run by train.init, but wider: the hedging of its neurons")
    text = "layers whose reconstructions replace hidden states at once; default all but the model's last"
    add("--together L,...", text, type=shared.layers)


def run(arguments: argparse.Namespace) -> None:
    """Carries the verb out."""
    arguments.call(arguments)


def _train(arguments: argparse.Namespace) -> None:
    from topklm import distributed  # noqa: PLC0415 - imports JAX, which --help does without
    from topklm.distributed import coordination  # noqa: PLC0415

    shared.check_at_least(arguments, 1, "tokens")
    shared.check_at_least(arguments, 0, "seed")
    shared.check_on_disk(arguments.run)
    if arguments.members is not None and arguments.ensemble is None:
        raise UserError("says nothing without --ensemble", field="--members", value=arguments.members)
    shared.check_at_least(arguments, 0, "save_every")
    for name in ("sparsity", "coefficient") if arguments.kind != "jumprelu" else ():
        if (value := getattr(arguments, name)) is not None:
            raise UserError("says nothing without --kind jumprelu", field=f"--{name}", value=value)
    stop: StopRequest | None = None
    with contextlib.ExitStack() as stack:
        if coordination.find_process() is not None:
            stop = stack.enter_context(stop_on_signal(distributed.announce_stop))
        stack.enter_context(distributed.session(lambda: stop is not None and stop.heard))
        _train_into(local_path(arguments.out, "--out"), arguments, stop)


def _train_into(out: Path, arguments: argparse.Namespace, stop: StopRequest | None) -> None:
    """Trains as one of several processes, the first of which prints; a lone one has no `stop`."""
    from topklm import distributed  # noqa: PLC0415 - see `_train`

    is_first = distributed.is_primary()
    output = Output(arguments.json if is_first else None)
    progress = output.progress if is_first else Progress(lambda line: None)
    resume = distributed.of_first("begun", lambda: folder.is_begun(out)) or arguments.resume
    layout = layout_lib.make_layout(MeshConfig())
    compilation_cache.enable()
    model = topklm.load(arguments.run, step=arguments.step, mesh=layout.mesh)
    layers = _layers(model, arguments.layers)
    how = ensemble.ALONE
    if arguments.ensemble is not None:
        how = ensemble.Ensemble(arguments.ensemble, 4 if arguments.members is None else arguments.members)
    text_model = shared.text_model(model, layout)
    documents = documents_lib.open_documents(model.tokenizer, model.config.data)
    asked: dict[str, Any] = {"n_tokens": arguments.tokens, "seed": arguments.seed, "layers": layers}
    asked["progress"] = progress
    trials: list[dict[str, Any]] = []
    if arguments.k == _AUTO and resume:
        raise UserError("--k = auto: training was begun here: give the number that was chosen, not auto")
    if arguments.k == _AUTO:
        config, trials = _choose_k(arguments, model, text_model, documents, asked)
    else:
        config = _config(arguments, model, _number(arguments.k, model))
    about = folder.facts_of(model, layers)
    saving = train.Saving(out / folder.STATE, about, resume, arguments.save_every, stop)
    with folder.writing(out):
        try:
            fitted = text.fit_text(
                config, text_model, model.config.data, documents, how=how, saving=saving, **asked
            )
        except train.Stopped as e:
            assert stop is not None
            progress.say(f"{stop.signal_name}: {e}; saved in {out}. Resume with the same command")
            return
        facts = {**fitted.dictionary.facts, **about}
        dictionary = dataclasses.replace(fitted.dictionary, facts=facts)
        if is_first:
            folder.finish(out, dictionary, fitted.history)
    if not is_first:
        return
    told = {"folder": str(out), "kind": config.kind, "k": config.k, "width": dictionary.width, **facts}
    output.give({**told, "trials": trials}, lambda: output.say(f"{out}: {dictionary.description}"))


def _layers(model: LanguageModel, asked: tuple[int, ...] | None) -> tuple[int, ...]:
    if model.cfg.n_topk_layers:
        text = "has TopK layers, whose neurons need no autoencoder: give a Base LM"
        raise UserError(text, field="RUN", value=model.run)
    there = harvest_lib.kind_and_layers(model.cfg)[1]
    if asked is None:
        return there
    if missing := sorted(set(asked) - set(there)):
        allowed = f"of {', '.join(map(str, there))}"
        raise UserError(field="--layers", value=",".join(map(str, missing)), allowed=allowed)
    return asked


def _number(k: str | None, model: LanguageModel) -> int:
    if k is None:
        return model.cfg.topk_k
    if not k.isdecimal():
        raise UserError(field="--k", value=k, allowed=f"a whole number, or {_AUTO}")
    return int(k)


def _config(arguments: argparse.Namespace, model: LanguageModel, k: int) -> kinds.SaeConfig:
    names = "learning_rate", "minibatch", "sparsity", "coefficient"
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    width = model.cfg.d_model if arguments.width is None else arguments.width
    return kinds.SaeConfig(arguments.kind, width, k, **given)


def _choose_k(
    arguments: argparse.Namespace,
    model: LanguageModel,
    text_model: Any,
    documents: Any,
    asked: dict[str, Any],
) -> tuple[kinds.SaeConfig, list[dict[str, Any]]]:
    """Returns the config with the k of the least alike decoder rows, and what each k gave.

    Each is trained on a tenth of the tokens, 2508.16560's sign of the right number of codes.
    """
    width = _config(arguments, model, 1).width
    trials = list[dict[str, Any]]()
    grid = [k for k in (2, 4, 8, 16, 32, 64, 128, 256) if k <= width // 4] or [1]
    short = {**asked, "n_tokens": max(1, asked["n_tokens"] // 10)}
    for k in grid:
        fitted = text.fit_text(
            _config(arguments, model, k), text_model, model.config.data, documents, **short
        )
        alike = measure.decoder_cosine(fitted.dictionary.decoder)
        trials.append({"k": k, "decoder_cosine": [float(x) for x in alike]})
        asked["progress"].say(f"k = {k}: mean |cosine| of decoder rows {alike.mean():.4f}")
    best = min(trials, key=lambda trial: sum(trial["decoder_cosine"]))
    return _config(arguments, model, best["k"]), trials


def _measure(arguments: argparse.Namespace) -> None:
    from topklm.distributed import coordination  # noqa: PLC0415 - see `_train`

    if (process := coordination.find_process()) is not None:
        text = f"measures in one process, and this is {process.index} of {process.count}"
        raise UserError(f"sae measure {text}: start one, with TOPKLM_DISTRIBUTED=off")
    shared.check_at_least(arguments, 1, "tokens", "hedging")
    shared.check_on_disk(arguments.run)
    output = Output(arguments.json)
    model, layout = shared.load(arguments)
    text_model = shared.text_model(model, layout)
    documents = documents_lib.open_documents(model.tokenizer, model.config.data)
    found: dict[str, Any]
    if model.cfg.n_topk_layers:
        if arguments.folders:
            raise UserError("is a TopK LM, which has no autoencoders: leave the folders out", field="--run")
        for name in ("hedging", "together"):
            if getattr(arguments, name) is not None:
                raise UserError(
                    f"--{name} is of autoencoders, and {arguments.run} is a TopK LM: leave it out"
                )
        others = [shared.load(argparse.Namespace(run=name, step=None))[0] for name in arguments.against]
        wider = None
        if arguments.wider is not None:
            wider = shared.load(argparse.Namespace(run=arguments.wider, step=arguments.step))[0]
        found = measure.of_topk_lm(
            model, others, text_model, documents, arguments.tokens, output.progress, wider
        )
    else:
        for name in ("against", "wider"):
            if getattr(arguments, name) not in (None, []):
                raise UserError(f"--{name} is of TopK LMs, and {arguments.run} is a Base LM: leave it out")
        if not arguments.folders:
            raise UserError(field="folders", allowed="given, one or more, for a Base LM")
        if (arguments.hedging or 0) >= model.cfg.d_model:
            allowed = f"below the model's width, {model.cfg.d_model}, for new rows must not span all"
            raise shared.wrong(arguments, "hedging", allowed=allowed)
        given = [(name, *folder.load(Path(name), model, "folder")) for name in arguments.folders]
        together = arguments.together
        if together and (missing := [x for x in together if any(x not in layers for *_, layers in given)]):
            allowed = f"of the layers that have autoencoders, {', '.join(map(str, given[0][2]))}"
            raise UserError(field="--together", value=missing[0], allowed=allowed)
        tokens = arguments.tokens
        found = measure.of_folders(given, text_model, documents, tokens, output.progress, together)
        if arguments.hedging is not None:
            for (name, dictionary, layers), entry in zip(given, found["autoencoders"], strict=True):
                rates = _hedging(name, dictionary, layers, model, text_model, arguments.hedging, output)
                for row, rate in zip(entry["layers"], rates, strict=True):
                    row["hedging"] = rate
    found = survey.without_nan(found)
    output.give(found, lambda: _show(output, found))


def _hedging(
    name: str,
    dictionary: Dictionary,
    layers: tuple[int, ...],
    model: LanguageModel,
    text_model: TextModel,
    n_new: int,
    output: Output,
) -> list[float]:
    """Returns the hedging rate of each layer, trained on as long as the dictionary was."""
    if dictionary.kind == "saelens" or dictionary.members > 1:
        raise UserError("--hedging goes on with one autoencoder of topklm", field="folder", value=name)
    config = kinds.SaeConfig.of(dictionary)
    training = fit_dictionary.TrainingText(text_model, model.config.data, layers)
    n_batches = training.n_batches(dictionary.facts["tokens"])
    with output.progress.phase(f"hedging of {name}", 2 * n_batches * training.batch_tokens) as report:
        return measure.hedging(
            config,
            training.batches,
            n_batches,
            n_new,
            start=dictionary,
            layout=text_model.layout,
            report=lambda tokens: report(tokens, 0, tokens),
        )


def _show(output: Output, found: dict[str, Any]) -> None:
    for entry in found["autoencoders"]:
        names = list(entry["layers"][0])
        rows = [
            [str(number), *(_said(layer[name]) for name in names)]
            for number, layer in zip(entry["of_layers"], entry["layers"], strict=True)
        ]
        output.say(f"{entry['name']}: {entry['description']}")
        output.console.print(shared.table(["layer", *(_HEADS.get(name, name) for name in names)], rows))
        if together := entry.get("together"):
            losses = f"{_said(together['loss'])} -> {_said(together['loss_reconstructed'])}"
            output.say(f"layers {', '.join(map(str, together['layers']))} together: loss {losses} nats")
    for note in found["notes"]:
        output.say(note)


def _said(value: Any) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
