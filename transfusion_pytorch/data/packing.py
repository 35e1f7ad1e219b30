"""Samples into packs of a token budget: best-fit decreasing within a window of the stream of samples."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from transfusion_pytorch.data.loading import SampleError, Skipped, SkipSample
from transfusion_pytorch.data.order import SampleReference, seed_of, shuffled

TooLong = Literal["error", "skip"]


def best_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Puts each length, in the order given, into the fullest pack that has room for it, or into a new one.

    Packs list which lengths they have, and come in the order in which they were opened. Lengths that decrease are
    packed best: at worst 11/9 of the fewest possible packs (Johnson 1973), nearly full where samples are much smaller
    than the budget.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of each pack, sorted: (tokens left, pack)
    for i, length in enumerate(lengths):
        if not 0 < length <= budget:
            raise ValueError(f"a length is 1 to {budget} tokens, got {length}")
        place = bisect_left(room, (length, 0))
        left, pack = room.pop(place) if place < len(room) else (budget, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(i)
        insort(room, (left - length, pack))
    return packs


class Window(NamedTuple):
    """One window of the stream of samples, packed.

    - `packs`: samples that share a micro-batch
    - `deferred`: positions left for the next window
    - `sizes`: the tokens of each sample by its position
    - `skipped`: samples that were left out
    """

    packs: tuple[tuple[SampleReference, ...], ...]
    deferred: tuple[int, ...]
    sizes: Mapping[int, int]
    skipped: tuple[Skipped, ...]


def make_window(
    references: Iterable[SampleReference],
    deferred: Sequence[int],
    size_of: Callable[[SampleReference], int],
    *,
    budget: int,
    too_long: TooLong,
    seed: int,
    start: int,
    is_last: bool,
) -> Window:
    """Measures and packs the samples of the window that starts at a position, with those `deferred` by the one before.

    `size_of` raises `SkipSample` for a sample that is left out. A sample longer than the budget, or one that cannot
    be measured, raises `SampleError`, or is left out, as `too_long` says.
    """
    by_position = {reference.position: reference for reference in references}
    sizes: dict[int, int] = {}
    skipped: list[Skipped] = []
    for position, reference in by_position.items():
        try:
            sizes[position] = _checked(size_of(reference), reference, budget, too_long)
        except (SkipSample, SampleError) as reason:
            if isinstance(reason, SampleError) and too_long == "error":
                raise
            skipped.append(Skipped.because(reference, reason))
    packs, left = pack_window(sizes, deferred, budget=budget, seed=seed_of(seed, "window", start), is_last=is_last)
    return Window(tuple(tuple(map(by_position.__getitem__, pack)) for pack in packs), left, sizes, tuple(skipped))


def pack_window(
    sizes: Mapping[int, int], deferred: Sequence[int], *, budget: int, seed: int, is_last: bool
) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """Packs positions of these sizes; gives the packs, and what is deferred to the next window.

    Every window but the last defers its emptiest pack, so that packs are full although a window ends somewhere. What
    was deferred is packed first, into one pack that is not deferred again: no sample waits for more than one window
    (unless a whole window is less than a pack). Packs are shuffled: best fit begins with the longest samples.
    """
    late = set(deferred)
    positions = sorted(sizes, key=lambda position: (position not in late, -sizes[position], position))
    packs = [tuple(sorted(positions[i] for i in pack)) for pack in best_fit([sizes[p] for p in positions], budget)]
    left: tuple[int, ...] = ()
    if packs and not is_last:
        candidates = range(1 if len(packs) > 1 else 0, len(packs))
        left = packs.pop(min(candidates, key=lambda i: (sum(sizes[p] for p in packs[i]), -i)))
    return [packs[i] for i in shuffled(len(packs), seed).tolist()], left


def _checked(size: int, reference: SampleReference, budget: int, too_long: TooLong) -> int:
    if size <= budget:
        return size
    message = f"{size} tokens are more than the token budget of {budget}"
    if too_long == "skip":
        raise SkipSample(message)
    raise SampleError.of(reference, f"{message}; raise it, or set too_long='skip'")
