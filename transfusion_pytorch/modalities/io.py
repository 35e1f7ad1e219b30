"""Everything that belongs to one modality: what its latents look like, how they are made, and how the transformer
reads them.
"""

from collections import defaultdict
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from transfusion_pytorch.modalities.adapters import AxialPositions, LinearAdapter, PairAdapter
from transfusion_pytorch.modalities.autoencoder import drawing_from, run_half
from transfusion_pytorch.modalities.statistics import LatentStatistics, ScaleCheck
from transfusion_pytorch.modalities.timing import TimeConditioning, Timing
from transfusion_pytorch.network.precision import precise
from transfusion_pytorch.sequence.batch import ModalityData, RawInstances
from transfusion_pytorch.sequence.positions import axial_coordinates
from transfusion_pytorch.sequence.samples import MAX_AXES, ModalitySpec, Shape, check_finite
from transfusion_pytorch.sequence.stream import Placement
from transfusion_pytorch.sequence.vocabulary import Vocabulary


class ModalityInfo(NamedTuple):
    """What a user may want to know of a modality, from `Transfusion.get_modality_info`."""

    modality_type: int
    dim_latent: int
    num_dim: int | None
    default_shape: Shape | None
    channel_first_latent: bool
    encoder: nn.Module | None
    decoder: nn.Module | None
    add_pos_emb: bool
    som_id: int
    eom_id: int


