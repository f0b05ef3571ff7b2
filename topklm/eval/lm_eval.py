"""A model in lm-evaluation-harness: all its kinds of requests; stock tasks on local files.

`python -m topklm.eval.lm_eval --model topklm --model_args run=runs/small --tasks piqa` is its own command
line with topklm among its models. It runs in one process, over all devices that it has.
"""

from collections.abc import Sequence
import difflib
import json
import logging
from pathlib import Path
import sys
from typing import Any

import numpy as np

import topklm
from topklm.errors import UserError, guarded
from topklm.eval import scoring, tasks
from topklm.eval.scoring import Request
from topklm.imports import optional_module
from topklm.inference.adaptive import with_topk_k
from topklm.inference.interventions import Intervention
from topklm.inference.language_model import LanguageModel
from topklm.layout import Layout, one_device
from topklm.neurons.documents import TextModel
from topklm.neurons.labelled_texts import lines
from topklm.storage.files import parse_json

_FLAG = "--harness"
_NEW_TOKENS = 256  # of a generated answer, where the task does not say; as in lm-evaluation-harness
_OF_RUN = ("run", "step", "topk_k")

lm_eval = optional_module("lm_eval", "eval", _FLAG)  # says what to install, before the imports below
from lm_eval import utils  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.api.registry import register_model  # noqa: E402


