"""How a model takes images and gives them: what it says by its encoder, or by the shape of its latents."""

from typing import Any

from transfusion_pytorch.data.images import FixedSize, ImageReader
from transfusion_pytorch.modalities.autoencoder import DataLayout
from transfusion_pytorch.modalities.patches import PatchEncoder

PICTURE_CHANNELS = (1, 3)


def picture_channels(io: Any) -> int | None:
    """3 for a modality (`ModalityIO`) of colour images, 1 of grey ones, None where it has no images.

    Images are read by an encoder with an `image_reader`, by a `PatchEncoder`, or by one that has a `DataLayout` of two
    axes (`KLEncoder`, `pretrained_autoencoder`); or they are latents of two axes with 1 or 3 channels, without encoder
    and decoder.
    """
    if (own := _own_reader(io)) is not None:
        return len(own.mode)
    if isinstance(io.encoder, PatchEncoder):
        return io.encoder.channels if io.encoder.channels in PICTURE_CHANNELS else None
    if (layout := _layout(io)) is not None:
        return layout.channels
    is_image = io.encoder is None and io.decoder is None and io.spec.num_dim == 2
    return io.spec.dim_latent if is_image and io.spec.dim_latent in PICTURE_CHANNELS else None


def image_reader_of(io: Any) -> ImageReader | None:
    """Reads image files as a modality takes images; None where it has none, or does not say how large they are."""
    if (own := _own_reader(io)) is not None:
        return own
    channels, is_patched = picture_channels(io), isinstance(io.encoder, PatchEncoder)
    sizing = io.encoder.sizing if is_patched else None
    if channels is None or (sizing is None and io.spec.default_shape is None):
        return None
    if sizing is None:
        scale = io.encoder.patch_size if is_patched else 1
        layout = _layout(io) or DataLayout(channels, (scale, scale))
        sizing = FixedSize(*layout.data_shape(io.spec.default_shape))
    return ImageReader(sizing, mode="RGB" if channels == 3 else "L", channels_first=has_channels_first(io))


def has_channels_first(io: Any) -> bool:
    """Whether the images of a modality are `(c, h, w)`."""
    if (own := _own_reader(io)) is not None:
        return own.channels_first
    return io.spec.channel_first and not isinstance(io.encoder, PatchEncoder)


def _layout(io: Any) -> DataLayout | None:
    """What the encoder of images says of them, if it does."""
    layout = getattr(io.encoder, "layout", None)
    is_image = isinstance(layout, DataLayout) and len(layout.factors) == 2 and layout.channels in PICTURE_CHANNELS
    return layout if is_image else None


def _own_reader(io: Any) -> ImageReader | None:
    own = getattr(io.encoder, "image_reader", None)
    return own if isinstance(own, ImageReader) else None
