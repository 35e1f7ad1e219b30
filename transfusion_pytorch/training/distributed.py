"""Means over the batches of all processes.

e errors of different kinds.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """The processes that train one model together, each on a batch of its own.

    DDP and FSDP average gradients over the processes. A mean over the targets of all of them therefore has the local
    sum times the number of processes, over all counts, for its gradient. Its value is the true global mean: sums and
    counts travel together, in one exchange for each forward pass.
    """

    group: Any = None

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    def means(self, totals: Float[Tensor, " e"], counts: Float[Tensor, " e"]) -> Float[Tensor, " e"]:
        """Local sums over the counts of all processes."""
        gathered = torch.stack((totals.detach(), counts.to(totals.dtype)))
        dist.all_reduce(gathered, group=self.group)
        return self._scaled(totals, gathered[0], gathered[1])

    def means_over(
        self, totals: Float[Tensor, " e"], counts: Float[Tensor, " e"], processes: int
    ) -> Float[Tensor, " e"]:
        """The same over counts that are given: of several batches, and of all `processes` if they were reduced."""
        if not processes:
            raise ValueError("counts are those of this process alone; call counts.all_reduce() once per optimizer step")
        gathered = totals.detach().clone()
        dist.all_reduce(gathered, group=self.group)
        return self._scaled(totals, gathered, counts)

    def _scaled(self, totals: Tensor, gathered: Tensor, counts: Tensor) -> Tensor:
        counts = torch.where(counts > 0, counts, 1)
        local = totals * (self.size / counts)
        return local + (gathered / counts - local).detach()


def training_processes(group: Any = None) -> Processes | None:
    """The processes of this training step, None where there is one.

    The group is the given one, that of the DDP wrapper that is running, or the default one.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
    processes = Processes(group if group is not None else getattr(wrapper, "process_group", None))
    return processes if processes.size > 1 else None


def zero_gradients(modules: Iterable[nn.Module]) -> Float[Tensor, ""] | float:
    """A zero that gives every trained parameter of some modules a gradient of zeros.

    Processes wait for each other's gradients, and a batch may lack what another has.
    """
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    return sum((parameter.flatten()[:0].sum() for parameter in parameters), 0.0)  # of nothing, so never NaN