@register_model("topklm")
class TopKLM(TemplateLM):
    """A model of topklm, as lm-evaluation-harness wants it.

    Args:
        run: A run folder.
        step: Of its checkpoint; default the newest.
        topk_k: Neurons that each TopK keeps; default as in training.
        model: Instead of a run: a model that is loaded.
        layout: Of that model.
        steer: Interventions on its neurons.
        unused: Arguments that the harness gives to every model.
    """

    def __init__(
        self,
        run: str = "",
        step: int | str | None = None,
        topk_k: int | str | None = None,
        *,
        model: LanguageModel | None = None,
        layout: Layout | None = None,
        steer: Sequence[Intervention] | None = None,
        **unused: Any,
    ):
        super().__init__()
        known = {"batch_size", "max_batch_size", "device"}
        if wrong := sorted(set(unused) - known):
            raise UserError(f"--model_args: {wrong[0]!r} is none of {', '.join(_OF_RUN)}")
        if model is None and not run:
            raise UserError("--model_args: name a run folder, run=runs/small")
        self.layout = layout or one_device()
        self.lm = model or topklm.load(run, None if step is None else int(step), self.layout.mesh)
        config = with_topk_k(self.lm.cfg, None if topk_k is None else int(topk_k))
        self.topk_k, self.steer = config.topk_k if topk_k is not None else None, steer
        self.text_model = TextModel(config, self.lm.params, self.layout, self.lm.tokenizer.separator_id)
        self.interventions = scoring.interventions_for(config, steer)
        self.n_cut = 0  # requests whose context lost its beginning

    @property
    def eot_token_id(self) -> int:
        """The separator, which begins documents too."""
        return self.lm.tokenizer.separator_id

    @property
    def max_length(self) -> int:
        """Tokens that the model sees."""
        return self.lm.cfg.context_length

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer in the harness' caches of requests."""
        return f"topklm-{self.lm.tokenizer.sha256[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """Returns what the harness writes beside its results."""
        return {"run": self.lm.run, "step": self.lm.step, "topk_k": self.topk_k}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns the ids of a text, after a separator unless that is declined."""
        ids = self.lm.tokenizer.encode(string).tolist()
        return ids if add_special_tokens is False else [self.eot_token_id, *ids]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        pairs = [Request(np.array(a, np.int32), np.array(b, np.int32)) for _, a, b in requests]
        found = self._scores(pairs)
        results = list(zip((-found.nats).tolist(), found.is_greedy.tolist(), strict=True))
        for (text, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", text, result)
        return results

    def _scores(self, pairs: Sequence[Request]) -> scoring.Scores:
        found = scoring.score(self.text_model, pairs, self.interventions)
        assert found is not None  # nothing stops it
        self.n_cut += int(np.count_nonzero(found.n_cut))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihoods of whole texts, in windows as the harness cuts them."""
        pairs, owners = list[Request](), list[int]()
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = utils.get_rolling_token_windows(ids, self.eot_token_id, self.max_length, 1)
            for context, continuation in map(utils.make_disjoint_window, windows):
                pairs.append(Request(np.array(context, np.int32), np.array(continuation, np.int32)))
                owners.append(number)
        totals = np.bincount(owners, -self._scores(pairs).nats, len(requests)).tolist()
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues contexts; those with the same settings together."""
        texts = [""] * len(requests)
        by_settings: dict[tuple, list[int]] = {}
        for number, request in enumerate(requests):
            by_settings.setdefault(self._settings(request.args[1]), []).append(number)
        for (stop, n_new, temperature, top_p), numbers in by_settings.items():
            prompts = [self._prompt(requests[number].args[0], n_new) for number in numbers]
            made: Any = self.lm.generate(
                prompts,
                n_new,
                temperature=temperature,
                top_p=top_p,
                stop=list(stop) or None,
                steer=self.steer,
                topk_k=self.topk_k,
            )
            for number, prompt, text in zip(numbers, prompts, made, strict=True):
                texts[number] = text[len(self.lm.tokenizer.decode(prompt)) :]
                self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
        return texts

    def _prompt(self, context: str, n_new: int) -> np.ndarray:
        """Returns the ids of a context, whose beginning is cut so that the answer fits."""
        ids = np.array(self.tok_encode(context), np.int32)
        most = max(1, self.max_length - n_new)
        self.n_cut += len(ids) > most
        return ids[-most:]

    def _settings(self, given: dict[str, Any]) -> tuple[tuple[str, ...], int, float, float]:
        until = given.get("until") or ()
        stop = (until,) if isinstance(until, str) else tuple(text for text in until if text)
        temperature = float(given.get("temperature") or 0.0)
        sampled = given.get("do_sample", temperature > 0)
        n_new = int(given.get("max_gen_toks") or given.get("max_new_tokens") or _NEW_TOKENS)
        return stop, n_new, temperature if sampled else 0.0, float(given.get("top_p") or 1.0)


def run(
    model: LanguageModel,
    layout: Layout,
    names: Sequence[str],
    data: Path | None = None,
    *,
    limit: int | None = None,
    steer: Sequence[Intervention] | None = None,
    topk_k: int | None = None,
) -> dict[str, Any]:
    """Runs tasks or groups of lm-evaluation-harness, by its names, with its prompts and metrics.

    A task reads the file NAME.jsonl (also .gz, .xz) of the folder `data` instead of the hub, if there is one;
    BLiMP's paradigms that ship with topklm are read from there. Of each task `limit` items are taken. Returns
    "results", of each task its metrics; "samples", of each task its items with their answers and metrics;
    "versions" of tasks; "notes". UserError for a task that there is not, or whose data cannot be had.
    """
    from lm_eval.tasks import TaskManager  # noqa: PLC0415 - lists 14,000 files, which takes seconds

    # It warns of each of our data sets.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager()
    lm = TopKLM(model=model, layout=layout, steer=steer, topk_k=topk_k)
    notes, asked = list[str](), list[Any]()
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            there = f"; did you mean {near[0]}?" if near else "; see lm_eval ls tasks"
            raise UserError(f"lm-evaluation-harness has no such task{there}", field=_FLAG, value=name)
        parts = (manager.task_index[name].cfg or {}).get("task")
        members = [one for one in parts if isinstance(one, str)] if isinstance(parts, list) else [name]
        local = {one: rows for one in members if one in manager.task_index and (rows := _rows(one, data))}
        asked += [_on_rows(manager, one, rows) for one, rows in local.items()] or [name]
        if local and len(local) < len(members):
            n = len(members) - len(local)
            notes.append(f"{name}: {n} of its {len(members)} tasks left out, of which there is no file")
    try:
        found = lm_eval.simple_evaluate(
            model=lm, tasks=asked, task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=True
        )
    except OSError as e:
        text = f"the data of {', '.join(names)} cannot be had ({e}); give files with --data"
        raise UserError(text) from e
    if lm.n_cut:
        notes.append(f"{lm.n_cut:,} contexts were cut to the {lm.max_length:,} tokens of the model")
    return {
        "run": model.run,
        "step": model.step,
        "lm_eval": lm_eval.__version__,
        "results": {task: _metrics(of_task) for task, of_task in found["results"].items()},
        "samples": {task: [_sample(one) for one in of_task] for task, of_task in found["samples"].items()},
        "versions": found["versions"],
        "notes": notes,
    }


def _metrics(of_task: dict[str, Any]) -> dict[str, float]:
    """Returns the metrics of a task without the filters in their names, which do nothing in most tasks."""
    numbers = {key: value for key, value in of_task.items() if "," in key and isinstance(value, int | float)}
    return {
        key.removesuffix(",none"): value
        for key, value in numbers.items()
        if not key.partition(",")[0].endswith("_stderr")
    }


def _sample(one: dict[str, Any]) -> dict[str, Any]:
    answers = {"item": one["doc_id"], "answers": one["filtered_resps"]}
    return answers | {name: one[name] for name in one["metrics"] if isinstance(one[name], int | float)}


def _rows(name: str, data: Path | None) -> list[dict[str, Any]]:
    """Reads the local lines of a task; none where there is no file of it."""
    files = tasks.files_of(data, name) if data is not None else []
    paradigm = name.removeprefix("blimp_")
    if not files and paradigm != name:
        shipped = (line for path in tasks.files_of(tasks.SHIPPED, "blimp") for line in lines(path, "blimp"))
        return [row for row in map(json.loads, shipped) if row["UID"] == paradigm]
    rows = []
    for path in files:
        for number, line in enumerate(lines(path, "--data"), 1):
            try:
                rows += [parse_json(line)] if line.strip() else []
            except ValueError as e:
                raise UserError(f"{path}: line {number}: is no JSON object ({e})") from e
    return rows


def _on_rows(manager: Any, name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns a task as it ships, on these rows, in memory."""
    import datasets  # noqa: PLC0415 - of the harness
    from lm_eval.tasks._yaml_loader import load_yaml  # noqa: PLC0415

    stock = load_yaml(manager.task_index[name].yaml_path)
    split = "test_split" if stock.get("test_split") else "validation_split"

    def dataset(**_: Any) -> dict[str, Any]:
        return {"local": datasets.Dataset.from_list(rows)}

    splits = dict.fromkeys(("training_split", "validation_split", "test_split", "fewshot_split"))
    return {**stock, **splits, split: "local", "tag": None, "custom_dataset": dataset}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    sys.exit(guarded(cli_evaluate))
