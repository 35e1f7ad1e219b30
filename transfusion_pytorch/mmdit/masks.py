"""Who may attend to whom: one mask over the tokens of all modalities, in their order.

n queries and m keys, which include registers where that is said; s tokens of one modality; b samples; h heads, or 1
where a mask is the same for all.

| a mask | from a caller | inside |
|---|---|---|
| the same for all samples | bool `(n, m)` | as it is |
| of each sample | bool `(*batch, n, m)` | `(b, 1, n, m)` |
| a function of `(b, h, query, key)` | | `(b, h, n, m)`, or a `BlockMask` where flex attention is used |
| `BlockMask` | | as it is, or its function where there is no flex attention |
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from transfusion_pytorch.mmdit.checks import check_one_each
from transfusion_pytorch.network.attend import choose_attention

Mask = Tensor | BlockMask
MaskFunction = Callable[..., Tensor]  # (b, h, query, key) -> whether the query sees the key, as flex attention has it


class Layout(NamedTuple):
    """The tokens of one call: how many each modality has, and what stands before them."""

    batch: int
    heads: int
    lengths: tuple[int, ...]  # of every modality, 0 for one that is not there; without registers
    registers: tuple[int, ...]  # of every modality, 0 for one that is not there
    context_lengths: tuple[int, ...]  # of the modalities whose keys and values are known already
    context_registers: tuple[int, ...]
    has_output: tuple[bool, ...]  # whether a modality still has queries in the last block
    device: torch.device

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of every modality, with registers."""
        return tuple(length + count for length, count in zip(self.lengths, self.registers, strict=True))

    @property
    def num_queries(self) -> int:
        """Without registers."""
        return sum(self.lengths)

    @property
    def num_keys(self) -> int:
        """Without registers."""
        return sum(self.context_lengths) + sum(self.lengths)


class MaskPlan(NamedTuple):
    """What the blocks of a model attend by."""

    every: Mask | None  # of all blocks but the last
    last: Mask | None  # of the last, which has no queries for modalities without output
    own: tuple[Mask | None, ...]  # for each modality that attends among itself as well (dual attention)


def plan_masks(
    attention_mask: Mask | MaskFunction | None,
    padding: Bool[Tensor, "b m"] | None,
    layout: Layout,
    *,
    use_flex: bool,
    dual: Sequence[int] = (),
) -> MaskPlan:
    """What the blocks attend by.

    `attention_mask` is without registers, and a function is not evaluated yet. `padding` is True where a key is a
    token, registers included. `dual` are the modalities with dual attention.
    """
    if isinstance(attention_mask, BlockMask):
        if padding is not None or any(layout.registers) or any(layout.context_registers):
            raise ValueError(
                "attention_mask: a BlockMask covers all tokens, and knows neither registers nor padding masks; give a "
                "bool mask or a function of (b, h, query, key)"
            )
        mask = attention_mask
    elif use_flex:
        mask = _flex_mask(attention_mask, padding, layout)
    else:
        mask = _dense_mask(attention_mask, padding, layout)
    own = tuple(_own(mask, layout, i) if i in dual else None for i in range(len(layout.lengths)))
    return MaskPlan(mask, _rows_with_output(mask, layout), own)


def _dense_mask(
    attention_mask: Tensor | MaskFunction | None, padding: Tensor | None, layout: Layout
) -> Bool[Tensor, "n m"] | Bool[Tensor, "b h n m"] | None:
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        sizes = (layout.batch, layout.heads, layout.num_queries, layout.num_keys)
        attention_mask = evaluated(attention_mask, *sizes, layout.device)
    mask = None if attention_mask is None else with_registers(attention_mask.to(layout.device), layout)
    if padding is None:
        return mask
    queries = layout.num_queries + sum(layout.registers)
    keys = padding[:, None, None].expand(-1, -1, queries, -1)
    return keys if mask is None else mask & keys


def evaluated(
    function: MaskFunction, batch: int, heads: int, queries: int, keys: int, device: torch.device
) -> Bool[Tensor, "b h n m"]:
    """The mask that a function makes, with one head for all if the function does not look at the head."""
    mask = create_mask(function, batch, heads, queries, keys, device=str(device))
    return mask[:, :1] if mask.stride(1) == 0 else mask  # what vmap has found not to depend on the head, it expands


