"""Random numbers as a function of a seed and a counter, on any device; and keys of the content of tensors.

A counter has no state to keep, move or copy: number `i` of a seed is the same on every device, at any time. The
function is SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
"""

from hashlib import blake2b
from math import pi

import torch
from jaxtyping import Float, Int
from torch import Tensor

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
MIX = ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1))  # shift, then multiply


def mix(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """A bijection of 64 bits whose output looks random."""
    for shift, factor in MIX:
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor  # `>>` of int64 copies the sign: masked
    return x


def uniform(seeds: Int[Tensor, "..."], counters: Int[Tensor, "..."], device: torch.device) -> Float[Tensor, "..."]:
    """Numbers in [0, 1) with 53 random bits (24 where there is no double precision). Seeds and counters broadcast."""
    start = mix(seeds.to(device) + GOLDEN)
    bits = mix(start + (counters.to(device) + 1) * GOLDEN)
    if device.type == "mps":
        return ((bits >> 40) & 0xFFFFFF).float() * 2.0**-24
    return ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def normal(seed: int, stream: int, shape: tuple[int, ...], device: torch.device) -> Float[Tensor, "..."]:
    """Normal numbers of a given shape (Box and Muller); those of different `stream`s of a seed are independent."""
    count = torch.Size(shape).numel()
    half = (count + 1) // 2
    counters = torch.arange(2 * half, device=device) + (stream << 40)
    radius, angle = uniform(torch.tensor(seed, device="cpu"), counters, device).split(half)
    radius = (-2 * torch.log1p(-radius)).sqrt()
    angle = 2 * pi * angle
    return torch.cat((radius * angle.cos(), radius * angle.sin()))[:count].view(shape)


def content_key(tensor: Tensor) -> bytes:
    """Equal for tensors that are equal to the bit, and practically for no others. A GPU is waited for."""
    plain = tensor.detach().cpu().contiguous()
    about = f"{plain.dtype} {tuple(plain.shape)}".encode()
    return blake2b(about + plain.flatten().view(torch.uint8).numpy().tobytes(), digest_size=16).digest()
