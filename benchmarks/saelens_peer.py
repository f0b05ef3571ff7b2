"""Trains sparse autoencoders with SAELens, for `benchmarks.sae_synthetic` and `benchmarks.sae_speed`.

PYTHON saelens_peer.py STATES.npy, with a Python that has sae-lens and need not have topklm. The array is
float32[N, D].

The first line that this writes says which versions there are. For every line of JSON on the standard input
(`kind`, `width`, `k`, `learning_rate`, `decay_steps`, `minibatch`, `samples`, `seed`, `out`) it trains one
autoencoder on the first samples, in their order, as `sae_lens.synthetic.train_toy_sae` does, and answers with
a line of JSON: the `seconds` of the training itself. With `out`, arrays are saved there: W_enc, b_enc, W_dec,
b_dec, and for all kinds but topk `threshold`.
"""

import contextlib
import importlib.metadata
import io
import json
from pathlib import Path
import sys
import time
from typing import Any

import numpy as np
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
import torch

_INNER = (32, 8, 2)  # the width of all is so many times that of an inner one, as in SynthSAEBench
# As in SynthSAEBench, but for its controller of the coefficient, which SAELens lacks.
_JUMPRELU = {"jumprelu_bandwidth": 2.0, "jumprelu_init_threshold": 0.5, "decoder_init_norm": 0.5}


def autoencoder(kind: str, d_in: int, width: int, k: int, samples: int) -> Any:
    """Makes an untrained autoencoder with SAELens' own settings, or SynthSAEBench's where it has some."""
    sizes = {"d_in": d_in, "d_sae": width}
    if kind == "topk":
        return TopKTrainingSAE(TopKTrainingSAEConfig(**sizes, k=k))
    if kind == "batchtopk":
        return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**sizes, k=k))
    if kind == "matryoshka":
        widths = [*(width // inner for inner in _INNER), width]
        return MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(
                **sizes, k=k, matryoshka_widths=widths, use_matryoshka_aux_loss=True
            )
        )
    config = JumpReLUTrainingSAEConfig(
        **sizes,
        **_JUMPRELU,
        jumprelu_sparsity_loss_mode="quadratic",
        target_l0=k,
        l0_warm_up_steps=samples // 1024 // 3,
    )
    return JumpReLUTrainingSAE(config)


def train(states: np.ndarray, task: dict[str, Any]) -> tuple[float, Any]:
    """Trains one autoencoder; returns seconds, and the autoencoder."""
    torch.manual_seed(task["seed"])
    samples, minibatch = task["samples"], task["minibatch"]
    sae = autoencoder(task["kind"], states.shape[1], task["width"], task["k"], samples)
    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=samples,
        device="cpu",
        autocast=False,
        lr=task["learning_rate"],
        lr_end=task["learning_rate"],
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=task.get("decay_steps", 0),
        n_restart_cycles=1,
        train_batch_size_samples=minibatch,
        dead_feature_window=1000,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False, eval_every_n_wandb_logs=2**31 - 1),
        n_batches_for_norm_estimate=1000,
    )
    batches = (
        torch.from_numpy(np.ascontiguousarray(states[begin : begin + minibatch]))
        for begin in range(0, samples, minibatch)
    )
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=batches, save_checkpoint_fn=lambda path: None)
    began = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        trainer.fit()
    return time.perf_counter() - began, sae


def main() -> None:
    """Answers line by line."""
    states = np.load(sys.argv[1], mmap_mode="r")
    answers, sys.stdout = sys.stdout, sys.stderr
    versions = {name: importlib.metadata.version(name) for name in ("sae-lens", "torch")}
    print(json.dumps({**versions, "threads": torch.get_num_threads()}), file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        seconds, sae = train(states, task)
        if task.get("out"):
            sae.fold_W_dec_norm()  # so that codes need no more than what is saved
            content = dict(sae.state_dict())
            sae.process_state_dict_for_saving_inference(content)
            np.savez(Path(task["out"]), **{name: value.detach().numpy() for name, value in content.items()})
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main()