def _flex_mask(
    attention_mask: Tensor | MaskFunction | None, padding: Tensor | None, layout: Layout
) -> BlockMask | None:
    has_registers = any(layout.registers) or any(layout.context_registers)
    if attention_mask is None and padding is None:
        return None
    if attention_mask is None or isinstance(attention_mask, Tensor) or has_registers:
        dense = _dense_mask(attention_mask, padding, layout)
        assert dense is not None
        dense = dense.expand(layout.batch, 1, -1, -1) if dense.ndim == 2 else dense
        function, heads = _looked_up(dense), dense.shape[1]
    else:
        function = attention_mask if padding is None else _unpadded(attention_mask, padding)
        heads = evaluated(function, 1, layout.heads, 1, 1, layout.device).shape[1]
    queries = layout.num_queries + sum(layout.registers)
    keys = layout.num_keys + sum(layout.registers) + sum(layout.context_registers)
    return create_block_mask(function, layout.batch, heads, queries, keys, device=str(layout.device))


# lambdas, because flex attention traces them, and nothing else must be around them then (`TYPECHECK=1`)


def _looked_up(dense: Bool[Tensor, "b h n m"]) -> MaskFunction:
    if dense.shape[1] > 1:
        return lambda b, h, query, key: dense[b, h, query, key]
    of_all = dense[:, 0]
    return lambda b, h, query, key: of_all[b, query, key]


def _unpadded(function: MaskFunction, padding: Tensor) -> MaskFunction:
    return lambda b, h, query, key: function(b, h, query, key) & padding[b, key]


def _moved(function: MaskFunction, rows: Tensor, first: int) -> MaskFunction:
    """Of some queries, and of keys from one on."""
    return lambda b, h, query, key: function(b, h, rows[query], key + first)


def with_registers(mask: Bool[Tensor, "*b n m"], layout: Layout) -> Bool[Tensor, "*b more_n more_m"]:
    """The mask of tokens, with rows and columns for the registers before the tokens of each modality.

    A register is seen by who sees any token of its modality, and sees what all tokens of its modality see. So it
    carries nothing to anybody that tokens could not carry there.
    """
    registers = (*layout.context_registers, *layout.registers)
    if not any(registers):
        return mask
    columns = []
    for part, count in zip(mask.split((*layout.context_lengths, *layout.lengths), dim=-1), registers, strict=True):
        columns += [part.any(dim=-1, keepdim=True).expand(*part.shape[:-1], count), part]
    wide = torch.cat(columns, dim=-1)
    rows = []
    for part, count in zip(wide.split(layout.lengths, dim=-2), layout.registers, strict=True):
        rows += [part.all(dim=-2, keepdim=True).expand(*part.shape[:-2], count, part.shape[-1]), part]
    return torch.cat(rows, dim=-2)


def _rows_with_output(mask: Mask | None, layout: Layout) -> Mask | None:
    """The mask of those queries that the last block still has."""
    sizes = layout.sizes
    starts = [0, *accumulate(sizes)]
    kept = [i for i, has_output in enumerate(layout.has_output) if has_output and sizes[i]]
    if mask is None or sum(sizes[i] for i in kept) in (0, sum(sizes)):
        return mask
    rows = [row for i in kept for row in range(starts[i], starts[i + 1])]
    return rows_and_columns(mask, torch.tensor(rows, device=layout.device), slice(None))


def _own(mask: Mask | None, layout: Layout, modality: int) -> Mask | None:
    """The mask of the tokens of one modality among themselves."""
    if mask is None or not layout.sizes[modality]:
        return None
    start = sum(layout.sizes[:modality])
    context = sum(layout.context_lengths) + sum(layout.context_registers)
    stop = start + layout.sizes[modality]
    return rows_and_columns(mask, slice(start, stop), slice(context + start, context + stop))


def rows_and_columns(mask: Mask, rows: Tensor | slice, columns: slice) -> Mask:
    """Some queries and neighbouring keys of a mask."""
    if isinstance(mask, Tensor):
        return mask[..., rows, :][..., columns]
    b, h, queries, keys = mask.shape
    kept = torch.arange(queries, device=mask.kv_indices.device)[rows]
    first, stop, _ = columns.indices(keys)
    function = _moved(mask.mask_mod, kept, first)
    return create_block_mask(function, b, h, len(kept), stop - first, device=str(kept.device))


def joint_padding(
    masks: Sequence[Tensor | None] | None, layout: Layout, context_padding: Bool[Tensor, "b m"] | None
) -> Bool[Tensor, "b more_m"] | None:
    """Which keys are tokens, `(b, m)` with registers, that of a context before the others; None if all are."""
    count = len(layout.lengths)
    masks = (None,) * count if masks is None else masks
    if all(each is None for each in masks) and context_padding is None:
        return None
    parts = []
    if num_context := sum(layout.context_lengths) + sum(layout.context_registers):
        whole = torch.ones(layout.batch, num_context, dtype=torch.bool, device=layout.device)
        parts.append(whole if context_padding is None else context_padding)
    for mask, length, extra in zip(masks, layout.lengths, layout.registers, strict=True):
        parts.append(torch.ones(layout.batch, extra, dtype=torch.bool, device=layout.device))
        whole = torch.ones(layout.batch, length, dtype=torch.bool, device=layout.device)
        parts.append(whole if mask is None else mask.to(layout.device).reshape(layout.batch, length))
    return torch.cat(parts, dim=1)


