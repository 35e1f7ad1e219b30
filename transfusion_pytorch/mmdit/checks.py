"""What is wrong with arguments, tokens, times and conditions, by the name of the input."""

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor, nn

from transfusion_pytorch.network.linear import is_plain_linear
from transfusion_pytorch.network.precision import precise
from transfusion_pytorch.network.shortcuts import is_plain


def check_modalities(dims: Sequence[int]) -> tuple[int, ...]:
    """The widths of the modalities."""
    if isinstance(dims, int) or not isinstance(dims, Sequence):
        raise TypeError(f"dim_modalities must be a tuple with the width of each modality, got {dims!r}")
    if not dims:
        raise ValueError("dim_modalities is empty: there must be at least one modality")
    for i, dim in enumerate(dims):
        if dim < 1:
            raise ValueError(f"dim_modalities: the width of modality {i} must be positive, got {dim}")
    return tuple(dims)


def check_positive(**sizes: float | None) -> None:
    """Raises `ValueError` that names the argument for a size below 1. None is one that is left out."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} must be positive, got {size}")


def check_numbers(name: str, numbers: Sequence[int], count: int) -> None:
    """Raises `ValueError` unless all `numbers` of modalities or blocks are among the `count` that there are."""
    if wrong := [number for number in numbers if not 0 <= number < count]:
        raise ValueError(f"{name}: expected numbers from 0 to {count - 1}, got {wrong[0]}")


def per_modality(name: str, value: object, count: int) -> tuple:
    """A value for each modality: one that is given for all, or a sequence with one for each."""
    if not isinstance(value, Sequence):
        return (value,) * count
    if len(value) != count:
        raise ValueError(f"{name}: expected one for each of {count} modalities, or one for all, got {len(value)}")
    return tuple(value)


def check_is_sequence(name: str, values: object) -> None:
    """Raises `TypeError` for what has no entry for each modality, such as the tensor of one modality alone."""
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a tuple with an entry for each modality, got {type(values).__name__}")


def check_one_each(name: str, values: Sequence | None, count: int) -> None:
    """Raises `TypeError` or `ValueError` unless there is an entry for each modality of the call, or None for all."""
    if values is None:
        return
    check_is_sequence(name, values)
    if len(values) != count:
        raise ValueError(f"{name}: expected one entry for each of {count} modalities in the call, got {len(values)}")


def check_tokens(tokens: Sequence[Tensor], dims: Sequence[int], first: int = 0) -> tuple[int, ...]:
    """The length of each modality. `first` is the number of the first one, for errors.

    Raises `TypeError` or `ValueError` that names the modality for anything but floating point `(*batch, s_i, d_i)`.
    """
    check_is_sequence("modality_tokens", tokens)
    if len(tokens) != len(dims):
        raise ValueError(f"modality_tokens: expected {len(dims)} modalities of widths {tuple(dims)}, got {len(tokens)}")
    for i, (x, dim) in enumerate(zip(tokens, dims, strict=True), start=first):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"modality {i}: expected a floating point tensor (*batch, tokens, {dim}), got {kind}")
        if x.ndim < 2 or x.shape[-1] != dim:
            raise ValueError(f"modality {i}: expected tokens of shape (*batch, tokens, {dim}), got {tuple(x.shape)}")
        if 0 in x.shape:
            raise ValueError(f"modality {i}: expected at least one token and sample, got {tuple(x.shape)}")
        if x.shape[:-2] != tokens[0].shape[:-2]:
            raise ValueError(
                f"modality {i}: expected the batch dimensions {tuple(tokens[0].shape[:-2])} of modality {first}, got "
                f"{tuple(x.shape[:-2])}"
            )
    return tuple(x.shape[-2] for x in tokens)


def check_dtype(i: int, x: Tensor, layer: nn.Module) -> None:
    """Raises `TypeError` for tokens of another type than the weights of the layer that takes them, unless something
    casts them: autocast, a quantised weight, or a hook.
    """
    if not isinstance(layer, nn.Linear) or not is_plain(layer.weight) or x.dtype == layer.weight.dtype:
        return
    if not torch.is_autocast_enabled(x.device.type) and is_plain_linear(layer):
        raise TypeError(f"modality {i}: expected tokens of {layer.weight.dtype}, as the weights are, got {x.dtype}")


def check_condition(name: str, cond: object, batch: torch.Size, length: int, dim_cond: int) -> None:
    """Raises `TypeError` or `ValueError` unless a condition is `(*batch, c)` or `(*batch, length, c)`. Dimensions of 1
    are for all, and leading ones may be left out.
    """
    if not isinstance(cond, Tensor) or not cond.is_floating_point():
        kind = cond.dtype if isinstance(cond, Tensor) else type(cond).__name__
        raise TypeError(f"{name}: expected a floating point tensor of {dim_cond} channels, got {kind}")
    wanted = (*batch, length, dim_cond)
    shape = cond.shape if cond.ndim == len(wanted) else (*cond.shape[:-1], 1, *cond.shape[-1:])
    fits = 2 <= len(shape) <= len(wanted) and shape[-1] == dim_cond
    if not fits or any(size not in (1, most) for size, most in zip(shape[-2::-1], wanted[-2::-1], strict=False)):
        raise ValueError(f"{name}: expected the shape {(*batch, dim_cond)} or {wanted}, got {tuple(cond.shape)}")


def check_times(timestep: object, batch: torch.Size, total: int, num_times: int, like: Tensor) -> list[Tensor]:
    """The times of each conditioning variable: `()`, `(b,)` or `(b, total)`, batch dimensions as one.

    Raises `TypeError` or `ValueError` for times that are missing, or that do not fit to the tokens.
    """
    if timestep is None:
        raise ValueError(
            f"timestep is missing: expected a number, or a tensor of shape {tuple(batch)} (one for each sample) or "
            f"{(*batch, total)} (one for each token)" + (f", {num_times} of them in a tuple" if num_times > 1 else "")
        )
    times = tuple(timestep) if isinstance(timestep, (tuple, list)) else (timestep,)
    if len(times) != num_times:
        raise ValueError(
            f"timestep: expected {num_times} in a tuple, one for each conditioning variable (timestep_embed_dim), got "
            f"{len(times)}"
        )
    return [
        _one_time(each, batch, total, f"timestep {i}" if num_times > 1 else "timestep", like)
        for i, each in enumerate(times)
    ]


def _one_time(time: object, batch: torch.Size, total: int, name: str, like: Tensor) -> Tensor:
    dtype = precise(like.dtype)
    if not isinstance(time, Tensor):
        if isinstance(time, bool) or not isinstance(time, (int, float, Real)):
            raise TypeError(f"{name} must be a number or a tensor of numbers, got {type(time).__name__}")
        return torch.tensor(float(time), dtype=dtype, device=like.device)
    if time.dtype == torch.bool or time.is_complex():
        raise TypeError(f"{name} must be a number or a tensor of numbers, got {time.dtype}")
    time = time.to(device=like.device, dtype=dtype)
    flat = batch.numel()
    if time.ndim == 0:
        return time
    if time.shape == batch:
        return time.reshape(flat)
    if time.shape == (*batch, total):
        return time.reshape(flat, total)
    raise ValueError(
        f"{name}: expected a number, or the shape {tuple(batch)} (one for each sample) or {(*batch, total)} (one for "
        f"each token of all modalities), got {tuple(time.shape)}"
    )
