"""The peer's generation: Hugging Face's `generate`, greedy, with its cache of keys and values."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import numpy as np
import torch

from benchmarks.cases.decode import BATCH_SIZES, random_prompts
from benchmarks.harness.worker import Prepared, threads
from benchmarks.peers import llama
from topklm import config as config_lib


def prepare(spec: Mapping[str, Any]) -> Prepared:
    """Prepares the subjects "torch, batch N".

    Args:
        spec: `config`, with its vocabulary; `weights`, an .npz of `llama.state_dict`; `new_tokens`.
    """
    torch.set_num_threads(threads())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = config_lib.resolve(spec["config"]).model
    model: Any = llama.build(config)
    llama.load(model, np.load(spec["weights"]))
    model.to(device, getattr(torch, config.dtype)).eval()
    prompts = torch.from_numpy(random_prompts(config, max(BATCH_SIZES))).to(device)
    subjects: dict[str, Callable[[], Any]] = {
        f"torch, batch {n}": functools.partial(continuations, model, prompts[:n], spec["new_tokens"])
        for n in BATCH_SIZES
    }
    return Prepared(subjects, {"platform": device.type})


def continuations(model: Any, prompts: torch.Tensor, new_tokens: int) -> list[list[int]]:
    """Continues prompts, [B, P] -> a list of new tokens for each, the most likely one each time.

    Args:
        model: From `llama.build`; the types of `transformers` for its methods do not check.
        prompts: int64[B, P].
        new_tokens: For each prompt.
    """
    with torch.inference_mode():
        whole = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
        )
    return whole[:, prompts.shape[1] :].tolist()
