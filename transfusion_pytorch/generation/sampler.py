"""Choosing the next id of text, for many rows at once, each with its own options.

r rows, v vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from transfusion_pytorch.generation.options import SamplingOptions
from transfusion_pytorch.network.precision import precise

GREEDY_BELOW = torch.finfo(torch.float32).tiny
NO_CHOICE = -1
NO_LIMIT = 2**31  # a top k beyond any vocabulary


class SamplingTensors(NamedTuple):
    """The text options as tensors, a number for each row; None for an option that no row uses. Where all rows are
    greedy, nothing is drawn.
    """

    all_greedy: bool
    is_greedy: Bool[Tensor, " r"] | None
    temperature: Float[Tensor, "r 1"] | None
    top_k: Int[Tensor, "r 1"] | None
    most_k: int
    top_p: Float[Tensor, "r 1"] | None
    log_min_p: Float[Tensor, "r 1"] | None
    penalty: Float[Tensor, "r 1"] | None

    @classmethod
    def of(cls, rows: Sequence[SamplingOptions], *, device: torch.device, dtype: torch.dtype) -> "SamplingTensors":
        """`dtype` is that of the logits, in single precision at least."""

        def column(values: Sequence[float], off: float) -> Tensor | None:
            if all(value == off for value in values):
                return None
            exact = torch.tensor(values, dtype=torch.float64, device="cpu")[:, None]
            return exact.clamp(max=torch.finfo(dtype).max).to(device, dtype, non_blocking=True)

        greedy = [row.text_temperature < GREEDY_BELOW for row in rows]
        ks = [NO_LIMIT if row.text_top_k is None else min(row.text_top_k, NO_LIMIT) for row in rows]
        most_k = max((k for k in ks if k < NO_LIMIT), default=0)
        min_p = column([row.text_min_p for row in rows], off=0)
        return cls(
            all_greedy=all(greedy),
            is_greedy=upload(greedy, device) if any(greedy) else None,
            temperature=column([max(row.text_temperature, GREEDY_BELOW) for row in rows], off=1),
            top_k=upload(ks, device)[:, None] if most_k else None,
            most_k=most_k,
            top_p=column([row.text_top_p for row in rows], off=1),
            log_min_p=None if min_p is None else min_p.log(),
            penalty=column([row.text_repetition_penalty for row in rows], off=1),
        )


@torch.inference_mode()
def sample_tokens(
    logits: Shaped[Tensor, "r v"],
    forbidden: Bool[Tensor, "#r v"],
    sampling: SamplingTensors,
    uniform: Float[Tensor, " r"],
    seen: Bool[Tensor, "r v"] | None = None,
) -> Int[Tensor, " r"]:
    """An id for each row, none of those `forbidden`, or `NO_CHOICE` where its logits are not finite.

    `uniform` is a random number in [0, 1) for each row, so a row does not depend on others. `seen` are the ids to be
    penalised. Nothing is read back from the device.
    """
    logits = _precise(logits)
    if seen is not None and sampling.penalty is not None:
        logits = penalize(logits, seen, sampling.penalty)
    logits = logits.masked_fill(forbidden, float("-inf"))
    likeliest, tokens = logits.max(dim=-1)
    if not sampling.all_greedy:
        logits = logits - likeliest[:, None]  # at most 0, so that any temperature can divide it
        if sampling.top_k is not None:
            logits = keep_top_k(logits, sampling.top_k, sampling.most_k)
        if sampling.top_p is not None:
            logits = keep_top_p(logits, sampling.top_p)
        if sampling.log_min_p is not None:
            logits = keep_min_p(logits, sampling.log_min_p)
        if sampling.temperature is not None:
            logits = logits / sampling.temperature
        drawn = _draw(logits, uniform)
        tokens = drawn if sampling.is_greedy is None else torch.where(sampling.is_greedy, tokens, drawn)
    return torch.where(likeliest.isfinite(), tokens, NO_CHOICE)


def penalize(
    logits: Float[Tensor, "r v"], seen: Bool[Tensor, "r v"], penalty: Float[Tensor, "r 1"]
) -> Float[Tensor, "r v"]:
    """Makes `seen` ids less likely (CTRL, arXiv 1909.05858)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Float[Tensor, "r v"], k: Int[Tensor, "r 1"], most: int) -> Float[Tensor, "r v"]:
    """Keeps the `k` likeliest tokens of each row, and those that tie with the last of them. Rows with `k > most` keep
    all.
    """
    most = min(most, logits.shape[-1])
    ranked = logits.topk(most, dim=-1).values
    threshold = ranked.gather(-1, k.clamp(max=most) - 1)
    return logits.masked_fill((logits < threshold) & (k <= most), float("-inf"))


def keep_top_p(logits: Float[Tensor, "r v"], p: Float[Tensor, "r 1"]) -> Float[Tensor, "r v"]:
    """Keeps the likeliest tokens until they have the probability `p` together (arXiv 1904.09751), and at least one."""
    ranked, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(dim=-1) - ranked
    drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, (before >= p) & (before > 0) & (p < 1))
    return logits.masked_fill(drop, float("-inf"))


def keep_min_p(logits: Float[Tensor, "r v"], log_min_p: Float[Tensor, "r 1"]) -> Float[Tensor, "r v"]:
    """Keeps the tokens that are at least `min_p` times as likely as the likeliest, whose logit is 0 (arXiv
    2407.01082).
    """
    return logits.masked_fill(logits < log_min_p, float("-inf"))


def log_probabilities(logits: Shaped[Tensor, "r v"], tokens: Int[Tensor, " r"]) -> Float[Tensor, " r"]:
    """Log-probabilities of the chosen ids under the model's own distribution over the whole vocabulary."""
    return _precise(logits).log_softmax(dim=-1).gather(-1, tokens.clamp(min=0)[:, None]).flatten()


def upload(values: Sequence[Any], device: torch.device) -> Shaped[Tensor, " r"]:
    """To the device, without waiting for it."""
    return torch.tensor(values, device="cpu").to(device, non_blocking=True)


def to_host(tokens: Int[Tensor, " r"], log_p: Float[Tensor, " r"]) -> list[tuple[int, float]]:
    """Both in one copy: ids and the bits of log-probabilities as integers of one size."""
    bits = log_p.view(torch.int64 if log_p.dtype == torch.float64 else torch.int32)
    both = torch.stack((tokens.to(bits.dtype), bits)).cpu()
    return list(zip(both[0].tolist(), both[1].view(log_p.dtype).tolist(), strict=True))


def _draw(logits: Float[Tensor, "r v"], uniform: Float[Tensor, " r"]) -> Int[Tensor, " r"]:
    """The inverse of the cumulative distribution, which needs one random number a row however large the vocabulary."""
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64  # MPS has no float64
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1, dtype=dtype)
    at = uniform[:, None].to(dtype) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True)[:, 0]


def _precise(logits: Shaped[Tensor, "r v"]) -> Float[Tensor, "r v"]:
    """In single precision at least. A conversion to the same type would be dispatched too, at every step."""
    dtype = precise(logits.dtype)
    return logits if logits.dtype == dtype else logits.to(dtype)
