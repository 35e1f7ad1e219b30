"""A vision encoder beside the autoencoder: what understands an image, next to what draws one (BAGEL, arXiv 2505.14683).

b images, c channels, h height and w width in pixels, n patches, d features. Pixels are in [-1, 1], as everywhere.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from transfusion_pytorch.data.images import ImageReader
from transfusion_pytorch.data.optional import import_optional
from transfusion_pytorch.modalities.autoencoder import as_input
from transfusion_pytorch.pretrained.files import fetch
from transfusion_pytorch.pretrained.processors import (
    PROCESSORS,
    image_reader,
    read_processor,
    resizing_of,
    scale_of,
    size_of,
)
from transfusion_pytorch.saving.components import register_component

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WHAT = "a vision model"  # in errors
CONFIG = "config.json"
NOT_OF_THE_MODEL = ("_name_or_path", "architectures", "dtype", "transformers_version")  # keys of a configuration


class VisionEncoder(nn.Module):
    """Any vision model as the `modality_encoder` of a modality that is only read: images `(b, c, h, w)` in [-1, 1] to
    features `(b, n, d)`. Frozen, like every encoder. For those of the hub see `pretrained_vision_encoder`.

    - `module`: gives `(b, n, d)`, or an output of `transformers` with a `last_hidden_state`
    - `dim`: d, the features of a patch; by default what `module.dim` or its configuration says
    - `size`: height and width in pixels (an int for squares) that images are resized to; None leaves them as they are
    - `mean`, `std`: of each channel of pixels in [0, 1], by which they are normalised; by default those of ImageNet

    Grey images are repeated for the channels that the encoder reads. Any floating point dtype goes in and comes out,
    whatever the module's is. A saved model names a `VisionEncoder`, and `from_pretrained` wants it handed over.

    Raises `TypeError` for what is no module, and `ValueError` where `dim` is not known, for sizes, means and deviations
    that are none, and in a forward pass for images of other channels and features of another shape.
    """

    is_read_only = True  # sampling never opens a modality that nothing could decode
    # what `Transfusion` compares with its own arguments
    num_dim, channel_first_latent = 1, False

    def __init__(
        self,
        module: nn.Module,
        *,
        dim: int | None = None,
        size: int | Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"a VisionEncoder is made of a module, got {type(module).__name__}; for a folder or a model of the hub "
                f"there is pretrained_vision_encoder({module!r:.80})"
            )
        self.module = module
        sides = (size, size) if isinstance(size, int) else None if size is None else tuple(size)
        if sides is not None and (len(sides) != 2 or min(sides) < 1):
            raise ValueError(f"size is height and width in pixels, or a side of squares, got {size}")
        self.size: tuple[int, int] | None = sides
        found = _width(module) if dim is None else dim
        if found is None or found < 1:
            unknown = f"the number of features of a {type(module).__name__} is not known: hand over dim=..."
            raise ValueError(unknown if found is None else f"dim must be positive, got {dim}")
        self.dim = int(found)
        self.mean = tuple(IMAGENET_MEAN if mean is None else mean)
        self.std = tuple(IMAGENET_STD if std is None else std)
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError(f"mean and std have a number for each channel, std positive, got {self.mean}, {self.std}")
        self.requires_grad_(False).eval()

    @property
    def dim_latent(self) -> int:
        return self.dim

    @property
    def image_reader(self) -> ImageReader | None:
        """Reads image files as this encoder takes them, None where it does not say how large they are."""
        return image_reader(self.size, len(self.mean))

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        features = self._features(as_input(self._normalized(images), self.module))
        if features.ndim != 3 or features.shape[-1] != self.dim:
            raise ValueError(f"a vision encoder gives (b, n, {self.dim}), got {tuple(features.shape)}")
        return features.to(images.dtype)

    def _normalized(self, images: Tensor) -> Tensor:
        channels = len(self.mean)
        if images.shape[1] == 1 and channels > 1:
            images = images.expand(-1, channels, -1, -1)
        if images.shape[1] != channels:
            raise ValueError(
                f"the vision encoder reads images of {channels} channels, which come first, got {tuple(images.shape)}"
            )
        if self.size is not None and tuple(images.shape[2:]) != self.size:
            images = F.interpolate(images, size=self.size, mode="bilinear", antialias=True)
        mean, std = (images.new_tensor(each)[:, None, None] for each in (self.mean, self.std))
        return ((images + 1) / 2 - mean) / std

    def _features(self, images: Tensor) -> Tensor:
        made = self.module(images)
        return made if isinstance(made, Tensor) else made.last_hidden_state


@register_component
class PretrainedVisionEncoder(VisionEncoder):
    """A vision model of `transformers` by its configuration, which a saved model has; see `pretrained_vision_encoder`.

    `config` has the `model_type` and what differs from the defaults of that type; `resizing` the fields of a
    `ProcessorReader` which say how image files are brought to the size (None: cropped around their centre). The rest is
    as in `VisionEncoder`.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        size: Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        resizing: Mapping[str, Any] | None = None,
    ):
        super().__init__(_built(config), size=size, mean=mean, std=std)
        self.resizing = resizing

    @property
    def image_reader(self) -> ImageReader | None:
        return image_reader(self.size, len(self.mean), self.resizing)