class ModalityIO(nn.Module):
    """Stands between the data of one modality and the transformer.

    Data is encoded to latents (by a frozen autoencoder, or not at all) and normalised by the latent statistics, if
    there are any; latents are embedded as tokens, and what the transformer makes of those is read back as latents.
    """

    def __init__(
        self,
        spec: ModalitySpec,
        adapter: LinearAdapter | PairAdapter,
        *,
        dim: int,
        encoder: nn.Module | None,
        decoder: nn.Module | None,
        batched: bool,
        add_pos_emb: bool,
        time_conditioning: TimeConditioning = "norms",
    ):
        super().__init__()
        self.spec, self.adapter, self.batched = spec, adapter, batched
        self.encoder, self.decoder = encoder, decoder
        self.statistics, self.scale_check = LatentStatistics(spec.dim_latent), ScaleCheck()
        self.positions = AxialPositions(dim, spec.num_dim) if add_pos_emb and spec.num_dim else None
        self.timing = None if time_conditioning == "norms" else Timing(dim, time_conditioning)
        for module in self.frozen:
            module.eval().requires_grad_(False)

    @property
    def frozen(self) -> list[nn.Module]:
        """Encoder and decoder, as far as there are any: they are not what is trained."""
        return [module for module in (self.encoder, self.decoder) if module is not None]

    @property
    def is_read_only(self) -> bool:
        """Whether latents are read and never generated: the encoder says so (`is_read_only`), and no decoder could show
        them. Such a modality is not opened in sampling unless the caller asks for it.
        """
        return self.decoder is None and bool(getattr(self.encoder, "is_read_only", False))

    @property
    def trained(self) -> list[nn.Module]:
        """Adapter, positions, and how tokens are told the time."""
        return [module for module in (self.adapter, self.positions, self.timing) if module is not None]

    def train(self, mode: bool = True) -> "ModalityIO":
        """What is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def info(self, vocabulary: Vocabulary) -> ModalityInfo:
        return ModalityInfo(
            modality_type=self.spec.type,
            dim_latent=self.spec.dim_latent,
            num_dim=self.spec.num_dim,
            default_shape=self.spec.default_shape,
            channel_first_latent=self.spec.channel_first,
            encoder=self.encoder,
            decoder=self.decoder,
            add_pos_emb=self.positions is not None,
            som_id=vocabulary.som[self.spec.type],
            eom_id=vocabulary.eom[self.spec.type],
        )

    def token_shape(self, shape: Shape) -> Shape:
        """The axial shape of the tokens of a latent; a time token makes them a row. Raises `ValueError` for one that
        does not get through.
        """
        tokens = self._read_shape(shape)
        return tokens if self.timing is None else self.timing.token_shape(tokens)

    def _read_shape(self, shape: Shape) -> Shape:
        """The axial shape of the tokens that are read as latents."""
        tokens = self.adapter.token_shape(shape)
        if self.positions is not None and len(tokens) != self.spec.num_dim:
            raise ValueError(
                f"modality {self.spec.type} has positions of {self.spec.num_dim} axes, but latents of shape {shape} "
                f"become tokens of shape {tokens}; set add_pos_emb=False"
            )
        return tokens

    def supports(self, shape: Shape) -> bool:
        """Whether latents of this shape get through, which a pair of a user's own modules may not allow."""
        if self.spec.num_dim is not None and len(shape) != self.spec.num_dim:
            return False
        try:
            return len(shape) <= MAX_AXES and prod(self.token_shape(shape)) > 0
        except ValueError:
            return False

    def name_of(self, half: nn.Module) -> str:
        """For errors: `Encoder of modality 0`."""
        return f"{type(half).__name__} of modality {self.spec.type}"

    @torch.no_grad()
    def encode(self, data: Sequence[Float[Tensor, "..."]], places: Sequence[str]) -> list[Float[Tensor, "..."]]:
        """Raw instances to channel-last latents in the encoder's scale; `places` say where each is from, for errors."""
        if self.encoder is not None:
            data = self._by_shape(self.encoder, data, places)
        encoded = [self.spec.to_channel_last(latents, where) for latents, where in zip(data, places, strict=True)]
        for latents, where in zip(encoded, places, strict=True):
            try:
                self.token_shape(tuple(latents.shape[:-1]))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        return encoded

    def latents(
        self,
        data: ModalityData,
        placement: Placement,
        dtype: torch.dtype,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "k c"]:
        """The latents of a batch as the network sees them: flat, in the order of their spans, normalised. See
        `encoded_latents`; noised copies have those of their clean copies.
        """
        encoded = self.encoded_latents(data, placement, dtype, generator)
        if self.training:
            self.check_scale(encoded)
        return placement.with_copies(self.statistics.normalize(encoded))

    def check_scale(self, latents: Float[Tensor, "k c"] | None) -> None:
        """Warns once where latents in the encoder's scale are far from unit variance, and nothing normalises them."""
        if latents is not None and not self.statistics.is_set:
            self.scale_check(latents, self.spec.type)

    def encoded_latents(
        self,
        data: ModalityData,
        placement: Placement,
        dtype: torch.dtype,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "k c"]:
        """The latents of a batch in the encoder's scale; what is raw is encoded.

        The encoder is frozen, but gradients go through it to data that want them, which stand in a `Condition`. With a
        `generator`, whatever it draws depends on that alone. Raises `ValueError` where it makes latents of another
        shape than the batch was packed for.
        """
        if not data.raw and data.latents is not None:
            return data.latents.to(dtype)
        parts: dict[int, Tensor] = {}
        if data.latents is not None:
            sizes = [placement.sizes[span] for span in data.order]
            parts |= zip(data.order, data.latents.to(dtype).split(sizes), strict=True)
        for group in data.raw:
            with torch.set_grad_enabled(group.data.requires_grad and torch.is_grad_enabled()), drawing_from(generator):
                rows = self._encode_stacked(group).to(dtype)  # under autocast an encoder gives less than that
            made, packed = tuple(rows.shape[1:-1]), placement.shapes[group.order[0]]
            if made != packed:
                raise ValueError(
                    f"{group.places[0]}: the encoder made latents of shape {made}, but the batch was packed for "
                    f"{packed}; if that depends on the data, encode them before and hand over Latents"
                )
            parts |= zip(group.order, rows.flatten(1, -2) if rows.ndim > 2 else rows[:, None], strict=True)
        return torch.cat([parts[span] for span in range(len(parts))])

    def _encode_stacked(self, group: RawInstances) -> Float[Tensor, "g ..."]:
        assert self.encoder is not None
        name = self.name_of(self.encoder)
        made = run_half(self.encoder, group.data, batched=self.batched, name=name)
        latents = self.spec.to_channel_last(made[0], f"{group.places[0]}, encoded")
        check_finite(list(made), [f"{place}, encoded" for place in group.places])
        return made.movedim(1, -1) if self.spec.channel_first and latents.ndim > 1 else made

    @torch.no_grad()
    def decode(self, latents: Sequence[Float[Tensor, "..."]]) -> list[Float[Tensor, "..."]]:
        """Channel-last latents, normalised as the network has them, to raw instances."""
        return self.decode_with_gradient(latents)

    def decode_with_gradient(self, latents: Sequence[Float[Tensor, "..."]]) -> list[Float[Tensor, "..."]]:
        """The same, for a loss that reaches through the decoder (which is frozen) to what it decodes."""
        data = [self.shown(part) for part in latents]
        places = [f"modality {self.spec.type}, latents of shape {tuple(part.shape)}" for part in data]
        return data if self.decoder is None else self._by_shape(self.decoder, data, places)

    def shown(self, latents: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Latents as users see them: in the encoder's scale, channels where they have them."""
        return self.spec.from_channel_last(self.statistics.denormalize(latents))

    def embed(
        self,
        latents: Float[Tensor, "k c"],
        shapes: Sequence[Shape],
        condition: Shaped[Tensor, "m d"],
        positions: Shaped[Tensor, "p d"] | None = None,
    ) -> tuple[Shaped[Tensor, "t d"], Any]:
        """Flat latents of all spans to tokens, with their positions; and what `read` must see again. `positions` are
        those of `embed_positions`, where they were made before.
        """
        tokens, memory = self.adapter.embed(latents, shapes, condition)
        if positions is None:
            dtype = precise(latents.dtype)  # bfloat16 cannot count beyond 256
            positions = self.embed_positions(shapes, device=tokens.device, dtype=dtype)
        tokens = tokens if positions is None else tokens + positions
        return tokens if self.timing is None else self.timing.embed(tokens, self._counts(shapes), condition), memory

    def embed_positions(
        self, shapes: Sequence[Shape], *, device: torch.device, dtype: torch.dtype
    ) -> Shaped[Tensor, "t d"] | None:
        """The position embedding of every token, None if there is none. Coordinates are of this `dtype`."""
        if self.positions is None:
            return None
        token_shapes = [self._read_shape(shape) for shape in shapes]
        embedded = {
            shape: self.positions(axial_coordinates(shape, device=device, dtype=dtype))
            for shape in dict.fromkeys(token_shapes)
        }
        return torch.cat([embedded[shape] for shape in token_shapes])

    def read(
        self, tokens: Shaped[Tensor, "t d"], shapes: Sequence[Shape], condition: Shaped[Tensor, "m d"], memory: Any
    ) -> Shaped[Tensor, "k c"]:
        if self.timing is not None:
            tokens = self.timing.read(tokens, self._counts(shapes), condition)
        return self.adapter.read(tokens, shapes, condition, memory)

    def _counts(self, shapes: Sequence[Shape]) -> list[int]:
        """How many tokens each span is read from."""
        return [prod(self._read_shape(shape)) for shape in shapes]

    def _by_shape(self, half: nn.Module, data: Sequence[Tensor], places: Sequence[str]) -> list[Tensor]:
        """Runs an autoencoder half over batches of equal shape."""
        groups: dict[Shape, list[int]] = defaultdict(list)
        for i, instance in enumerate(data):
            groups[tuple(instance.shape)].append(i)
        out: dict[int, Tensor] = {}
        for members in groups.values():
            stacked = torch.stack([data[i] for i in members])
            where = [places[i] for i in members]
            made = run_half(half, stacked, batched=self.batched, name=self.name_of(half), places=where)
            out |= zip(members, made, strict=True)
        return [out[i] for i in range(len(data))]
