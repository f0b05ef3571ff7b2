"""The peer's train step in PyTorch: Hugging Face Llama with TopK hooks, fused AdamW, eager or compiled."""

from collections.abc import Mapping
import time
from typing import Any

import numpy as np
import torch

from benchmarks.harness.shapes import random_tokens
from benchmarks.harness.worker import Prepared, threads
from benchmarks.peers import llama
from topklm import config as config_lib


def prepare(spec: Mapping[str, Any]) -> Prepared:
    """Prepares the subject "step"; facts as those of `subjects.train_step`.

    Args:
        spec: `config`, with its vocabulary; `weights`, an .npz of `llama.state_dict`; `compile`: whether
            `torch.compile` is used.
    """
    torch.set_num_threads(threads())
    config = config_lib.resolve(spec["config"])
    training = Training(config, np.load(spec["weights"]), compiled=spec["compile"])
    began = time.perf_counter()
    loss = training.step()
    facts = {
        "compile_seconds": time.perf_counter() - began,  # and one step
        "first_loss": loss,
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "platform": training.device.type,
    }
    return Prepared({"step": training.step}, facts, training.device_peak_bytes)


class Training:
    """A model, its optimizer and one batch of random tokens."""

    def __init__(self, config: config_lib.Config, weights: Mapping[str, np.ndarray], *, compiled: bool):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TensorFloat-32, as JAX has it by default
        self._config = config
        model: torch.nn.Module = llama.build(config.model)
        llama.load(model, weights)
        self.model = model.to(self.device).train()
        self._loss = torch.compile(self._plain_loss) if compiled else self._plain_loss
        self._optimizer = self._make_optimizer()
        tokens = torch.from_numpy(random_tokens(config).astype(np.int64)).to(self.device)
        self._inputs, self._targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step(self) -> float:
        """Does one step; returns the loss in nats per token."""
        self._optimizer.zero_grad(set_to_none=True)
        bfloat16 = self._config.model.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            loss = self._loss(self._inputs, self._targets)
        loss.backward()
        if self._config.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._config.optim.clip_norm)
        self._optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    def device_peak_bytes(self) -> int | None:
        """Returns the most memory taken of the GPU; None on a CPU."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None

    def _plain_loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.model(inputs).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """Makes AdamW at the learning rate of our first step; norms are not decayed."""
        settings = self._config.optim
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        scales = [p for p in self.model.parameters() if p.ndim == 1]
        return torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings.weight_decay},
                {"params": scales, "weight_decay": 0.0},
            ],
            lr=settings.learning_rate / max(settings.warmup_steps, 1),
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            fused=True,
        )
