"""Images and their labels as samples, to be drawn or to be named."""

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from transfusion_pytorch.data.images import patchify

from .data import LabelledImages
from .judge import augment

TASKS = {"draw": ("draw",), "caption": ("caption",), "both": ("draw", "caption")}


class LabelImagePairs(Dataset):
    """Label then image for `"draw"`, image then label for `"caption"`: one of the tasks at random for every image.

    Images are cut into patches `(h / patch, w / patch, c patch patch)`. Those to be named are turned and shifted a
    little, anew every time; those to be drawn are left as they are.
    """

    def __init__(self, data: LabelledImages, tasks: tuple[str, ...], *, patch: int):
        self.data, self.tasks, self.patch = data, tasks, patch
        self.latents = patchify(data.images, patch)

    def __len__(self) -> int:
        return len(self.data.labels)

    def sample(self, index: int, generator: Generator) -> list[Tensor]:
        """The sample of an image. All that is random in it comes from the generator."""
        label = self.data.labels[index]
        if self.tasks[int(torch.randint(len(self.tasks), (), generator=generator))] == "draw":
            return [label, self.latents[index]]
        return [patchify(augment(self.data.images[index, None], generator), self.patch)[0], label]
