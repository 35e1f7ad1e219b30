"""What is wrong with the tokens and times of a call, by the name of the input."""

from collections.abc import Sequence

import torch
from torch import Tensor


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


def per_modality(name: str, value: object, count: int) -> tuple:
    """A value for each modality: one that is given for all, or a sequence with one for each."""
    if not isinstance(value, Sequence):
        return (value,) * count
    if len(value) != count:
        raise ValueError(f"{name}: expected one for each of {count} modalities, or one for all, got {len(value)}")
    return tuple(value)


def check_tokens(tokens: Sequence[Tensor], dims: Sequence[int], first: int = 0) -> tuple[int, ...]:
    """The length of each modality. `first` is the number of the first one, for errors.

    Raises `TypeError` or `ValueError` that names the modality for anything but floating point `(*batch, s_i, d_i)`.
    """
    if isinstance(tokens, Tensor) or not isinstance(tokens, Sequence):
        raise TypeError(f"modality_tokens must be a tuple with a tensor for each modality, got {type(tokens).__name__}")
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
    dtype = torch.promote_types(like.dtype, torch.float32)
    if isinstance(time, (int, float)) and not isinstance(time, bool):
        return torch.tensor(float(time), dtype=dtype, device=like.device)
    if not isinstance(time, Tensor) or time.dtype == torch.bool or time.is_complex():
        kind = time.dtype if isinstance(time, Tensor) else type(time).__name__
        raise TypeError(f"{name} must be a number or a tensor of numbers, got {kind}")
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