def pretrained_vision_encoder(
    name: str | Path, *, size: int | tuple[int, int] | None = None, dtype: torch.dtype | None = None, **hub: Any
) -> PretrainedVisionEncoder:
    """The vision encoder of a SigLIP, CLIP, DINO or ViT model of `transformers`, frozen. A `Transfusion` that has it
    saves it with itself.

    ```python
    vision = pretrained_vision_encoder("google/siglip2-base-patch16-256")
    model = Transfusion(..., dim_latent=(8, vision.dim), modality_encoder=(autoencoder, vision),
                        modality_num_dim=(2, 1), channel_first_latent=(True, False))
    model([[Condition((1, image)), Condition((0, image)), question, answer]])
    ```

    - `name`: the id of a repository on the Hugging Face hub, or a folder. Of a model of images and text only the part
      for images is kept. Configurations are read before weights, which are safetensors
    - `size`: height and width in pixels that images are resized to, by default those of the model's processor. This
      also says whether image files are cropped to their middle or scaled to that size, and how they are normalised
    - `dtype`: of the weights, by default that of the files; `hub`: options of `huggingface_hub.snapshot_download`

    Raises `ImportError` without `transformers` (the extra `pretrained`), `TypeError` or `FileNotFoundError` for what is
    no such model, and `ValueError` for one without a vision encoder, and for one that does not take images of the
    processor's size and channels alone (SigLIP 2 of any aspect ratio), before its weights are loaded.
    """
    transformers: Any = import_optional("transformers", extra="pretrained")
    folder = fetch(name, [CONFIG, *PROCESSORS], WHAT, **hub)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: it is no vision model of transformers")
    config: Any = transformers.AutoConfig.from_pretrained(folder)
    config = getattr(config, "vision_config", config)
    if not hasattr(config, "num_channels"):
        raise ValueError(f"{name} has no vision encoder: it is a model of type {config.model_type!r}")
    processor = read_processor(folder)
    described = {key: each for key, each in json.loads(config.to_json_string()).items() if key not in NOT_OF_THE_MODEL}
    described["model_type"] = config.model_type
    resizing = resizing_of(processor)
    if size is None:
        sides = size_of(processor)
    else:
        sides = (size, size) if isinstance(size, int) else size
        resizing = None if resizing["shortest_edge"] else resizing  # the edge was for another size
    with torch.device("meta"):
        encoder = PretrainedVisionEncoder(
            described, size=sides, resizing=resizing, **scale_of(processor, config.num_channels)
        )
    _check_forward(encoder, config, name)
    folder = fetch(name, ["*.json", "*.safetensors"], WHAT, **hub)
    try:
        options: dict[str, Any] = {} if dtype is None else dict(dtype=dtype)
        model, loading = transformers.AutoModel.from_pretrained(
            folder, config=config, use_safetensors=True, output_loading_info=True, **options
        )
    except OSError as error:
        raise FileNotFoundError(f"{folder} has no weights of a vision model as safetensors: {error}") from error
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"{folder} lacks {len(missing)} weights of its vision encoder, the first being {missing[0]}")
    encoder.module = model.eval().requires_grad_(False)
    return encoder


def _check_forward(encoder: PretrainedVisionEncoder, config: Any, name: str | Path) -> None:
    """Raises `ValueError` for a model that does not take images as they would come, by a pass without numbers."""
    side = getattr(config, "image_size", None)
    height, width = encoder.size or (side if isinstance(side, int) else 224,) * 2
    trial = copy.copy(encoder)
    trial._modules = {"module": copy.deepcopy(encoder.module).to("meta")}
    try:
        with torch.no_grad():
            trial(torch.empty(1, config.num_channels, height, width, device="meta"))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} cannot be a vision encoder: a {type(encoder.module).__name__} does not take images of "
            f"{config.num_channels} channels and {height} x {width} pixels, and nothing else, to (b, n, d): {error}"
        ) from error
    except RuntimeError:  # some operation that needs numbers; the first forward pass will tell
        pass


def _built(config: Mapping[str, Any]) -> nn.Module:
    """A model with random weights. Buffers that no file has are real also where the weights are on `meta`."""
    transformers: Any = import_optional("transformers", extra="pretrained")
    parsed = transformers.AutoConfig.for_model(**config)
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModel.from_config(parsed)
        if any(buffer.is_meta for buffer in model.buffers()):
            with torch.device("cpu"):
                plain = transformers.AutoModel.from_config(parsed)
            for name, buffer in plain.named_buffers():
                owner, _, own = name.rpartition(".")
                model.get_submodule(owner)._buffers[own] = buffer
    return model


def _width(module: nn.Module) -> int | None:
    config: Any = getattr(module, "config", None)
    return getattr(module, "dim", None) or getattr(config, "hidden_size", None)
