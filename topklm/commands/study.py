"""`topklm study`: the claims made of TopK LMs, measured on runs, with a verdict each."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import json
from pathlib import Path
import subprocess
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from topklm.commands import shared
from topklm.commands.shared import Output
from topklm.errors import (
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    Terminated,
    UserError,
    disk_errors_are_user_errors,
    signals_wait,
)
from topklm.imports import when_used
from topklm.storage.files import local_path, read_json, write_atomically

with when_used():
    from topklm.checkpoint import run_folder
    from topklm.eval import claims
    from topklm.explorer import card as card_lib
    from topklm.inference import load as load_lib
    from topklm.neurons import bases
    from topklm.sae import folder as sae_folder
    from topklm.sae import kinds as sae_kinds
    from topklm.steering import survey
    from topklm.trace import read, tables

if TYPE_CHECKING:
    from topklm.config import Config

DESCRIPTION = (
    "Measures the claims made of TopK LMs: their capabilities, how readable and steerable their neurons are, "
    "what they cost, how they form, whether another seed finds them; beside Base LMs of the same seeds and "
    "sparse autoencoders of these. Each measurement is a topklm command, whose JSON is kept in FOLDER; none "
    "is made twice. With several FOLDERs and no runs, writes one page of them all."
)
EXAMPLE = "topklm study studies/small --topk runs/a runs/b --base runs/base-a runs/base-b"

_RESULT, _PAGE, _DONE = "claims.json", "claims.md", "done.json"
_CHAINED = ("sae-chained",)
_TRACED = ("coordinates", *_CHAINED)  # traces of a Base LM
_SECONDS_TO_END = 10  # for a command that was interrupted with the study


class _Command(NamedTuple):
    """A command of `topklm`."""

    name: str  # of the file of its JSON, without .json
    measurement: str  # that its JSON is one of, or that reads what it leaves
    arguments: Sequence[str]
    has_json: bool = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    add = shared.flags(parser, "json")
    add("folders FOLDER", "of results: one, or several to be put on a page", nargs="+")
    add("--topk RUN", "TopK LMs of several seeds", nargs="+", default=[])
    add("--base RUN", "their twins without TopK, in the same order", nargs="+", default=[])
    add("--kinds KIND,...", "of sparse autoencoders, trained on every Base LM", "batchtopk,matryoshka")
    add("--sae-tokens N", "of training text, for each of them", int)
    add("--conllu FILE", "a treebank, for probes of parts of speech")
    add("--text NAME=SOURCE", "other text to evaluate on", action="append", default=[])
    add("--limit N", "items of each task or paradigm; default all", int)
    add("--tokens N", "of held-out text, on which neurons and autoencoders are measured", 25_000)
    add("--page FILE.md", "write the page there, its figures beside it")


def run(arguments: argparse.Namespace) -> None:
    """Measures what is missing, judges, and writes the page."""
    shared.check_installed("topklm study", ["pyarrow", "scipy", "markupsafe"])
    folders = [local_path(name, "FOLDER").absolute() for name in arguments.folders]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        raise UserError(f"FOLDER = {' '.join(arguments.folders)}: two have one name, that of the study")
    output = Output(arguments.json)
    if arguments.topk or arguments.base:
        if len(folders) > 1:
            text = "one folder holds the results of one study"
            raise UserError(text, field="FOLDER", value=" ".join(arguments.folders))
        _measure(arguments, folders[0], output)
    studies = dict(zip(names, map(_read, folders), strict=True))
    page = folders[0] / _PAGE if arguments.page is None else local_path(arguments.page, "--page")
    with disk_errors_are_user_errors(f"writing {page}"):
        page.parent.mkdir(parents=True, exist_ok=True)
        images = page.parent / "images"
        for name, study in studies.items():
            images.mkdir(exist_ok=True)
            write_atomically(
                images / f"claims-{name}.svg", card_lib.draw_claims(study, bases.TITLES).encode()
            )
        write_atomically(page, claims.page(studies, bases.TITLES).encode())

    def show() -> None:
        for name, study in studies.items():
            rows = [(one["claim"], one["verdict"], one["why"]) for one in study["claims"]]
            output.console.print(
                shared.table(("claim", "verdict", ""), rows, name, left=["claim", "verdict", ""])
            )
        output.say(f"page: {page}")

    output.give({"page": str(page), "studies": studies}, show)


def _read(folder: Path) -> Any:
    path = folder / _RESULT
    if not path.exists():
        raise UserError(f"{folder}: has no {_RESULT}: give --topk and --base, which measure it")
    advice = "delete it, and run topklm study again with --topk and --base"
    found = read_json(path, advice)
    names = [one.get("claim") for one in found.get("claims", ())] if isinstance(found, dict) else []
    if names != [claim.name for claim in claims.CLAIMS]:
        raise UserError(f"{path} holds no claims, or those of another version: {advice}")
    return found


def _check(arguments: argparse.Namespace) -> list[Config]:
    """Raises UserError for runs that cannot be compared; returns the configs, of --topk first."""
    topk, base = arguments.topk, arguments.base
    if len(topk) != len(base):
        numbers = f"--topk has {len(topk)} runs and --base {len(base)}"
        raise UserError(f"{numbers}: give as many, those of a seed at the same place")
    names = [*topk, *base]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise UserError(f"{name} is given twice: each run of --topk and --base is another")
        shared.check_on_disk(name)
    configs = [run_folder.saved_config(local_path(name, "RUN")) for name in names]
    for number, (name, config) in enumerate(zip(names, configs, strict=True)):
        flag = "--topk" if number < len(topk) else "--base"
        if config is None:
            raise UserError(f"{flag} = {name}: there is no run; give a run folder, e.g. runs/small")
        if bool(config.model.n_topk_layers) != (flag == "--topk"):
            allowed = "runs with TopK" if flag == "--topk" else "runs without (model.n_nontopk = n_layers)"
            raise UserError(f"{flag} = {name}: must be {allowed}")
    kinds = arguments.kinds.split(",")
    if unknown := [kind for kind in kinds if kind not in sae_kinds.KINDS]:
        allowed = f"one or more of {', '.join(sae_kinds.KINDS)}"
        raise UserError(field="--kinds", value=unknown[0], allowed=allowed)
    shared.check_at_least(arguments, 1, "sae_tokens", "limit", "tokens")
    if arguments.conllu is not None and not local_path(arguments.conllu, "--conllu").is_file():
        raise shared.wrong(arguments, "conllu", "there is no such file; check the path")
    found = [config for config in configs if config]
    for number, (name, config) in enumerate(zip(names, found, strict=True)):
        first = found[0 if number < len(topk) else len(topk)].model
        if config.model != first or (config.model.n_layers, config.model.d_model) != (
            found[0].model.n_layers,
            found[0].model.d_model,
        ):
            advice = "runs of a study differ in the seed, and --base in model.n_nontopk too"
            raise UserError("is of another model than the first", field="RUN", value=name, advice=advice)
    for flag, side in (("--topk", found[: len(topk)]), ("--base", found[len(topk) :])):
        seeds = [config.train.seed for config in side]
        if len(set(seeds)) < len(seeds):
            text = f"{flag} has runs of the seeds {', '.join(map(str, seeds))}: each must be of another"
            raise UserError(text)
    return found


def _measure(arguments: argparse.Namespace, folder: Path, output: Output) -> None:
    """Runs the commands whose results are not there, and judges the claims."""
    configs = _check(arguments)
    of_runs = [load_lib.checkpoint_step(name) for name in (*arguments.topk, *arguments.base)]
    with disk_errors_are_user_errors(f"writing {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    commands = list(_commands(arguments, folder, configs[0], of_runs))
    done = read_json(folder / _DONE, f"delete {folder / _DONE}") if (folder / _DONE).exists() else {}
    measured, missing = dict[str, list[Any]](), dict[str, str]()
    if len(arguments.topk) == 1:
        missing["stability"] = "takes runs of two seeds or more"
    with output.progress.phase("commands", len(commands)) as report:
        for one in commands:
            path, made_so = folder / f"{one.name}.json", [*one.arguments, *map(str, of_runs)]
            if done.get(one.name) != made_so or (one.has_json and not path.exists()):
                output.progress.say(f"topklm {' '.join(one.arguments)}")
                if why := _run(one, path, arguments.json == "-"):
                    output.progress.say(f"note: {why}")
                    missing.setdefault(one.measurement, why)  # later commands fail for want of this one
                    report(1)
                    continue
                done[one.name] = made_so
                _write(folder / _DONE, done)
            if one.has_json:
                measured.setdefault(one.measurement, []).append(read_json(path, f"delete {path}"))
            report(1)
    settings = {name: getattr(arguments, name) for name in ("kinds", "sae_tokens", "limit", "tokens", "text")}
    result = {
        "topk": arguments.topk,
        "base": arguments.base,
        "steps": sorted(set(of_runs)),
        "settings": {name: value for name, value in settings.items() if value},
        "claims": claims.judge(measured, missing),
    }
    _write(folder / _RESULT, result)


def _write(path: Path, content: Any) -> None:
    with disk_errors_are_user_errors(f"writing {path}"):
        write_atomically(path, (json.dumps(survey.without_nan(content), indent=1) + "\n").encode())


def _commands(
    arguments: argparse.Namespace, folder: Path, config: Config, steps: Sequence[int]
) -> Iterator[_Command]:
    """Yields all commands, in an order in which each finds what it reads."""
    topk, base, keep = arguments.topk, arguments.base, str(config.model.topk_k)

    def given(flag: str, value: Any) -> list[str]:
        return [] if value is None else [flag, str(value)]

    texts = [part for text in arguments.text for part in ("--text", text)]
    limit = given("--limit", arguments.limit)
    yield _Command("capabilities", "capabilities", ["eval", *topk, "--against", *base, *texts, *limit])
    saes, kinds = list[str](), arguments.kinds.split(",")
    tokens = given("--tokens", arguments.sae_tokens)
    layers = ",".join(map(str, range(config.model.n_topk_layers)))
    for number, (run, step) in enumerate(zip(base, steps[len(topk) :], strict=True)):
        # Other settings are other autoencoders: they have folders of their own.
        ends = f"k{keep}-{arguments.sae_tokens or 'default'}-step{step}"
        own = [folder / "sae" / f"{kind}-{number}-{ends}" for kind in kinds]
        for kind, out in zip(kinds, own, strict=True):
            how = ["--kind", kind, "--k", keep, "--seed", str(number), "--out", str(out), *tokens]
            if not (out / sae_folder.FILE).exists():
                how += ["--resume"] if (out / sae_folder.STATE).exists() else []
                yield _Command(f"sae-{kind}-{number}", "dictionaries", ["sae", "train", run, *how], False)
        how = ["--run", run, "--together", layers, *given("--tokens", arguments.tokens)]
        yield _Command(f"dictionaries-{number}", "dictionaries", ["sae", "measure", *map(str, own), *how])
        saes += map(str, own)
    how = [*given("--conllu", arguments.conllu), *given("--tokens", arguments.tokens), "--no-steering"]
    card = ["neurons", "card", topk[0], "--against", *topk[1:], *base, "--sae", *saes, *how]
    yield _Command("card", "card", card)
    for number, (ours, theirs) in enumerate(zip(topk, base, strict=True)):
        yield _Command(f"harvest-{number}", "steering", ["neurons", "harvest", ours], False)
        of_base = ["neurons", "harvest", theirs, "--keep", keep]
        yield _Command(f"harvest-base-{number}", "steering", of_base, False)
        yield _Command(f"steering-{number}", "steering", ["steer", ours, "--survey", "--against", theirs])
    for number, run in enumerate((*topk, *base)):
        there = tables.names(local_path(run, "RUN"))
        for name in _TRACED if run in base else ("",):
            which = ["--dictionary", name] if name else []
            if name in _CHAINED:
                which += ["--steps", ",".join(map(str, claims.late_steps(read.readable(run))))]
            if "-".join(filter(None, (tables.PLAIN, name))) not in there:
                how = ["trace", "run", run, "--no-language", *which]
                yield _Command(f"trace-{name}{number}", "formation", how, False)
    for number, (ours, theirs) in enumerate(zip(topk, base, strict=True)):
        yield _Command(f"formation-{number}", "formation", ["trace", "report", ours, "--against", theirs])
        after = (number + 1) % len(topk)
        if after == number:
            continue
        yield _Command(
            f"stability-{number}", "stability", ["trace", "report", ours, "--against", topk[after]]
        )
        for name in _TRACED:
            pair = ["trace", "report", theirs, "--dictionary", name, "--against", base[after]]
            yield _Command(f"stability-{name}-{number}", "stability", pair)


def _run(one: _Command, path: Path, quiet: bool) -> str:
    """Runs a command; returns why it failed, "" if it did not. An interruption ends the study too.

    Its progress is shown, unless `quiet`.
    """
    command = [
        sys.executable,
        "-m",
        "topklm",
        *one.arguments,
        *(["--json", str(path)] if one.has_json else []),
    ]
    output = subprocess.DEVNULL if quiet else None
    process: subprocess.Popen[str] | None = None
    try:
        with signals_wait():
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, text=True)
        _, errors = process.communicate()
    except KeyboardInterrupt as e:
        if process is not None:
            if isinstance(e, Terminated):
                process.terminate()  # a terminal sends Ctrl-C to both
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_TO_END)
            process.kill()
        raise
    if process.returncode in (EXIT_INTERRUPTED, EXIT_TERMINATED):
        raise KeyboardInterrupt
    if process.returncode:
        lines = errors.strip().splitlines() or [f"exit code {process.returncode}"]
        return f"topklm {one.arguments[0]}: {lines[-1].removeprefix('error: ')}"
    return ""
