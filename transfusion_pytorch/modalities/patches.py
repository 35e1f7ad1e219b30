"""Images as patches: an autoencoder without weights, so that a model takes images and gives images.

b images, h height, w width, c channels, p side of a patch, d = c p p. Pixels are in [-1, 1].
"""

from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from transfusion_pytorch.saving.components import register_component


def patchify(images: Float[Tensor, "*b c h w"], size: int) -> Float[Tensor, "*b rows columns d"]:
    """Cuts images into patches of `size` x `size` pixels: (b, c, h, w) -> (b, h/p, w/p, c*p*p)."""
    height, width = images.shape[-2:]
    if size < 1 or height % size or width % size:
        raise ValueError(f"patches of {size}x{size} do not divide images of {height}x{width}; choose a divisor of both")
    return rearrange(images, "... c (h p) (w q) -> ... h w (c p q)", p=size, q=size)


def unpatchify(latents: Float[Tensor, "*b rows columns d"], size: int) -> Float[Tensor, "*b c h w"]:
    """The inverse of `patchify` with the same size: (b, h/p, w/p, c*p*p) -> (b, c, h, w)."""
    if size < 1 or latents.shape[-1] % size**2:
        raise ValueError(f"latents of {latents.shape[-1]} channels do not hold whole patches of {size}x{size} pixels")
    return rearrange(latents, "... h w (c p q) -> ... c (h p) (w q)", p=size, q=size)


@register_component
class PatchEncoder(nn.Module):
    """Images `(b, h, w, c)` in [-1, 1] to latents `(b, h/p, w/p, c*p*p)`: a `modality_encoder`.

    It has no weights. It is what a saved model says of its images, so that whoever loads it can read image files for
    it and write what it draws:

    - `patch_size`: the side of a patch in pixels; 1 where the pixels themselves are the latents, for a U-Net
    - `channels`: 3 for colour, 1 for grey
    - `sizing`: how image files are brought to a size (`FixedSize`, `BucketedSize`, `NativeSize` of `data.images`); None
      is the size of the modality's default shape
    """

    def __init__(self, patch_size: int, *, channels: int = 3, sizing: Any = None):
        super().__init__()
        if patch_size < 1:
            raise ValueError(f"a patch has a side of at least 1 pixel, got {patch_size}")
        self.patch_size, self.channels, self.sizing = patch_size, channels, sizing

    @property
    def dim_latent(self) -> int:
        """Channels of a latent: what `Transfusion` is built with."""
        return self.channels * self.patch_size**2

    def forward(self, images: Float[Tensor, "b h w c"]) -> Float[Tensor, "b rows columns d"]:
        if images.shape[-1] != self.channels:
            raise ValueError(f"expected images (h, w, {self.channels}), got {tuple(images.shape[1:])}")
        return patchify(images.movedim(-1, -3), self.patch_size)


@register_component
class PatchDecoder(nn.Module):
    """The inverse of `PatchEncoder`: a `modality_decoder`."""

    def __init__(self, patch_size: int):
        super().__init__()
        self.patch_size = patch_size

    def forward(self, latents: Float[Tensor, "b rows columns d"]) -> Float[Tensor, "b h w c"]:
        return unpatchify(latents, self.patch_size).movedim(-3, -1)
