"""Latent statistics: mean and standard deviation of each channel, so that flow matching sees unit variance.

Outside of the network latents have the scale of their encoder; inside they are `(x - mean) / std`. Noise is drawn with
unit variance, so without this latents of a standard deviation of 8 begin at a flow loss of 65.

k latents of one modality, c their channels.
"""

import warnings
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from transfusion_pytorch.network.precision import precise
from transfusion_pytorch.sequence.samples import is_int

RESOLUTION = 1e-6  # of a mean in single precision: a channel that varies by less is constant
ENOUGH = 512  # numbers, to judge the scale of latents by
EXPECTED_STD, EXPECTED_MEAN = (0.2, 5.0), 3.0


class LatentStatistics(nn.Module):
    """Mean and standard deviation of each channel of a modality's latents, in the scale of their encoder.

    Until they are set there are none: latents pass as they are, and the `state_dict` has no entry. In single precision
    whatever the parameters have: bfloat16 has three digits.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, dim_latent: int):
        super().__init__()
        self.dim_latent = dim_latent
        self.register_buffer("mean", None)
        self.register_buffer("std", None)

    @property
    def is_set(self) -> bool:
        return self.mean is not None

    def set(self, mean: Float[Tensor, " c"] | None, std: Float[Tensor, " c"] | None) -> None:
        """Statistics `(c,)`, on the device where latents are; None and None for none. Raises `ValueError` for those of
        another number of channels, or that are not finite and positive.
        """
        if mean is None or std is None:
            self.mean, self.std = None, None
            return
        for name, value in (("mean", mean), ("std", std)):
            if value.shape != (self.dim_latent,) or not value.isfinite().all():
                raise ValueError(
                    f"{name} must be {self.dim_latent} finite numbers, one for each channel, got {value.tolist()}"
                )
        if not (std > 0).all():
            raise ValueError(f"std must be positive, got {std.tolist()}")
        self.mean, self.std = mean.detach().float().clone(), std.detach().float().clone()

    def normalize(self, latents: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
        """From the encoder's scale to that of the network."""
        if self.mean is None or self.std is None:
            return latents
        self._move_to(latents.device)
        dtype = precise(latents.dtype)
        return ((latents.to(dtype) - self.mean) / self.std).to(latents.dtype)

    def denormalize(self, latents: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
        """The inverse of `normalize`."""
        if self.mean is None or self.std is None:
            return latents
        self._move_to(latents.device)
        dtype = precise(latents.dtype)
        return (latents.to(dtype) * self.std + self.mean).to(latents.dtype)

    def _move_to(self, device: torch.device) -> None:
        """Once, after a `state_dict` of another device was loaded."""
        if self.mean is not None and self.std is not None and self.mean.device != device:
            self.mean, self.std = self.mean.to(device), self.std.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LatentStatistics":
        """Follows the model to its device, not to its dtype."""
        before = (self.mean, self.std)
        super()._apply(fn, recurse)
        for name, old in zip(("mean", "std"), before, strict=True):
            new = getattr(self, name)
            if old is not None and new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes statistics even where there are none yet, but no half of them, nor what nothing can be divided by."""
        if problem := _problem_of(state_dict.get(prefix + "mean"), state_dict.get(prefix + "std")):
            *_, errors = args
            errors.append(f"{prefix}mean and {prefix}std: {problem}")
            return
        for name in ("mean", "std"):
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and getattr(self, name) is None:
                setattr(self, name, torch.ones(self.dim_latent, dtype=torch.float32, device=saved.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _problem_of(mean: Any, std: Any) -> str:
    """What is wrong with statistics out of a file, if anything."""
    if (mean is None) != (std is None):
        return "only one of both is there"
    saved = [each for each in (mean, std) if isinstance(each, Tensor) and not each.is_meta]
    if not all(each.isfinite().all() for each in saved):
        return "they must be finite"
    return "std must be positive" if len(saved) == 2 and not (saved[1] > 0).all() else ""


def names_of_statistics(num_modalities: int) -> list[str]:
    """Their names in a model. DDP leaves out what `_ddp_params_and_buffers_to_ignore` lists: they are equal everywhere,
    and sending them would make all processes wait for one that evaluates alone.
    """
    return [f"modalities.{i}.statistics.{name}" for i in range(num_modalities) for name in ("mean", "std")]


class RunningStatistics:
    """Mean and variance of each channel over any number of batches, in double precision (Chan, Golub and LeVeque,
    1983). On the CPU: not every device has that precision.
    """

    def __init__(self, dim_latent: int):
        self.count = 0.0
        self.mean = torch.zeros(dim_latent, dtype=torch.float64, device="cpu")
        self.squares = torch.zeros_like(self.mean)  # summed squared distances from the mean

    def add(self, latents: Float[Tensor, "k c"]) -> None:
        exact = latents.detach().to("cpu", torch.float64)
        if not exact.isfinite().all():
            raise ValueError("latents contain NaN or infinity")
        mean = exact.mean(dim=0)
        self._merge(float(len(exact)), mean, (exact - mean).square().sum(dim=0))

    def _merge(self, count: float, mean: Tensor, squares: Tensor) -> None:
        if not count:
            return
        total, distance = self.count + count, mean - self.mean
        self.mean = self.mean + distance * (count / total)
        self.squares = self.squares + squares + distance.square() * (self.count * count / total)
        self.count = total

    def over_processes(self, device: torch.device) -> "RunningStatistics":
        """Those of the data of all processes, equal on each, exchanged on a device that their backend knows."""
        count = torch.tensor([self.count], dtype=torch.float64, device="cpu")
        mine = torch.cat((count, self.mean, self.squares)).to(device)
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        merged = RunningStatistics(len(self.mean))
        for each in everyone:
            count, mean, squares = each.cpu().split([1, len(self.mean), len(self.mean)])
            merged._merge(float(count), mean, squares)
        return merged

    @property
    def std(self) -> Float[Tensor, " c"]:
        """1 for a channel that is constant: it is shifted, and there is nothing to scale."""
        std = (self.squares / max(self.count, 1.0)).sqrt()
        return torch.where(std > RESOLUTION * self.mean.abs(), std, 1.0)


class StatisticsMethods:
    """How a model comes to its latent statistics. Mixed into `Transfusion`."""

    modalities: Any
    device: torch.device
    precision: torch.dtype
    _as_batch: Any

    @torch.no_grad()
    def fit_latent_statistics(
        self, dataloader: Iterable[Any], *, max_batches: int | None = None, modality_type: int | None = None
    ) -> None:
        """Measures mean and standard deviation of each channel of every modality, behind its encoder, and keeps them.

        Latents are then normalised on their way into the network and brought back on the way out, in training and in
        sampling: what you hand over and get back keeps its scale. `init_modality_noise`, `noise` and the flow loss are
        in that of the network. A constant channel is only shifted. Statistics are saved with the model; call this
        before training, and again only to train anew.

        `dataloader` gives batches as `forward` takes them (with `modality_type` for batches of floats alone), of which
        the first `max_batches` are read. A modality that they do not have stays as it is. With several processes every
        one calls this with its share of the data, and all get the same statistics.

        Raises `ValueError` where there are no latents at all.
        """
        if max_batches is not None and (not is_int(max_batches) or max_batches < 1):
            raise ValueError(f"max_batches must be a positive int or None, got {max_batches!r}")
        running = [RunningStatistics(io.spec.dim_latent) for io in self.modalities]
        for batch in islice(dataloader, max_batches):
            packed = self._as_batch(batch, False, modality_type=modality_type)
            for kind, data in packed.data.items():
                io, placement = self.modalities[kind], packed.stream.placements[kind]
                running[kind].add(io.encoded_latents(data, placement, self.precision))
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            running = [each.over_processes(self.device) for each in running]
        if not any(each.count for each in running):
            raise ValueError("there are no latents to measure: no batch has a modality, or there is no batch")
        for io, each in zip(self.modalities, running, strict=True):
            if each.count:
                io.statistics.set(each.mean.to(self.device, torch.float32), each.std.to(self.device, torch.float32))


class ScaleCheck:
    """Warns once where the latents of a modality are far from unit variance. It judges the first batch that has enough
    numbers, on a CPU only: for a GPU one would have to wait.
    """

    def __init__(self):
        self.is_done = False

    @torch.no_grad()
    def __call__(self, latents: Float[Tensor, "k c"], modality: int) -> None:
        if self.is_done or latents.device.type != "cpu" or latents.numel() < ENOUGH:
            return
        self.is_done = True
        std, mean = torch.std_mean(latents.detach().double())
        if EXPECTED_STD[0] <= std <= EXPECTED_STD[1] and abs(mean) <= EXPECTED_MEAN:
            return
        warnings.warn(
            f"modality {modality}: the latents have a standard deviation of {std:.3g} and a mean of {mean:.3g}, and "
            "flow matching expects about 1 and 0; call model.fit_latent_statistics(dataloader) before training",
            stacklevel=2,
        )
