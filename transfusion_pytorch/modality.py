"""Everything that belongs to one modality: what its latents look like, how they are made, and how the transformer
reads them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from math import prod
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from transfusion_pytorch.network.adapters import AxialPositions, LinearAdapter, PairAdapter
from transfusion_pytorch.sequence.positions import axial_coordinates
from transfusion_pytorch.sequence.samples import MAX_AXES, ModalitySpec, Shape
from transfusion_pytorch.sequence.vocabulary import Vocabulary, parse_shape

AT_ONCE = 64  # instances that go through an autoencoder together: memory does not grow with the batch beyond that


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

    Data is encoded to latents (by a frozen autoencoder, or not at all), latents are embedded as tokens, and what the
    transformer makes of those is read back as latents.
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
    ):
        super().__init__()
        self.spec, self.adapter, self.batched = spec, adapter, batched
        self.encoder, self.decoder = encoder, decoder
        self.positions = AxialPositions(dim, spec.num_dim) if add_pos_emb and spec.num_dim else None
        for module in self.frozen:
            module.eval().requires_grad_(False)

    @property
    def frozen(self) -> list[nn.Module]:
        """Encoder and decoder, as far as there are any: they are not what is trained."""
        return [module for module in (self.encoder, self.decoder) if module is not None]

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
        """The axial shape of the tokens of a latent. Raises `ValueError` for one that does not get through."""
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

    @torch.no_grad()
    def encode(self, data: Sequence[Float[Tensor, "..."]], places: Sequence[str]) -> list[Float[Tensor, "..."]]:
        """Raw instances to channel-last latents; `places` say where each came from, for errors."""
        if self.encoder is not None:
            data = self._by_shape(self.encoder, data, places)
        encoded = [self.spec.to_channel_last(latents, where) for latents, where in zip(data, places, strict=True)]
        for latents, where in zip(encoded, places, strict=True):
            try:
                self.token_shape(tuple(latents.shape[:-1]))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        return encoded

    @torch.no_grad()
    def decode(self, latents: Sequence[Float[Tensor, "..."]]) -> list[Float[Tensor, "..."]]:
        """Channel-last latents to raw instances."""
        return self.decode_with_gradient(latents)

    def decode_with_gradient(self, latents: Sequence[Float[Tensor, "..."]]) -> list[Float[Tensor, "..."]]:
        """The same, for a loss that reaches through the decoder (which is frozen) to what it decodes."""
        data = [self.spec.from_channel_last(part) for part in latents]
        places = [f"modality {self.spec.type}, latents of shape {tuple(part.shape)}" for part in data]
        return data if self.decoder is None else self._by_shape(self.decoder, data, places)

    def embed(
        self, latents: Float[Tensor, "k c"], shapes: Sequence[Shape], condition: Shaped[Tensor, "m d"]
    ) -> tuple[Shaped[Tensor, "t d"], Any]:
        """Flat latents of all spans to tokens, with their positions; and what `read` must see again."""
        tokens, memory = self.adapter.embed(latents, shapes, condition)
        if self.positions is None:
            return tokens, memory
        token_shapes = [self.token_shape(shape) for shape in shapes]
        precise = torch.promote_types(latents.dtype, torch.float32)  # bfloat16 cannot count beyond 256
        embedded = {
            shape: self.positions(axial_coordinates(shape, device=tokens.device, dtype=precise))
            for shape in dict.fromkeys(token_shapes)
        }
        return tokens + torch.cat([embedded[shape] for shape in token_shapes]), memory

    def read(
        self, tokens: Shaped[Tensor, "t d"], shapes: Sequence[Shape], condition: Shaped[Tensor, "m d"], memory: Any
    ) -> Shaped[Tensor, "k c"]:
        return self.adapter.read(tokens, shapes, condition, memory)

    def _by_shape(self, module: nn.Module, data: Sequence[Tensor], places: Sequence[str]) -> list[Tensor]:
        """Runs an autoencoder half over batches of equal shape."""
        groups: dict[Shape, list[int]] = defaultdict(list)
        for i, instance in enumerate(data):
            groups[tuple(instance.shape)].append(i)
        out: dict[int, Tensor] = {}
        for group in groups.values():
            for start in range(0, len(group), AT_ONCE):
                members = group[start : start + AT_ONCE]
                made = self._run(module, [data[i] for i in members], places[members[0]])
                out |= zip(members, made, strict=True)
        return [out[i] for i in range(len(data))]

    def _run(self, module: nn.Module, instances: Sequence[Tensor], where: str) -> list[Tensor]:
        """Instances of one shape together, or copies of them one by one."""
        name = f"{where}: {type(module).__name__} of modality {self.spec.type}"
        dtypes = (parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
        dtype = next(dtypes, instances[0].dtype)
        instances = [instance.to(dtype) for instance in instances]
        try:
            made = module(torch.stack(list(instances))) if self.batched else [module(one.clone()) for one in instances]
            rows = list(made)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            shape = tuple(instances[0].shape)
            raise ValueError(f"{name} does not take data of shape {shape}: {error}") from error
        if not isinstance(made, (Tensor, list)) or len(rows) != len(instances) or not torch.is_tensor(rows[0]):
            raise ValueError(f"{name} must give a tensor for each of {len(instances)} instances, got {type(made)}")
        return rows


class Modalities(nn.ModuleList):
    """What belongs to each modality, by its type."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[ModalityIO]: ...

        def __getitem__(self, modality: int) -> ModalityIO: ...


