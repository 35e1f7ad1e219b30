"""The random numbers that a batch carries, so that all who use the batch agree on what is random in it.

b samples, m spans, k latents of one modality, c channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from transfusion_pytorch.sequence.samples import is_int
from transfusion_pytorch.sequence.stream import TokenStream


class SeededNumbers(NamedTuple):
    """Everything that is random in a batch, each number from the seed of its own sample.

    `drop_text`, `clean` and `time` are uniform numbers, `noise` is normal.
    """

    drop_text: Float[Tensor, " b"]
    clean: Float[Tensor, " m"]
    time: Float[Tensor, " m"]
    noise: Mapping[int, Float[Tensor, "k c"]]


def seeded_numbers(seeds: Sequence[Any], stream: TokenStream, channels: Mapping[int, int]) -> SeededNumbers:
    """A sample gets the same numbers in whatever batch it is; `channels` are those of the latents of each type.

    Raises `ValueError` unless there is one seed, at least 0, for each sample.
    """
    if len(seeds) != len(stream.lengths) or not all(is_int(seed) and seed >= 0 for seed in seeds):
        raise ValueError(f"seeds: expected an int of at least 0 for each of {len(stream.lengths)} samples, got {seeds}")
    spans, generator = stream.spans, torch.Generator()
    owners = spans.sample.tolist()
    normal: dict[int, list[Tensor]] = {kind: [] for kind in channels}
    drop_text, clean, time, row = [], [], [], 0
    for sample, seed in enumerate(seeds):
        generator.manual_seed(int(seed))
        drop_text.append(torch.rand(1, generator=generator))
        first = row
        while row < len(owners) and owners[row] == sample:
            row += 1
        clean.append(torch.rand(row - first, generator=generator))
        time.append(torch.rand(row - first, generator=generator))
        for kind, size in zip(spans.types[first:row], spans.sizes[first:row], strict=True):
            normal[kind].append(torch.randn(size, channels[kind], generator=generator))
    noise = {kind: torch.cat(parts) for kind, parts in normal.items()}
    return SeededNumbers(torch.cat(drop_text), torch.cat(clean), torch.cat(time), noise)


@dataclass
class StateNumbers:
    """Uniform numbers that depend on the state of torch's random numbers, which does not move.

    Times and noise are then the same whether a batch is packed before or by the model, and evaluation, which drops
    nothing, draws nothing. In a data worker the state never moves by itself, so it also counts:

    - `calls`, `last_state`: how often it was asked since the state moved last
    """

    calls: int = 0
    last_state: bytes = b""

    def draw(
        self, count: int, generator: torch.Generator | None = None, device: torch.device | None = None
    ) -> Float[Tensor, " count"]:
        """From the state of `generator`, torch's by default, and also of that of a CUDA `device`, which draws times and
        noise there.
        """
        generators = [torch.default_generator if generator is None else generator]
        if device is not None and device.type == "cuda":
            index = device.index
            generators.append(torch.cuda.default_generators[torch.cuda.current_device() if index is None else index])
        states = b"".join(each.get_state().numpy().tobytes() for each in generators)
        state = blake2b(states, digest_size=16).digest()
        self.calls = self.calls + 1 if state == self.last_state else 0
        self.last_state = state
        digest = blake2b(state, digest_size=7, key=self.calls.to_bytes(8, "little"))
        own = torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little"))
        return torch.rand(count, generator=own)
