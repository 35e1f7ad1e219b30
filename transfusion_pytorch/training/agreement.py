"""What the processes of a training must know of each other before they compute a step, in one exchange."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from transfusion_pytorch.data.loader import LoadedStep
from transfusion_pytorch.data.loading import Skipped
from transfusion_pytorch.sequence.batch import Batch
from transfusion_pytorch.sequence.counts import TargetCounts
from transfusion_pytorch.sequence.packer import Packer
from transfusion_pytorch.training.collate import Packed
from transfusion_pytorch.training.launch import Launch
from transfusion_pytorch.training.sources import idle_batch


class Agreement(NamedTuple):
    """What all processes know of a step.

    - `has_skipped`: some process has left samples out
    - `has_samples`: some process has samples
    - `is_stopped`: some process was asked to stop
    - `counts`: the targets of all micro-batches of all processes
    - `kinds`: the losses that have any of these: `text`, `flow_0`, `velocity_0`, `recon_0`, `flow_1`, ...
    """

    has_skipped: bool
    has_samples: bool
    is_stopped: bool
    counts: TargetCounts
    kinds: frozenset[str]


class AgreedStep(NamedTuple):
    """A step that can be computed.

    - `batches`: the micro-batches of this process, as many as every other has; empty if no process has a sample
    - `skipped`: what this process has left out
    """

    batches: list[Batch]
    skipped: list[Skipped]
    agreement: Agreement


class StepAgreement:
    """Asks all processes about each step. `idle` is what one without samples computes, if there was any."""

    def __init__(self, model: Any, packer: Packer, launch: Launch) -> None:
        self.model, self.packer, self.launch = model, packer, launch
        self.idle: Batch | None = None

    def __call__(self, loaded: LoadedStep, *, is_stopped: bool) -> AgreedStep:
        """All processes must call this with the same step. Alone, nothing is exchanged."""
        packs = [packed if packed is not None else Packed(None, []) for packed in loaded.batches]
        skipped = [*loaded.skipped, *(entry for packed in packs for entry in packed.skipped)]
        batches = [packed.batch for packed in packs if packed.batch is not None]
        agreement = self._exchange(batches, (bool(skipped), bool(batches), is_stopped))
        if self.launch.size > 1 and agreement.has_samples:
            batches += [self._idle_batch() for _ in range(len(packs) - len(batches))]
        return AgreedStep(batches, skipped, agreement)

    def _exchange(self, batches: Sequence[Batch], flags: tuple[bool, bool, bool]) -> Agreement:
        """Flags and counts are added up over all processes, and read from the device once."""
        exact = torch.float32 if self.launch.device.type == "mps" else torch.float64
        counts = torch.zeros(1 + 2 * self.model.num_modalities, dtype=exact)
        for batch in batches:
            counts += batch.counts.as_tensor()
        together = self.launch.sum(torch.cat((torch.tensor(flags, dtype=exact), counts)))
        has_skipped, has_samples, is_stopped, *numbers = together.tolist()
        counts = TargetCounts.from_tensor(together[len(flags) :], processes=_summed_over(self.launch))
        return Agreement(has_skipped > 0, has_samples > 0, is_stopped > 0, counts, _kinds_of(numbers))

    def _idle_batch(self) -> Batch:
        if self.idle is None:
            self.idle = idle_batch(self.model, self.packer)
        return self.idle


def _summed_over(launch: Launch) -> int:
    """As `TargetCounts.processes` says it."""
    return launch.size if launch.size > 1 else 0


def _kinds_of(numbers: Sequence[float]) -> frozenset[str]:
    """Names of what has targets, from `TargetCounts.as_tensor()`."""
    text, *rest = numbers
    latents, decoded = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    found = ["text"] if text > 0 else []
    for kind, sizes in (("flow", latents), ("velocity", latents), ("recon", decoded)):
        found += [f"{kind}_{modality}" for modality, size in enumerate(sizes) if size > 0]
    return frozenset(found)
