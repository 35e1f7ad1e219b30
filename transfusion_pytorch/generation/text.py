"""Choosing the next token.

r rows that write, v vocabulary.
"""

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor


def min_p_filter(logits: Shaped[Tensor, "r v"], min_p: float) -> Shaped[Tensor, "r v"]:
    """Keeps the tokens that are at least `min_p` times as likely as the likeliest (arXiv 2407.01082)."""
    probabilities = logits.softmax(dim=-1)
    least = min_p * probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < least, float("-inf"))


def sample_tokens(
    logits: Shaped[Tensor, "r v"], allowed: Bool[Tensor, "#r v"], *, temperature: float, min_p: float
) -> Int[Tensor, " r"]:
    """A token for each row among those `allowed`; `temperature` 0 takes the likeliest."""
    logits = logits.float().masked_fill(~allowed, float("-inf"))
    if temperature < torch.finfo(logits.dtype).tiny:
        return logits.argmax(dim=-1)
    logits = min_p_filter(logits, min_p)
    logits = logits - logits.amax(dim=-1, keepdim=True)  # or a low temperature divides them beyond what a float holds
    return torch.multinomial((logits / temperature).softmax(dim=-1), 1).flatten()
