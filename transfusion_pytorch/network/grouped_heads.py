"""Query heads that share keys and values, where a kernel wants as many of these.

g samples, h query heads, k key/value heads, s keys, e channels of a head.
"""

from jaxtyping import Shaped
from torch import Tensor


def one_for_each_head(q: Shaped[Tensor, "g h t e"], shared: Shaped[Tensor, "g k s e"]) -> Shaped[Tensor, "g h s e"]:
    """Keys or values that several query heads share, repeated for each of them."""
    groups = q.shape[1] // shared.shape[1]
    return shared if groups == 1 else shared[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)


def one_for_each_key(
    gradient: Shaped[Tensor, "g h s e"], shared: Shaped[Tensor, "g k s e"]
) -> Shaped[Tensor, "g k s e"]:
    """The way back for gradients: what the heads that share a key want of it, added up."""
    kv_heads = shared.shape[1]
    return gradient if gradient.shape[1] == kv_heads else gradient.unflatten(1, (kv_heads, -1)).sum(dim=2)
