"""Shapes behind the encoder, adapter and decoder of a modality, found without their parameters, for packing."""

import copy
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from transfusion_pytorch.modalities.autoencoder import run_half
from transfusion_pytorch.modalities.io import ModalityIO
from transfusion_pytorch.sequence.samples import ModalitySpec, Shape

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
        self.spec: ModalitySpec = io.spec
        self.measures_decoded, self.latent_shape_fn = measures_decoded, latent_shape_fn
        self.live = io if is_live else None
        self._blank = on_meta(io) if self.live is None else None
        self._copied: tuple[int, ...] = ()
        self._latent_shapes: dict[Shape, Shape] = {}
        self._decoded_sizes: dict[Shape, int] = {}

    @property
    def blank(self) -> ModalityIO:
        """The modality without its numbers; copied anew where a module of the live one was replaced."""
        if self.live is not None:
            modules = tuple(map(id, (self.live.encoder, self.live.adapter, self.live.decoder)))
            if self._blank is None or modules != self._copied:
                self._blank, self._copied = on_meta(self.live), modules
                self._latent_shapes, self._decoded_sizes = {}, {}
        assert self._blank is not None
        return self._blank

    @property
    def has_encoder(self) -> bool:
        return (self.live or self.blank).encoder is not None

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
        """One instance through the encoder or decoder, as a batch of one."""
        half = getattr(self.blank, name)
        run = partial(run_half, batched=self.blank.batched, name=self.blank.name_of(half), places=[where])
        try:
            return run(half, instance[None])
        except Exception as error:
            if self.live is None:
                raise ValueError(
                    f"{error}. This was a dry run on the meta device; if such data are right, give a latent_shape_fn"
                ) from error
        real = getattr(self.live, name)
        device = next((parameter.device for parameter in real.parameters()), torch.device("cpu"))
        return run(real, torch.zeros(instance[None].shape, device=device))


def on_meta(module: Any) -> Any:
    """A copy of a module without its numbers. They are never copied."""
    held = [*module.parameters(), *module.buffers()]
    memo: dict[int, Any] = {}
    for tensor in held:
        blank = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(blank, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else blank
    return copy.deepcopy(module, memo)
