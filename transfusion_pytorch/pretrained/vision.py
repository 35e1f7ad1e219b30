"""A vision encoder beside the autoencoder: what understands an image, next to what draws one (BAGEL, arXiv 2505.14683).

b images, n patches, d features.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from transfusion_pytorch.data.optional import import_optional

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VisionEncoder(nn.Module):
    """The `modality_encoder` of a modality that is only read: images `(b, 3, h, w)` in [0, 1] to features `(b, n, d)`.

    ```python
    vision = VisionEncoder("google/siglip2-base-patch16-256")
    model = Transfusion(..., dim_latent=(8, vision.dim), modality_encoder=(autoencoder, vision),
                        modality_num_dim=(2, 1), channel_first_latent=(True, False))
    model([[Condition((1, image)), Condition((0, image)), question, answer]])
    ```

    `source` is any module that gives `(b, n, d)`, or an output of `transformers` with a `last_hidden_state`; or the
    name of a SigLIP, DINO or other vision model of the hub, or its folder. Images are resized to `size`, if given, and
    normalised by `mean` and `std` (by default those of its processor, or of ImageNet). Frozen, like every encoder.
    """

    def __init__(
        self,
        source: str | nn.Module,
        *,
        dim: int | None = None,
        size: int | tuple[int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__()
        if isinstance(source, nn.Module):
            self.module, found = source, {}
        else:
            self.module, found = _vision_model(source)
        self.size = (size, size) if isinstance(size, int) else size or found.get("size")
        given = dim or _width(self.module)
        if given is None:
            raise ValueError(f"the number of features of a {type(source).__name__} is not known: hand over dim=...")
        self.dim = int(given)
        self.mean = tuple(mean or found.get("mean") or IMAGENET_MEAN)
        self.std = tuple(std or found.get("std") or IMAGENET_STD)
        self.requires_grad_(False).eval()

    def forward(self, images: Float[Tensor, "b c h w"]) -> Shaped[Tensor, "b n d"]:
        """Gray images are repeated for the channels that the encoder reads."""
        channels = len(self.mean)
        if images.shape[1] == 1 and channels > 1:
            images = images.expand(-1, channels, -1, -1)
        if images.shape[1] != channels:
            raise ValueError(f"the vision encoder reads images of {channels} channels, got {images.shape[1]}")
        if self.size is not None and tuple(images.shape[2:]) != tuple(self.size):
            images = F.interpolate(images, size=self.size, mode="bilinear", antialias=True)
        mean, std = (images.new_tensor(each)[:, None, None] for each in (self.mean, self.std))
        made = self.module((images - mean) / std)
        features = made if isinstance(made, Tensor) else made.last_hidden_state
        if features.ndim != 3 or features.shape[-1] != self.dim:
            raise ValueError(f"a vision encoder gives (b, n, {self.dim}), got {tuple(features.shape)}")
        return features


def _vision_model(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The vision tower of a model of `transformers`, and how it wants its images."""
    transformers = import_optional("transformers", extra="pretrained")
    model = transformers.AutoModel.from_pretrained(name)
    processor: Any = transformers.AutoImageProcessor.from_pretrained(name)
    size = getattr(processor, "crop_size", None) or processor.size
    sides = (size.get("height"), size.get("width")) if "height" in size else (size.get("shortest_edge"),) * 2
    found = dict(size=sides, mean=processor.image_mean, std=processor.image_std)
    return getattr(model, "vision_model", model), found


def _width(module: nn.Module) -> int | None:
    config: Any = getattr(module, "config", None)
    return getattr(module, "dim", None) or getattr(config, "hidden_size", None)
