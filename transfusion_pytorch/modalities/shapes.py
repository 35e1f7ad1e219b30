"""Shapes behind the encoder, adapter and decoder of a modality, found without their parameters, for packing."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from transfusion_pytorch.modalities.adapters import PairAdapter
from transfusion_pytorch.modalities.autoencoder import run_half
from transfusion_pytorch.modalities.io import ModalityIO
from transfusion_pytorch.sequence.samples import ModalitySpec, Shape
from transfusion_pytorch.sequence.vocabulary import parse_shape

LatentShapeFunction = Callable[[Shape], Shape]


class ShapeFinder:
    """The shapes of one modality, each found once by a dry run of its modules on the `meta` device.

    `latent_shape_fn` takes the shape of raw data to the axial shape of its latents, for encoders that a `meta` tensor
    does not get through. With `live`, data are tried on zeros through the modality itself instead; without it a finder
    has no parameters, and can be pickled wherever the modules can.
    """

    def __init__(
        self,
        io: ModalityIO,
        *,
        measures_decoded: bool,
        latent_shape_fn: LatentShapeFunction | None = None,
        is_live: bool = False,
    ):
        # packing parses no shapes that a model wrote: a finder apart from its model can be pickled whoever parses those
        self.spec: ModalitySpec = io.spec if is_live else replace(io.spec, parse_shape=parse_shape)
        self.measures_decoded, self.latent_shape_fn = measures_decoded, latent_shape_fn
        self.live = io if is_live else None
        self._has_encoder = io.encoder is not None
        self._blank = None if is_live else self._copy(io)
        self._copied: tuple[int, ...] = ()
        self._latent_shapes: dict[Shape, Shape] = {}
        self._decoded_sizes: dict[Shape, int] = {}

    @property
    def blank(self) -> ModalityIO:
        """The modality without its numbers; copied anew where a module of the live one was replaced."""
        if self.live is not None:
            modules = tuple(map(id, (self.live.encoder, self.live.adapter, self.live.decoder)))
            if self._blank is None or modules != self._copied:
                self._blank, self._copied = self._copy(self.live), modules
                self._latent_shapes, self._decoded_sizes = {}, {}
        assert self._blank is not None
        return self._blank

    def _copy(self, io: ModalityIO) -> ModalityIO:
        """On `meta`, with the modules that dry runs need. A live modality that cannot be copied stands for itself."""
        needed = {"encoder": self.latent_shape_fn is None, "decoder": self.measures_decoded}
        left_out = [getattr(io, name) for name, is_needed in needed.items() if not is_needed]
        try:
            return on_meta(io, {id(io.spec): self.spec} | {id(part): None for part in left_out if part is not None})
        except Exception as error:
            if self.live is not None:
                return io
            name = f"modality {io.spec.type}: its modules cannot be copied without their numbers"
            raise ValueError(f"{name} ({error}); for an encoder, give a latent_shape_fn") from error

    @property
    def has_encoder(self) -> bool:
        return self._has_encoder if self.live is None else self.live.encoder is not None

    @property
    def signature(self) -> tuple[Any, ...]:
        """What a batch depends on."""
        has_pair = isinstance(self.blank.adapter, PairAdapter)
        has_time_token = self.blank.timing is not None and self.blank.timing.kind == "token"
        return (
            self.spec.dim_latent,
            self.spec.num_dim,
            self.has_encoder,
            has_pair,
            has_time_token,
            self.measures_decoded,
        )

    def latent_shape(self, raw: Shape, where: str) -> Shape:
        """The axial shape of the latents of raw data. Raises `ValueError` for a shape that does not get through."""
        self.blank  # noqa: B018 - forgets what it knows if a module was replaced
        if raw not in self._latent_shapes:
            shape = self._find_latent_shape(raw, where)
            try:
                self.token_shape(shape)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            self._latent_shapes[raw] = shape
        return self._latent_shapes[raw]

    def token_shape(self, shape: Shape) -> Shape:
        """The axial shape of the tokens of a latent. Raises `ValueError` for one that does not get through."""
        try:
            return self.blank.token_shape(shape)
        except ValueError:
            if self.live is None:
                raise
            return self.live.token_shape(shape)

    def decoded_size(self, shape: Shape) -> int:
        """How many numbers latents of an axial shape decode to; 0 where nobody asks."""
        if not self.measures_decoded:
            return 0
        if shape not in self._decoded_sizes:
            size = prod(shape) * self.spec.dim_latent
            if self.blank.decoder is not None:
                latents = self.spec.from_channel_last(torch.empty(*shape, self.spec.dim_latent, device="meta"))
                size = self._dry_run("decoder", latents, f"modality {self.spec.type}").numel()
            self._decoded_sizes[shape] = size
        return self._decoded_sizes[shape]

    def _find_latent_shape(self, raw: Shape, where: str) -> Shape:
        if self.latent_shape_fn is not None:
            return tuple(self.latent_shape_fn(raw))
        latents = self._dry_run("encoder", torch.empty(raw, device="meta"), where)[0]
        return tuple(self.spec.to_channel_last(latents, f"{where}, encoded").shape[:-1])

    @torch.no_grad()
    def _dry_run(self, name: str, instance: Tensor, where: str) -> Tensor:
        """One instance through the encoder or decoder, as a batch of one. Draws nothing from torch's generator."""
        half = getattr(self.blank, name)
        run = partial(run_half, batched=self.blank.batched, name=self.blank.name_of(half), places=[where])
        with torch.random.fork_rng(devices=[]), _unvalidated():
            try:
                return run(half, instance[None])
            except ValueError as error:
                if self.live is None:
                    raise ValueError(
                        f"{error}. This was a dry run on the meta device; if the data are right, give a latent_shape_fn"
                    ) from error
            real = getattr(self.live, name)
            device = next((parameter.device for parameter in real.parameters()), torch.device("cpu"))
            return run(real, torch.zeros(instance[None].shape, device=device))


@contextmanager
def _unvalidated() -> Iterator[None]:
    """Distributions may be made of `meta` tensors, whose values nobody can check."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def on_meta(module: nn.Module, replaced: Mapping[int, Any]) -> Any:
    """A copy of a module without its numbers, which are never copied; `replaced` has what takes the place of some of
    its parts, by their `id`.
    """
    memo = dict(replaced)
    for tensor in (*module.parameters(), *module.buffers()):
        blank = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(blank, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else blank
    return copy.deepcopy(module, memo)
