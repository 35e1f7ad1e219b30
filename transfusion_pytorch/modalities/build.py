"""The modalities of a model, from the arguments of `Transfusion`."""

import copy
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from torch import nn

from transfusion_pytorch.modalities.adapters import LinearAdapter, PairAdapter
from transfusion_pytorch.modalities.io import ModalityIO
from transfusion_pytorch.modalities.timing import KINDS, TimeConditioning
from transfusion_pytorch.sequence.checks import check_bool, per_modality
from transfusion_pytorch.sequence.samples import MAX_AXES, ModalitySpec, Shape, is_int, is_sequence
from transfusion_pytorch.sequence.vocabulary import parse_shape


class Modalities(nn.ModuleList):
    """What belongs to each modality, by its type."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[ModalityIO]: ...

        def __getitem__(self, modality: int) -> ModalityIO: ...

    def arguments(self) -> dict[str, Any]:
        """The inverse of `build_modalities`: the arguments of `Transfusion` that make these, one value for all
        modalities or a list.
        """
        ios = list(self)
        pairs = [(io.adapter.down, io.adapter.up) if isinstance(io.adapter, PairAdapter) else None for io in ios]
        parsers = [io.spec.parse_shape for io in ios]
        arguments = dict(
            modality_default_shape=[io.spec.default_shape for io in ios],
            modality_num_dim=[io.spec.num_dim for io in ios],
            channel_first_latent=[io.spec.channel_first for io in ios],
            modality_encoder=[io.encoder for io in ios],
            modality_decoder=[io.decoder for io in ios],
            modality_encoder_decoder_requires_batch_dim=[io.batched for io in ios],
            pre_post_transformer_enc_dec=pairs,
            add_pos_emb=[io.positions is not None for io in ios],
            to_modality_shape_fn=[parse.parse if isinstance(parse, _SafeParser) else None for parse in parsers],
        )
        return dict(dim_latent=[io.spec.dim_latent for io in ios]) | {
            name: values[0] if _are_one(values) else values for name, values in arguments.items()
        }


def build_modalities(
    *,
    dim: int,
    dim_latent: Integral | int | Sequence[Any] | None,
    modality_default_shape: Any,
    modality_num_dim: Any,
    channel_first_latent: Any,
    modality_encoder: Any,
    modality_decoder: Any,
    modality_encoder_decoder_requires_batch_dim: Any,
    pre_post_transformer_enc_dec: Any,
    add_pos_emb: Any,
    to_modality_shape_fn: Any,
    time_conditioning: TimeConditioning = "norms",
) -> Modalities:
    """One `ModalityIO` for each entry of `dim_latent`; the arguments are those of `Transfusion`."""
    if time_conditioning not in KINDS:
        raise ValueError(f"time_conditioning must be one of {', '.join(KINDS)}, got {time_conditioning!r}")
    given: Any = dim if dim_latent is None else dim_latent
    given = given if is_sequence(given) else (given,)
    if not given or not all(is_int(d) and d > 0 for d in given):
        raise ValueError(f"dim_latent must be the positive number of channels of each modality, got {dim_latent}")
    dims, count = tuple(map(int, given)), len(given)
    if is_int(modality_default_shape):
        modality_default_shape = (modality_default_shape,)
    shapes = per_modality(modality_default_shape, count, "modality_default_shape", is_one=_is_shape)
    num_dims = per_modality(modality_num_dim, count, "modality_num_dim")
    first = per_modality(channel_first_latent, count, "channel_first_latent")
    encoders = per_modality(modality_encoder, count, "modality_encoder")
    decoders = per_modality(modality_decoder, count, "modality_decoder")
    batched = per_modality(
        modality_encoder_decoder_requires_batch_dim, count, "modality_encoder_decoder_requires_batch_dim"
    )
    pairs = per_modality(pre_post_transformer_enc_dec, count, "pre_post_transformer_enc_dec", is_one=_is_pair)
    positions = per_modality(add_pos_emb, count, "add_pos_emb")
    parsers = per_modality(to_modality_shape_fn, count, "to_modality_shape_fn")

    flags = dict(channel_first_latent=first, modality_encoder_decoder_requires_batch_dim=batched, add_pos_emb=positions)
    for name, values in flags.items():
        for i, value in enumerate(values):
            if value is not None:
                check_bool(value, f"modality {i}: {name}")

    modules, seen = [], set()
    for i in range(count):
        for name, half in (("modality_encoder", encoders[i]), ("modality_decoder", decoders[i])):
            if half is not None and not isinstance(half, nn.Module):
                raise TypeError(f"modality {i}: {name} must be an nn.Module, got {type(half).__name__}")
        num_dim = resolve_num_dim(i, num_dims[i], shapes[i])
        for name, half in (("modality_encoder", encoders[i]), ("modality_decoder", decoders[i])):
            check_half(half, f"modality {i}: {name}", dims[i], num_dim, bool(first[i]))
        default_shape = None if shapes[i] is None else tuple(map(int, shapes[i]))
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
            # two modalities would otherwise train one pair together, and be saved with it twice
            pair = [copy.deepcopy(half) if id(half) in seen else half for half in pairs[i]]
            seen |= set(map(id, pairs[i]))
            adapter = PairAdapter(*pair, dim_latent=dims[i], dim=dim, channel_first=bool(first[i]))
        io = ModalityIO(
            spec,
            adapter,
            dim=dim,
            encoder=encoders[i],
            decoder=decoders[i],
            batched=bool(batched[i]),
            add_pos_emb=bool(num_dim) if positions[i] is None else bool(positions[i]),
            time_conditioning=time_conditioning,
        )
        if default_shape is not None and pairs[i] is not None:
            io.token_shape(default_shape)  # fails now where the pair does not fit
        modules.append(io)
    return Modalities(modules)


def check_half(half: nn.Module | None, where: str, dim_latent: int, num_dim: int | None, channel_first: bool) -> None:
    """Compares the layout of a modality's latents with what an autoencoder's half says of its own, if it does: its
    attributes `dim_latent`, `num_dim` and `channel_first_latent`. Raises `ValueError` where they differ.
    """
    here = {"dim_latent": dim_latent, "num_dim": num_dim, "channel_first_latent": channel_first}
    own = {name: getattr(half, name, None) for name in here}
    differ = [name for name, value in here.items() if None not in (value, own[name]) and value != own[name]]
    if differ:
        names = {"num_dim": "modality_num_dim"}
        expected = ", ".join(f"{names.get(name, name)}={own[name]}" for name in differ)
        got = ", ".join(f"{here[name]}" for name in differ)
        raise ValueError(f"{where}, a {type(half).__name__}, has latents of {expected}, got {got}: set these instead")


def count_modalities(dim_latent: Any) -> int:
    """How many modalities this argument of `Transfusion` is for."""
    return len(dim_latent) if is_sequence(dim_latent) else 1


def resolve_num_dim(modality: int, num_dim: Any, default_shape: Any) -> int | None:
    """The number of axes, given or that of the default shape."""
    if num_dim is not None and not (is_int(num_dim) and 0 <= num_dim <= MAX_AXES):
        raise ValueError(f"modality {modality}: modality_num_dim must be 0 to {MAX_AXES}, got {num_dim}")
    num_dim = None if num_dim is None else int(num_dim)
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
    """A user's own parser, made safe: whatever is no shape is None. Raises `TypeError` for what is no function."""
    if parse is None:
        return parse_shape
    if not callable(parse):
        raise TypeError(f"to_modality_shape_fn must be a function of the written shape, got {parse!r}")
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
        return tuple(map(int, shape)) if _is_shape(shape) and all(size > 0 for size in shape) else None


def _is_shape(value: Any) -> bool:
    return is_sequence(value) and all(map(is_int, value))


def _are_one(values: Sequence[Any]) -> bool:
    """Whether one number, shape or None stands for all of these: `[False, False]`."""
    return (
        not isinstance(values[0], (nn.Module, list))
        and not callable(values[0])
        and not _is_pair(values[0])
        and all(value == values[0] for value in values)
    )


def _is_pair(value: Any) -> bool:
    return is_sequence(value) and len(value) == 2 and all(isinstance(part, nn.Module) for part in value)
