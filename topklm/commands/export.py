"""`topklm export`: writes a run in the format of another library."""

import argparse
from collections.abc import Callable
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from topklm.commands import runs, shared
from topklm.commands.shared import Output
from topklm.errors import UserError
from topklm.imports import when_used
from topklm.storage.files import as_path, local_path, new_folder

with when_used():
    from topklm.convert import huggingface
    from topklm.neurons import dictionary as dictionary_lib
    from topklm.neurons import harvest, saelens
    from topklm.training import throughput

if TYPE_CHECKING:
    from topklm.inference.language_model import LanguageModel

DESCRIPTION = "Writes a run as a folder that other libraries open. Needs safetensors, and no torch."
EXAMPLE = "topklm export runs/small --out exported"


@dataclasses.dataclass(frozen=True)
class Format:
    """A library's format."""

    help: str
    write: "Callable[[LanguageModel, Path, argparse.Namespace], None]"
    use: str  # the line of Python that opens the folder


def _hugging_face(model: "LanguageModel", folder: Path, arguments: argparse.Namespace) -> None:
    found = huggingface.Model(model.config, model.tokenizer, model.params, Path(model.run).name, model.step)
    huggingface.write(found, folder, arguments.dtype, _card(model, Path(arguments.out).name))


def _saelens(model: "LanguageModel", folder: Path, arguments: argparse.Namespace) -> None:
    if model.cfg.n_topk_layers:
        saelens.write_neurons(_facts(model), folder)
        return
    shared.check_on_disk(arguments.run)
    path = shared.folder_of(model).dictionary
    if not path.exists():
        raise UserError(
            f"RUN = {model.run}: is a Base LM without a dictionary: make one, topklm neurons harvest "
            f"{model.run} --dictionary sae"
        )
    layers = harvest.kind_and_layers(model.cfg)[1]
    saelens.write_dictionary(_facts(model), dictionary_lib.Dictionary.load(path), layers, folder)


def _facts(model: "LanguageModel") -> "saelens.ModelFacts":
    return saelens.ModelFacts(Path(model.run).name, model.cfg, model.tokenizer.separator_id)


def _delphi(model: "LanguageModel", folder: Path, arguments: argparse.Namespace) -> None:
    shared.check_on_disk(arguments.run)
    saelens.write_delphi(shared.open_store(shared.folder_of(model), model), folder, Path(model.run).name)


FORMATS = {
    "huggingface": Format(
        "model and tokenizer for transformers, lm-eval, nnsight, TransformerLens",
        _hugging_face,
        'transformers.AutoModelForCausalLM.from_pretrained("{out}", trust_remote_code=True)',
    ),
    "saelens": Format(
        "an identity SAE for each TopK layer; of a Base LM its harvested dictionary",
        _saelens,
        'sae_lens.SAE.load_from_disk("{out}/blocks.0.hook_resid_post")',
    ),
    "delphi": Format(
        "the harvested activations as a cache of delphi",
        _delphi,
        'delphi.latents.LatentDataset("{out}", SamplerConfig(), ConstructorConfig())',
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = shared.flags(parser, "run")
    text = "; ".join(f"{name}: {one.help}" for name, one in FORMATS.items())
    add("--format", text, "huggingface", choices=FORMATS)
    add("--out DIR", "the folder to be made", required=True)
    add("--dtype", "of the parameters of huggingface", "float32", choices=("float32", "bfloat16"))
    shared.flags(parser, "step", "json")


def run(arguments: argparse.Namespace) -> None:
    output = Output(arguments.json)
    out = local_path(arguments.out, "--out")
    with new_folder(out) as folder:
        model = shared.load_onto_one_device(arguments.run, arguments.step)
        FORMATS[arguments.format].write(model, folder, arguments)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    facts = {"out": str(out), "format": arguments.format, "files": files, "bytes": size}
    use = FORMATS[arguments.format].use.format(out=out)
    output.give(
        facts,
        lambda: output.say(f"wrote {out}: {len(files)} files, {size / 1e6:,.1f} MB; open it with\n  {use}"),
    )


def _card(model: "LanguageModel", name: str) -> str:
    """Returns README.md of an exported folder: what the model is, its figures, and how to open it."""
    m, n = model.cfg, throughput.parameter_count(model.params)
    shape = f"{m.n_layers} layers, {m.d_model} wide, context {m.context_length}, {m.vocab_size:,} tokens"
    kept = f"keeps {m.topk_k} of {m.d_model} in {m.n_topk_layers} of {m.n_layers} layers"
    found = runs.read_run(as_path(model.run, "RUN")).lines
    figures = [line for line in found if runs.BITS in line and line["step"] <= model.step]
    bits = f"{figures[-1][runs.BITS]:.4f} (after step {figures[-1]['step']:,})" if figures else "not measured"
    rows = {
        "parameters": f"{n:,}",
        "shape": shape,
        "TopK": kept if m.n_topk_layers else "none: a Base LM",
        "steps": f"{model.step:,}",
        "held-out bits per byte": bits,
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    neurons = (
        "The output of `model.model.layers[l].topk` is sparse: its entries are the neurons of layer l.\n"
        if m.n_topk_layers
        else ""
    )
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {name}\n\n"
        f"A language model trained with topklm.\n\n| | |\n|---|---|\n{table}\n\n"
        "```python\nimport transformers\n\n"
        f'model = transformers.AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)\n'
        f'tokenizer = transformers.AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)\n```\n\n'
        f"{neurons}The tokenizer puts the separator in front of a text, as in training.\n"
    )
