"""A folder of images without captions."""

import copy
from pathlib import Path

from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from transfusion_pytorch.data.captioned import find_images
from transfusion_pytorch.data.images import ImageReader
from transfusion_pytorch.data.order import shuffled


class ImageFiles(Dataset):
    """The images of a folder and of all folders in it, in the order of their names: what an autoencoder learns.

    `images` is an `ImageReader`, or the side of squares in pixels; channels come first then. Broken images are left out
    and reported (`SkipSample`). Raises `FileNotFoundError` and `ValueError` where there are none.
    """

    def __init__(self, folder: str | Path, *, images: ImageReader | int):
        self.folder = Path(folder)
        self.images = images if isinstance(images, ImageReader) else ImageReader(images, channels_first=True)
        self.names = find_images(self.folder)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Float[Tensor, "c h w"]:
        return self.images((self.folder / self.names[index]).read_bytes())

    def describe(self, index: int) -> str:
        return str(self.folder / self.names[index])

    def hold_out(self, count: int, *, seed: int = 0) -> tuple["ImageFiles", "ImageFiles"]:
        """All but `count` images to train on, and those `count` to validate on, which the seed chooses.

        Raises `ValueError` where nothing would be left to train on.
        """
        if not 0 <= count < len(self):
            raise ValueError(f"{count} images cannot be held out of {len(self)}: hold out fewer")
        order = shuffled(len(self), seed, "held out").tolist()
        return self._only(order[count:]), self._only(order[:count])

    def _only(self, indices: list[int]) -> "ImageFiles":
        chosen = copy.copy(self)
        chosen.names = [self.names[index] for index in sorted(indices)]
        return chosen
