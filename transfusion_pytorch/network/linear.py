"""Linear layers and convolutions: those of torch, in whose place they can be loaded and replaced.

On a CPU without instructions for low precision their products are made as `cpu/products.py` says.

i and o features.
"""

from typing import TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Shaped
from torch import Tensor, nn

from transfusion_pytorch.network.cpu.products import emulated, linear
from transfusion_pytorch.network.precision import working_dtype
from transfusion_pytorch.network.shortcuts import is_plain, is_untouched, uses_cpu_kernels


class Linear(nn.Linear):
    def forward(self, x: Shaped[Tensor, "... i"]) -> Shaped[Tensor, "... o"]:
        if uses_cpu_kernels(x) and is_plain(self.weight):
            return linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether its weight and bias are all there is to a layer."""
    return is_untouched(module, nn.Linear, Linear) and is_plain(module.weight)  # type: ignore[arg-type]


class Convolution(nn.Module):
    """Mixed into a convolution: a low precision that is only emulated is raised to that of the weights."""

    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        dtype = working_dtype(x)
        if self.weight.dtype == dtype or not uses_cpu_kernels(x) or not emulated(dtype, "cpu"):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(dtype).to(self.weight.dtype)).to(dtype)


class Conv1d(Convolution, nn.Conv1d): ...


class Conv2d(Convolution, nn.Conv2d): ...


class Conv3d(Convolution, nn.Conv3d): ...
