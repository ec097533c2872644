"""python tests/gradients_of_a_step.py FILE FLAGS: runs train.py and writes the gradients of its first step to FILE.

They are recorded where they are clipped, so they are means over all processes and micro-batches. All images are sampled
at the same random points, in every process.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

import losses_zs3
import train

path, sys.argv = Path(sys.argv[1]), [sys.argv[0], *sys.argv[2:]]


def same_points(batch: int, count: int, device: torch.device) -> torch.Tensor:
    points = torch.rand(count, 2, generator=torch.Generator().manual_seed(count))
    return (2 * points - 1).expand(batch, -1, -1).to(device)


clip = Accelerator.clip_grad_norm_


def recorded(self: Accelerator, parameters, max_norm: float) -> torch.Tensor:
    if self.is_main_process and not path.exists():
        model = self.unwrap_model(self._models[0])
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        save_file(grads, path, metadata={"num_processes": str(self.num_processes)})
    return clip(self, parameters, max_norm)


losses_zs3.random_points = same_points
Accelerator.clip_grad_norm_ = recorded
train.main()