def build_modalities(
    *,
    dim: int,
    dim_latent: int | Sequence[int] | None,
    modality_default_shape: Any,
    modality_num_dim: Any,
    channel_first_latent: Any,
    modality_encoder: Any,
    modality_decoder: Any,
    modality_encoder_decoder_requires_batch_dim: Any,
    pre_post_transformer_enc_dec: Any,
    add_pos_emb: Any,
    to_modality_shape_fn: Any,
) -> Modalities:
    """One `ModalityIO` for each entry of `dim_latent`; the arguments are those of `Transfusion`."""
    dims = (dim,) if dim_latent is None else (dim_latent,) if isinstance(dim_latent, int) else tuple(dim_latent)
    if not dims or not all(isinstance(d, int) and d > 0 for d in dims):
        raise ValueError(f"dim_latent must be the positive number of channels of each modality, got {dim_latent}")
    count = len(dims)
    if isinstance(modality_default_shape, int):
        modality_default_shape = (modality_default_shape,)
    shapes = per_modality(modality_default_shape, count, "modality_default_shape", is_one=_is_shape)
    num_dims = per_modality(modality_num_dim, count, "modality_num_dim")
    first = per_modality(channel_first_latent, count, "channel_first_latent")
    encoders = per_modality(modality_encoder, count, "modality_encoder")
    decoders = per_modality(modality_decoder, count, "modality_decoder")
    batched = per_modality(modality_encoder_decoder_requires_batch_dim, count, "requires_batch_dim")
    pairs = per_modality(pre_post_transformer_enc_dec, count, "pre_post_transformer_enc_dec", is_one=_is_pair)
    positions = per_modality(add_pos_emb, count, "add_pos_emb")
    parsers = per_modality(to_modality_shape_fn, count, "to_modality_shape_fn")

    modules = []
    for i in range(count):
        for name, half in (("modality_encoder", encoders[i]), ("modality_decoder", decoders[i])):
            if half is not None and not isinstance(half, nn.Module):
                raise TypeError(f"modality {i}: {name} must be an nn.Module, got {type(half).__name__}")
        num_dim = resolve_num_dim(i, num_dims[i], shapes[i])
        default_shape = None if shapes[i] is None else tuple(shapes[i])
        spec = ModalitySpec(i, dims[i], num_dim, default_shape, bool(first[i]), shape_parser(parsers[i]))
        if positions[i] and not num_dim:
            raise ValueError(
                f"modality {i}: add_pos_emb needs the number of axes, at least 1; set modality_num_dim or "
                "modality_default_shape"
            )
        adapter: LinearAdapter | PairAdapter = LinearAdapter(dims[i], dim)
        if pairs[i] is not None:
            if not _is_pair(pairs[i]):
                raise TypeError(f"modality {i}: pre_post_transformer_enc_dec must be two modules, got {pairs[i]!r}")
            adapter = PairAdapter(*pairs[i], dim_latent=dims[i], dim=dim, channel_first=bool(first[i]))
        io = ModalityIO(
            spec,
            adapter,
            dim=dim,
            encoder=encoders[i],
            decoder=decoders[i],
            batched=bool(batched[i]),
            add_pos_emb=bool(num_dim) if positions[i] is None else bool(positions[i]),
        )
        if default_shape is not None and pairs[i] is not None:
            io.token_shape(default_shape)  # fails now where the pair does not fit
        modules.append(io)
    return Modalities(modules)


def per_modality(value: Any, count: int, name: str, *, is_one: Callable[[Any], bool] | None = None) -> tuple[Any, ...]:
    """One entry for each modality: a single value is meant for all of them."""
    if is_one(value) if is_one is not None else not isinstance(value, (tuple, list)):
        return (value,) * count
    if value is None:
        return (None,) * count
    if len(value) != count:
        raise ValueError(f"{name}: expected one value or {count}, one for each entry of dim_latent, got {len(value)}")
    return tuple(value)


def resolve_num_dim(modality: int, num_dim: Any, default_shape: Any) -> int | None:
    """The number of axes, given or that of the default shape."""
    if num_dim is not None and not (isinstance(num_dim, int) and 0 <= num_dim <= MAX_AXES):
        raise ValueError(f"modality {modality}: modality_num_dim must be 0 to {MAX_AXES}, got {num_dim}")
    if default_shape is None:
        return num_dim
    if not _is_shape(default_shape) or any(size < 1 for size in default_shape) or len(default_shape) > MAX_AXES:
        raise ValueError(
            f"modality {modality}: a default shape is a tuple of 0 to {MAX_AXES} positive ints, got {default_shape!r}"
        )
    if num_dim is not None and num_dim != len(default_shape):
        raise ValueError(
            f"modality {modality}: modality_num_dim is {num_dim} but the default shape {default_shape} has "
            f"{len(default_shape)} axes"
        )
    return len(default_shape)


def shape_parser(parse: Callable[[str], Any] | None) -> Callable[[str], Shape | None]:
    """A user's own parser, made safe: whatever is no shape is None."""
    if parse is None:
        return parse_shape
    return _SafeParser(parse)


class _SafeParser:
    """A class rather than a closure, so that models can be copied and pickled."""

    def __init__(self, parse: Callable[[str], Any]):
        self.parse = parse

    def __call__(self, text: str) -> Shape | None:
        try:
            shape = self.parse(text)
        except (ValueError, TypeError, LookupError, AssertionError):
            return None
        valid = isinstance(shape, (tuple, list)) and all(isinstance(size, Integral) and int(size) > 0 for size in shape)
        return tuple(map(int, shape)) if valid else None


def _is_shape(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(isinstance(size, int) for size in value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(part, nn.Module) for part in value)