def imitation_mask(
    num_observations: int, num_actions: int, *, device: torch.device | str | None = None
) -> Bool[Tensor, "n n"]:
    """Observations attend to each other, actions to all observations and causally to actions: True where a query (row)
    may attend to a key (column).

    `num_actions` counts all tokens behind the observations, time tokens included.
    """
    total = num_observations + num_actions
    mask = torch.ones(total, total, dtype=torch.bool, device=device).tril()
    mask[:num_observations, :num_observations] = True
    return mask


# what a caller gives


def can_use_flex(device: torch.device) -> bool:
    """Whether flex attention can be used for a call: not for training on a CPU, where torch has no backward of it."""
    if torch.compiler.is_compiling():  # without the warning, which does not fit into a graph
        return device.type == "cuda" or (device.type == "cpu" and not torch.is_grad_enabled())
    return choose_attention("flex", device.type, torch.is_grad_enabled()) == "flex"


def mask_of_call(
    mask: Mask | MaskFunction | None, x: Tensor, queries: int, keys: int, heads: int, name: str = "attention_mask"
) -> Mask | None:
    """The mask of a call of one attention or block, as it is inside; `x` are some of its tokens, `(*batch, s, d)`."""
    batch = x.shape[:-2]
    check_mask(mask, batch, queries, keys, heads, name)
    if isinstance(mask, BlockMask) and not can_use_flex(x.device):
        mask = mask.mask_mod
    if mask is None or isinstance(mask, BlockMask):
        return mask
    if isinstance(mask, Tensor):
        return of_samples(mask.to(x.device), batch)
    return evaluated(mask, batch.numel(), heads, queries, keys, x.device)


def of_samples(mask: Bool[Tensor, "*batch n m"], batch: torch.Size) -> Bool[Tensor, "n m"] | Bool[Tensor, "b 1 n m"]:
    """A mask of each sample with its batch dimensions as one."""
    return mask if mask.ndim == 2 else mask.reshape(batch.numel(), 1, *mask.shape[-2:])


def check_mask(
    mask: Mask | MaskFunction | None,
    batch: torch.Size,
    queries: int,
    keys: int,
    heads: int,
    name: str = "attention_mask",
) -> None:
    """Raises `TypeError` or `ValueError` for a mask that does not fit to this many queries, keys and heads."""
    if isinstance(mask, BlockMask):
        _check_block_mask(mask, batch.numel(), queries, keys, heads, name)
        return
    if not isinstance(mask, Tensor):
        if mask is not None and not callable(mask):
            raise TypeError(f"{name} must be a bool tensor, a function or a BlockMask, got {type(mask).__name__}")
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, True where a query may attend to a key, got {mask.dtype}")
    shapes = dict.fromkeys([(queries, keys), (*batch, queries, keys)])
    if tuple(mask.shape) not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise ValueError(
            f"{name}: expected the shape {wanted} (queries and keys, the tokens of all modalities in their order), got "
            f"{tuple(mask.shape)}"
        )


def _check_block_mask(mask: BlockMask, batch: int, queries: int, keys: int, heads: int, name: str) -> None:
    if tuple(mask.shape[-2:]) != (queries, keys):
        raise ValueError(f"{name}: expected a BlockMask of {(queries, keys)}, got {tuple(mask.shape[-2:])}")
    if mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, heads):
        expected = f"a BlockMask of 1 or {batch} samples and 1 or {heads} heads"
        raise ValueError(f"{name}: expected {expected}, got {mask.shape[0]} and {mask.shape[1]}")


def check_padding(masks: Sequence[Tensor | None] | None, tokens: Sequence[Tensor], first: int = 0) -> None:
    """Raises `TypeError` or `ValueError` that names the modality for anything but bool `(*batch, s_i)` or None.
    `first` is the number of the first modality.
    """
    check_one_each("padding_masks", masks, len(tokens))
    for i, (mask, x) in enumerate(zip(masks or (), tokens, strict=False), start=first):
        if mask is None:
            continue
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"padding mask of modality {i} must be bool, True for tokens, got {kind}")
        if mask.shape != x.shape[:-1]:
            raise ValueError(
                f"padding mask of modality {i}: expected the shape {tuple(x.shape[:-1])}, got {tuple(mask.shape)}"
            )
