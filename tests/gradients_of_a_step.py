"""The gradients of a training's first step, for test_train.py. Its processes call `record_gradients` first."""

from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

import losses_zs3


def same_points(batch: int, count: int, device: torch.device) -> torch.Tensor:
    points = torch.rand(count, 2, generator=torch.Generator().manual_seed(count))
    return (2 * points - 1).expand(batch, -1, -1).to(device)


def record_gradients(path: Path) -> None:
    """Writes them to a file, from where they are clipped: they are means over all processes and micro-batches.

    All images are sampled at the same random points, in every process.
    """
    clip = Accelerator.clip_grad_norm_

    def recorded(self: Accelerator, parameters, max_norm: float) -> torch.Tensor:
        if self.is_main_process and not path.exists():
            model = self.unwrap_model(self._models[0])
            grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
            save_file(grads, path, metadata={"num_processes": str(self.num_processes)})
        return clip(self, parameters, max_norm)

    losses_zs3.random_points = same_points
    Accelerator.clip_grad_norm_ = recorded
