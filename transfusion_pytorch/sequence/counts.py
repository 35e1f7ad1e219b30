"""How many targets there are, by which sums of errors are divided."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class TargetCounts:
    """The targets of one batch or of several: `sum(counts)` and `+` add up.

    - `text`: ids to predict
    - `latents`: numbers (latents times channels) of each modality that are noised
    - `decoded`: numbers that these decode to, of each modality; zeros unless there is a reconstruction loss
    - `processes`: over how many processes the counts have been summed up by `all_reduce`; 0 where they are one's own

    With `sample_weights` a target counts by the weight of its sample. All are tensors on one device.
    """

    text: Float[Tensor, ""]
    latents: Float[Tensor, " modalities"]
    decoded: Float[Tensor, " modalities"]
    processes: int = 0

    def __add__(self, other: Any) -> "TargetCounts":
        if not isinstance(other, TargetCounts):
            return NotImplemented
        if self.processes != other.processes:
            raise ValueError(
                f"counts of {self.processes or 'one'} and {other.processes or 'one'} processes do not add up; "
                "call all_reduce() once, on the sum"
            )
        device = self.text.device
        mine, theirs = self.as_tensor(), other.as_tensor().to(device)
        return self.from_tensor(mine + theirs, processes=self.processes)

    def __radd__(self, other: Any) -> "TargetCounts":
        return self if other == 0 else NotImplemented  # sum() begins with 0

    def all_reduce(self, group: Any = None, *, device: torch.device | str | None = None) -> "TargetCounts":
        """Summed up over the processes of a group; as they are where nothing is distributed.

        `device` is where the group communicates (that of the counts by default). Call it once per optimizer step.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self
        if self.processes:
            raise ValueError("these counts have been summed up over all processes already")
        counts = self.as_tensor().to(device or self.text.device, copy=True)
        dist.all_reduce(counts, group=group)
        return self.from_tensor(counts, processes=dist.get_world_size(group))

    def as_tensor(self) -> Float[Tensor, " counts"]:
        """All in one row."""
        return torch.cat((self.text[None], self.latents, self.decoded))

    @classmethod
    def from_tensor(cls, counts: Float[Tensor, " counts"], *, processes: int = 0) -> "TargetCounts":
        """The inverse of `as_tensor`."""
        latents, decoded = counts[1:].chunk(2)
        return cls(counts[0], latents, decoded, processes)

    def to(self, device: torch.device | str) -> "TargetCounts":
        return self.from_tensor(self.as_tensor().to(device, non_blocking=True), processes=self.processes)
