"""Choosing the next token, for many rows at once, each with its own options.

r rows that write, v vocabulary.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from transfusion_pytorch.generation.options import SamplingOptions

GREEDY_BELOW = torch.finfo(torch.float32).tiny
NO_CHOICE = -1


def penalize(logits: Float[Tensor, "r v"], seen: Bool[Tensor, "r v"], penalty: Float[Tensor, "r 1"]):
    """Makes what was `seen` less likely (CTRL, arXiv 1909.05858)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Float[Tensor, "r v"], k: Int[Tensor, "r 1"]) -> Float[Tensor, "r v"]:
    """Keeps the `k` likeliest tokens of each row, and what ties with the last of them."""
    k = k.clamp(max=logits.shape[-1])
    ranked = logits.topk(int(k.max()), dim=-1).values
    return logits.masked_fill(logits < ranked.gather(-1, k - 1), float("-inf"))


def keep_top_p(logits: Float[Tensor, "r v"], p: Float[Tensor, "r 1"]) -> Float[Tensor, "r v"]:
    """Keeps the likeliest tokens until they have the probability `p` together (arXiv 1904.09751), and at least one."""
    ranked, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(dim=-1) - ranked
    drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, (before >= p) & (before > 0) & (p < 1))
    return logits.masked_fill(drop, float("-inf"))


def keep_min_p(logits: Float[Tensor, "r v"], min_p: Float[Tensor, "r 1"]) -> Float[Tensor, "r v"]:
    """Keeps the tokens that are at least `min_p` times as likely as the likeliest (arXiv 2407.01082)."""
    likeliest = logits.amax(dim=-1, keepdim=True)
    return logits.masked_fill(logits < likeliest + min_p.log(), float("-inf"))


def filter_logits(logits: Float[Tensor, "r v"], options: Sequence[SamplingOptions]) -> Float[Tensor, "r v"]:
    """Cuts off what each row's options rule out. A filter that no row asks for is not run."""
    size = logits.shape[-1]
    if any(row.text_top_k is not None for row in options):
        logits = keep_top_k(logits, _column(logits, [min(row.text_top_k or size, size) for row in options]).long())
    if any(row.text_top_p < 1 for row in options):
        logits = keep_top_p(logits, _column(logits, [row.text_top_p for row in options]))
    if any(row.text_min_p > 0 for row in options):
        logits = keep_min_p(logits, _column(logits, [row.text_min_p for row in options]))
    return logits


def sample_tokens(
    logits: Shaped[Tensor, "r v"],
    allowed: Bool[Tensor, "#r v"],
    options: Sequence[SamplingOptions],
    uniform: Sequence[float],
    seen: Bool[Tensor, "r v"] | None = None,
) -> list[int]:
    """A token for each row among those `allowed`, or `NO_CHOICE` where its logits are not finite.

    `uniform` is a random number in [0, 1) for each row: what a row becomes hangs on its own alone.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if seen is not None:
        logits = penalize(logits, seen, _column(logits, [row.text_repetition_penalty for row in options]))
    logits = logits.masked_fill(~allowed, float("-inf"))
    likeliest, tokens = logits.max(dim=-1)
    if any(row.text_temperature > GREEDY_BELOW for row in options):
        logits = filter_logits(logits, options) - likeliest[:, None]  # at most 0, so that any temperature can divide it
        greedy = torch.tensor([row.text_temperature < GREEDY_BELOW for row in options], device=logits.device)
        temperature = _column(logits, [max(row.text_temperature, GREEDY_BELOW) for row in options])
        drawn = _draw(logits / temperature, uniform)
        tokens = torch.where(greedy, tokens, drawn)
    return torch.where(likeliest.isfinite(), tokens, NO_CHOICE).tolist()


def _column(logits: Float[Tensor, "r v"], values: Sequence[float]) -> Float[Tensor, "r 1"]:
    """A number for each row, as precise as the logits, and finite."""
    column = torch.tensor(values, dtype=torch.float64, device="cpu")[:, None].clamp(max=torch.finfo(logits.dtype).max)
    return column.to(logits)


def _draw(logits: Float[Tensor, "r v"], uniform: Sequence[float]) -> Int[Tensor, " r"]:
    """The inverse of the cumulative distribution, which needs one random number a row however large the vocabulary."""
    precise = torch.float32 if logits.device.type == "mps" else torch.float64  # which that device has not
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1, dtype=precise)
    at = torch.tensor(uniform, dtype=torch.float64, device="cpu").clamp(max=1 - 1e-7)[:, None].to(cumulative)
    return torch.searchsorted(cumulative, at * cumulative[:, -1:], right=True).flatten()
