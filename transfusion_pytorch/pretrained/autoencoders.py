"""Pretrained autoencoders of `diffusers`, as halves that plug into `modality_encoder` and `modality_decoder`.

b instances, x channels of the data, c channels of a latent. Images and video are in [-1, 1], channels come first.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import remove_weight_norm
from torch.nn.utils.weight_norm import WeightNorm

from transfusion_pytorch.autoencoder.halves import AutoencoderHalves, DecoderHalf, EncoderHalf, measure_scale
from transfusion_pytorch.data.optional import import_optional
from transfusion_pytorch.modalities.autoencoder import as_tensor
from transfusion_pytorch.saving.components import register_component

Config = Mapping[str, Any]
PosteriorUse = Literal["sample", "mode"]
# the modules of an autoencoder that only one half needs
ENCODER_PARTS, DECODER_PARTS = ("encoder", "quant_conv"), ("decoder", "post_quant_conv")
CONFIG_OPTIONS = ("subfolder", "revision", "cache_dir", "token", "force_download", "local_files_only", "proxies")
WAN_FRAMES = 4  # AutoencoderKLWan encodes the first frame by itself, and all others in chunks of so many

TINY_TILE_FACTOR = 8  # what AutoencoderTiny assumes when it places tiles


class Family(NamedTuple):
    """What one class of diffusers differs in, read from its configuration.

    - `num_dim`: axes of data and latents
    - `dim_data`, `dim_latent`: their channels
    - `factors`: how many positions of the data make one of a latent, along each axis
    - `has_posterior`: latents are a distribution
    - `counts_from_one`: the first axis is 1 + a multiple of its factor (the first frame of a video stands alone)
    """

    num_dim: int
    dim_data: Callable[[Config], int]
    dim_latent: Callable[[Config], int]
    factors: Callable[[Config], Sequence[int]]
    has_posterior: bool = True
    counts_from_one: bool = False


def _wan_patch(config: Config) -> int:
    return config.get("patch_size") or 1


FAMILIES = {
    "AutoencoderKL": Family(
        num_dim=2,
        dim_data=lambda config: config["in_channels"],
        dim_latent=lambda config: config["latent_channels"],
        factors=lambda config: [2 ** (len(config["block_out_channels"]) - 1)] * 2,
    ),
    "AutoencoderDC": Family(
        num_dim=2,
        dim_data=lambda config: config["in_channels"],
        dim_latent=lambda config: config["latent_channels"],
        factors=lambda config: [2 ** (len(config["encoder_block_out_channels"]) - 1)] * 2,
        has_posterior=False,
    ),
    "AutoencoderTiny": Family(
        num_dim=2,
        dim_data=lambda config: config["in_channels"],
        dim_latent=lambda config: config["latent_channels"],
        factors=lambda config: [2 ** (len(config["encoder_block_out_channels"]) - 1)] * 2,
        has_posterior=False,
    ),
    "AutoencoderKLWan": Family(
        num_dim=3,
        dim_data=lambda config: config["in_channels"] // _wan_patch(config) ** 2,
        dim_latent=lambda config: config["z_dim"],
        factors=lambda config: [WAN_FRAMES, *[2 ** (len(config["dim_mult"]) - 1) * _wan_patch(config)] * 2],
        counts_from_one=True,
    ),
    "AutoencoderOobleck": Family(
        num_dim=1,
        dim_data=lambda config: config["audio_channels"],
        dim_latent=lambda config: config["encoder_hidden_size"] // 2,  # the other half is the posterior's scale
        factors=lambda config: [prod(config["downsampling_ratios"])],
    ),
}


def pretrained_autoencoder(
    name_or_model: str | Path | nn.Module,
    *,
    dim_latent: int | None = None,
    posterior: PosteriorUse | None = None,
    slicing: bool = True,
    tiling: bool = False,
    measured_on: Iterable[Float[Tensor, "b ..."]] | None = None,
    dtype: torch.dtype | None = None,
    **loading: Any,
) -> AutoencoderHalves:
    """The encoder and decoder of an autoencoder of diffusers, frozen.

    ```python
    encoder, decoder = pretrained_autoencoder("stabilityai/sd-vae-ft-mse")
    model = Transfusion(
        dim_latent=encoder.dim_latent,
        channel_first_latent=True,
        modality_encoder=encoder,
        modality_decoder=decoder,
        ...,
    )
    ```

    - `name_or_model`: a name on the Hugging Face hub or a folder, of which the class is read first; or an instance.
      Classes: `AutoencoderKL`, `AutoencoderDC`, `AutoencoderTiny` (images), `AutoencoderKLWan` (video of 4 k + 1
      frames), `AutoencoderOobleck` (sound). An instance is used as it is: its weights are those of the halves
    - `dim_latent`: the channels that the latents must have, compared before any weights are loaded
    - `posterior`: latents are a "sample" of the posterior, drawn from torch's generator, or its "mode"; None is
      "sample" where there is a posterior
    - `slicing`: one instance at a time, which takes less memory and changes nothing else
    - `tiling`: large instances in overlapping tiles, which takes less memory and changes results at the seams
    - `measured_on`: batches of data, on which mean and standard deviation of the latents are measured. Otherwise they
      are those of the configuration (scaling and shift factor, or means and standard deviations). `AutoencoderOobleck`
      has none
    - `dtype`: of the weights; `loading`: options of diffusers' `from_pretrained` (`subfolder`, `revision`, ...)

    A `Transfusion` that has the halves saves them with itself. Raises `ImportError` without diffusers (the extra
    `pretrained`), `ValueError` for another class, other channels, and options that the class does not offer.
    """
    if isinstance(name_or_model, nn.Module):
        if given := [*loading, *(["dtype"] if dtype is not None else [])]:
            raise ValueError(f"{', '.join(given)} go with a name or a folder, got a {type(name_or_model).__name__}")
        class_name, given_config = type(name_or_model).__name__, getattr(name_or_model, "config", {})
    else:
        class_name, given_config = _read_config(name_or_model, loading)
    family, cls = family_of(class_name), _class_of(class_name)
    config = full_config(cls, given_config)
    channels = family.dim_latent(config)
    if dim_latent not in (None, channels):
        raise ValueError(f"{class_name} has latents of {channels} channels, but dim_latent={dim_latent} was asked for")
    options: dict[str, Any] = dict(slicing=slicing, tiling=tiling)
    with torch.device("meta"):  # what is wrong with the options is found before weights are loaded
        encoder = PretrainedEncoder(class_name, config, posterior=posterior, **options)
        decoder = PretrainedDecoder(class_name, config, **options)
    if isinstance(name_or_model, nn.Module):
        autoencoder = name_or_model
    else:
        with _weight_norm_allowed():
            safe = dict(use_safetensors=True) | loading  # nothing is unpickled, unless asked for
            autoencoder = cls.from_pretrained(str(name_or_model), torch_dtype=dtype, **safe)
    encoder.take(autoencoder)
    decoder.take(autoencoder)
    if measured_on is not None:
        measure_scale(encoder, decoder, measured_on)
    return AutoencoderHalves(encoder, decoder)


class _PretrainedHalf(nn.Module):
    """Mixed into a half: builds the autoencoder of a configuration, and keeps the modules that this half needs."""

    other_parts: tuple[str, ...]  # the modules that only the other half needs
    statistics: Any

    def _build(self, class_name: str, config: Config, slicing: bool, tiling: bool) -> None:
        self.class_name, self.slicing, self.tiling = class_name, slicing, tiling
        factors = self.family.factors(config)
        if tiling and class_name == "AutoencoderTiny" and factors[0] != TINY_TILE_FACTOR:
            raise ValueError(f"AutoencoderTiny places tiles for a factor of {TINY_TILE_FACTOR}, this has {factors[0]}")
        with torch.device("cpu"):  # real numbers, also where the weights are none yet
            self.statistics.set(*scale_of(config, self.statistics.dim_latent))
        with _weight_norm_allowed():
            self.take(_class_of(class_name)(**config))

    @property
    def family(self) -> Family:
        return family_of(self.class_name)

    def take(self, autoencoder: nn.Module) -> None:
        """Uses the modules of this autoencoder, which is of the same class and configuration; frozen."""
        own = with_plain_weights(without(autoencoder, self.other_parts))
        self.autoencoder: Any = own.eval().requires_grad_(False)
        if self.slicing:
            self.autoencoder.enable_slicing()
        if self.tiling:
            self.autoencoder.enable_tiling()


@register_component
class PretrainedEncoder(_PretrainedHalf, EncoderHalf):
    """The encoder of an autoencoder of diffusers, by its class and configuration; see `pretrained_autoencoder`."""

    other_parts = DECODER_PARTS

    def __init__(
        self,
        class_name: str,
        config: Config,
        *,
        posterior: PosteriorUse | None = None,
        slicing: bool = True,
        tiling: bool = False,
    ):
        family = family_of(class_name)
        if posterior not in (None, "sample", "mode"):
            raise ValueError(f'posterior is "sample" or "mode", got {posterior!r}')
        if posterior is not None and not family.has_posterior:
            raise ValueError(f"{class_name} has no posterior: leave out posterior={posterior!r}")
        super().__init__(family.dim_latent(config), family.num_dim)
        self.posterior = posterior or "sample"
        self.dim_data, self.factors = family.dim_data(config), tuple(family.factors(config))
        self._build(class_name, config, slicing, tiling)

    def encode(self, data: Float[Tensor, "b x ..."]) -> Float[Tensor, "b c ..."]:
        """Raises `ValueError` for data of other channels, and for sides of which positions would be dropped."""
        self._check(tuple(data.shape[1:]))
        made = self.autoencoder.encode(data)
        if self.family.has_posterior and self.posterior == "mode":
            return made.latent_dist.mode()
        return as_tensor(made, self.class_name)

    def _check(self, shape: tuple[int, ...]) -> None:
        channels, *axes = shape
        rests = [int(self.family.counts_from_one), *[0] * (self.num_dim - 1)]
        fits = channels == self.dim_data and len(axes) == self.num_dim
        if fits and all(side % factor == rest for side, factor, rest in zip(axes, self.factors, rests, strict=True)):
            return
        sides = ", ".join(
            f"{factor} k + {rest}" if rest else f"{factor} k" for factor, rest in zip(self.factors, rests, strict=True)
        )
        raise ValueError(
            f"{self.class_name} takes data of shape ({self.dim_data}, {sides}) with whole numbers k, got {shape}: it "
            "would drop what is beyond, so crop or pad the data"
        )


@register_component
class PretrainedDecoder(_PretrainedHalf, DecoderHalf):
    """The decoder of an autoencoder of diffusers, by its class and configuration; see `pretrained_autoencoder`."""

    other_parts = ENCODER_PARTS

    def __init__(self, class_name: str, config: Config, *, slicing: bool = True, tiling: bool = False):
        family = family_of(class_name)
        super().__init__(family.dim_latent(config), family.num_dim)
        self._build(class_name, config, slicing, tiling)

    def decode(self, latents: Float[Tensor, "b c ..."]) -> Float[Tensor, "b x ..."]:
        return as_tensor(self.autoencoder.decode(latents), self.class_name)


def family_of(class_name: str) -> Family:
    """Raises `ValueError` that lists the classes which are known."""
    if class_name not in FAMILIES:
        raise ValueError(f"{class_name} is not supported, only {', '.join(FAMILIES)} of diffusers are")
    return FAMILIES[class_name]


def scale_of(config: Config, dim_latent: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Mean and standard deviation of the latents, `(c,)` each, that a configuration has: those for which `(z - mean) /
    std` is what diffusers' pipelines denoise. None where it has none.
    """
    mean, std = config.get("latents_mean"), config.get("latents_std")
    shift, factor = config.get("shift_factor"), config.get("scaling_factor")
    if all(value is None for value in (mean, std, shift, factor)):
        return None, None
    blank = torch.zeros(dim_latent)
    mean = blank + (shift or 0.0) if mean is None else torch.tensor(mean, dtype=torch.float32).flatten()
    std = blank + 1.0 if std is None else torch.tensor(std, dtype=torch.float32).flatten()
    return mean, std / (1.0 if factor is None else factor)


