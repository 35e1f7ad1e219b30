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
from transfusion_pytorch.modalities.autoencoder import DataLayout, as_tensor
from transfusion_pytorch.pretrained.files import local_folder
from transfusion_pytorch.saving.components import register_component
from transfusion_pytorch.saving.methods import checked_device_and_dtype

Config = Mapping[str, Any]
PosteriorUse = Literal["sample", "mode"]
# the modules of an autoencoder that only one half needs
ENCODER_PARTS, DECODER_PARTS = ("encoder", "quant_conv"), ("decoder", "post_quant_conv")
CONFIG_OPTIONS = ("subfolder", "revision", "cache_dir", "token", "force_download", "local_files_only", "proxies")
OPTIONS = (*CONFIG_OPTIONS, "variant", "use_safetensors", "low_cpu_mem_usage", "disable_mmap")  # of `from_pretrained`
WAN_FRAMES = 4  # AutoencoderKLWan encodes the first frame by itself, and all others in chunks of so many
WHAT = "an autoencoder of diffusers"  # in errors


class Family(NamedTuple):
    """What one class of diffusers differs in, read from its configuration.

    - `layout`: that of the data
    - `dim_latent`: channels of a latent
    - `has_posterior`: latents are a distribution
    - `tile_factor`: how many positions along an axis of space it takes for one of a latent when it places tiles; None
      where that is always right
    """

    layout: Callable[[Config], DataLayout]
    dim_latent: Callable[[Config], int]
    has_posterior: bool = True
    tile_factor: Callable[[Config], int] | None = None


def _image_layout(config: Config) -> DataLayout:
    widths = config["block_out_channels" if "block_out_channels" in config else "encoder_block_out_channels"]
    return DataLayout(config["in_channels"], (2 ** (len(widths) - 1),) * 2)


def _wan_layout(config: Config) -> DataLayout:
    patch = config.get("patch_size") or 1
    halvings = len(config["dim_mult"]) - 1
    factor, frames = 2**halvings * patch, 2 ** sum(config["temperal_downsample"][:halvings])
    if WAN_FRAMES % frames:
        raise ValueError(
            f"AutoencoderKLWan encodes chunks of {WAN_FRAMES} frames, and temperal_downsample="
            f"{config['temperal_downsample']} would make one latent of {frames}"
        )
    channels = config["in_channels"] // patch**2
    return DataLayout(channels, (frames, factor, factor), has_first=True, chunk=WAN_FRAMES)


def _oobleck_layout(config: Config) -> DataLayout:
    return DataLayout(config["audio_channels"], (prod(config["downsampling_ratios"]),))


FAMILIES = {
    "AutoencoderKL": Family(_image_layout, lambda config: config["latent_channels"]),
    "AutoencoderDC": Family(_image_layout, lambda config: config["latent_channels"], has_posterior=False),
    "AutoencoderTiny": Family(
        _image_layout, lambda config: config["latent_channels"], has_posterior=False, tile_factor=lambda config: 8
    ),
    "AutoencoderKLWan": Family(
        _wan_layout, lambda config: config["z_dim"], tile_factor=lambda config: config["scale_factor_spatial"]
    ),
    # half of its channels are the scale of the posterior
    "AutoencoderOobleck": Family(_oobleck_layout, lambda config: config["encoder_hidden_size"] // 2),
}


def pretrained_autoencoder(
    name_or_model: str | Path | nn.Module,
    *,
    dim_latent: int | None = None,
    posterior: PosteriorUse | None = None,
    slicing: bool = True,
    tiling: bool = False,
    measured_on: Iterable[Float[Tensor, "_b ..."]] | None = None,
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
    - `measured_on`: batches of data `(b, x, ...)`, on which mean and standard deviation of the latents are measured.
      Otherwise they are those of the configuration (scaling and shift factor, or means and standard deviations).
      `AutoencoderOobleck` has none
    - `dtype`: of the weights; `loading`: options of diffusers' `from_pretrained` (`subfolder`, `revision`, ...)

    A `Transfusion` that has the halves saves them with itself. Raises `ImportError` without diffusers (the extra
    `pretrained`), `TypeError` for what is neither module nor name, for other options and a `dtype` that is none, and
    for one tensor as `measured_on`, `FileNotFoundError` for a folder or repository that is not there, and `ValueError`
    for another class, other channels, options that the class does not offer, and an instance without numbers.
    """
    checked_device_and_dtype(None, dtype)
    if unknown := [name for name in loading if name not in OPTIONS]:
        hint = "; the type of the weights is dtype=..." if "torch_dtype" in unknown else ""
        raise TypeError(f"unknown options {', '.join(unknown)}; there are dtype, {', '.join(OPTIONS)}{hint}")
    if isinstance(measured_on, Tensor):
        raise TypeError("measured_on are batches, got one tensor; give a list: measured_on=[tensor]")
    if isinstance(name_or_model, nn.Module):
        if given := [*loading, *(["dtype"] if dtype is not None else [])]:
            raise ValueError(f"{', '.join(given)} go with a name or a folder, got a {type(name_or_model).__name__}")
        if any(tensor.is_meta for tensor in (*name_or_model.parameters(), *name_or_model.buffers())):
            raise ValueError("the autoencoder is on the meta device, without numbers: load its weights first")
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
        factor = self.family.layout(config).factors[-1]
        placed = factor if self.family.tile_factor is None else self.family.tile_factor(config)
        if tiling and placed != factor:
            raise ValueError(f"{class_name} places tiles for a factor of {placed}, this has {factor}: leave out tiling")
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
    """The encoder of an autoencoder of diffusers, by its class and configuration; see `pretrained_autoencoder`.

    Raises `ValueError` for data of other channels, and for sides of which positions would be dropped.
    """

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
        super().__init__(family.dim_latent(config), family.layout(config))
        self.posterior = posterior or "sample"
        self._build(class_name, config, slicing, tiling)

    def encode(self, data: Float[Tensor, "b x ..."]) -> Float[Tensor, "b c ..."]:
        made = self.autoencoder.encode(data)
        if self.family.has_posterior and self.posterior == "mode":
            return made.latent_dist.mode()
        return as_tensor(made, self.class_name)


@register_component
class PretrainedDecoder(_PretrainedHalf, DecoderHalf):
    """The decoder of an autoencoder of diffusers, by its class and configuration; see `pretrained_autoencoder`."""

    other_parts = ENCODER_PARTS

    def __init__(self, class_name: str, config: Config, *, slicing: bool = True, tiling: bool = False):
        family = family_of(class_name)
        super().__init__(family.dim_latent(config), len(family.layout(config).factors))
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
    loader = _diffusers().AutoencoderKL
    local_folder(name, WHAT)
    try:
        config = loader.load_config(str(name), **wanted)
    except OSError as error:
        raise FileNotFoundError(f"{str(name)!r} has no configuration of {WHAT}: {error}") from error
    if "_class_name" not in config:
        raise ValueError(f"{name} is no autoencoder of diffusers: its configuration has no _class_name")
    return str(config["_class_name"]), config


@contextmanager
def _weight_norm_allowed() -> Iterator[None]:
    """torch has deprecated the `weight_norm` that AutoencoderOobleck is made with."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*weight_norm.*is deprecated", category=FutureWarning)
        yield
