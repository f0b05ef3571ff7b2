"""`topklm import`: makes a run of a Hugging Face folder."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from topklm.commands import shared
from topklm.commands.shared import Output
from topklm.imports import when_used
from topklm.storage.files import local_path, new_folder

with when_used():
    from topklm.convert import huggingface
    from topklm.data import tokenizer as tokenizer_lib
    from topklm.inference import load

if TYPE_CHECKING:
    from topklm.convert.huggingface import Model

DESCRIPTION = (
    "Makes a run, at step 0, of the model in a Hugging Face folder: Llama 1 to 3 and models of its kind "
    "(SmolLM2, TinyLlama), Qwen 3, or one that topklm exported. Needs safetensors, and no torch."
)
EXAMPLE = "topklm import hf:HuggingFaceTB/SmolLM2-135M --out runs/smollm2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = shared.flags(parser)
    add("folder FOLDER", "with config.json, safetensors and a tokenizer, or hf:ORG/NAME")
    add("--out RUN", "the run folder to be made", required=True)
    add("--tokenizer FILE", "another tokenizer.json than the folder's; default the folder's own")
    shared.flags(parser, "json")


def run(arguments: argparse.Namespace) -> None:
    output = Output(arguments.json)
    out = local_path(arguments.out, "--out")
    with new_folder(out) as folder:
        given = arguments.tokenizer and tokenizer_lib.open_tokenizer(arguments.tokenizer)
        found = huggingface.read(arguments.folder, tokenizer=given or None)
        load.create_run(folder, found)
    facts = {
        "run": str(out),
        "step": found.step,
        "model": found.config.to_dict()["model"],
        "notes": found.notes,
    }
    output.give(facts, lambda: _show(output, out, found))


def _show(output: Output, out: Path, found: "Model") -> None:
    m = found.config.model
    output.say(f"{out}: {m.n_layers} layers, {m.d_model} wide, {m.vocab_size:,} tokens, at step {found.step}")
    for note in found.notes:
        output.say(f"note: {note}")
    if not m.n_topk_layers:
        output.say(
            "note: as a TopK LM it must be trained on, beginning with topk_activation=abs and a large k: its "
            "states are signed, and relu would cut half of them off. docs/convert.md says how"
        )
    output.say(f'next: topklm generate {out} "The city of"')