def full_config(cls: type, config: Config) -> dict[str, Any]:
    """The arguments of a class of diffusers: those of a configuration, and the defaults of the others."""
    parameters = signature(cls).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
    known = {each.name for each in parameters}
    return defaults | {name: value for name, value in config.items() if name in known}


def without(module: nn.Module, parts: Sequence[str]) -> Any:
    """The same module without some of its parts, sharing all others with it."""
    shallow = copy.copy(module)
    shallow._modules = {name: None if name in parts else part for name, part in module._modules.items()}
    return shallow


@torch.no_grad()
def with_plain_weights(module: nn.Module) -> Any:
    """The same module where it has no `weight_norm`; otherwise a copy whose weights are the normed ones. They would be
    made anew in every call, lie outside of the `state_dict`, and could not be copied.
    """
    normed = [(part, hook) for part in module.modules() for hook in _weight_norms(part)]
    if not normed:
        return module
    for part, hook in normed:
        hook(part, None)  # makes the weight, without a gradient function
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    plain = copy.deepcopy(module, shared)
    for part in plain.modules():
        for hook in _weight_norms(part):
            remove_weight_norm(part, hook.name)
    return plain


def _weight_norms(module: nn.Module) -> list[WeightNorm]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm)]


def _diffusers() -> Any:
    return import_optional("diffusers", extra="pretrained")


def _class_of(class_name: str) -> Any:
    return getattr(_diffusers(), family_of(class_name) and class_name)


def _read_config(name: str | Path, loading: Mapping[str, Any]) -> tuple[str, Config]:
    """The class and the configuration of an autoencoder by its name; nothing else is loaded."""
    wanted = {key: value for key, value in loading.items() if key in CONFIG_OPTIONS}
    config = _diffusers().AutoencoderKL.load_config(str(name), **wanted)
    if "_class_name" not in config:
        raise ValueError(f"{name} is no autoencoder of diffusers: its configuration has no _class_name")
    return str(config["_class_name"]), config


@contextmanager
def _weight_norm_allowed() -> Iterator[None]:
    """torch has deprecated the `weight_norm` that AutoencoderOobleck is made with."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*weight_norm.*is deprecated", category=FutureWarning)
        yield
