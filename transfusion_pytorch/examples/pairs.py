"""Images and their labels as samples, to be drawn or to be named."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from transfusion_pytorch.data.images import patchify

from .data import LabelledImages
from .judge import augment

TASKS = {"draw": ("draw",), "caption": ("caption",), "both": ("draw", "caption")}


class LabelImagePairs(Dataset):
    """Label then image for `"draw"`, image then label for `"caption"`: one of the tasks at random for every image.

    Images are cut into patches `(h / patch, w / patch, c patch patch)`. Those to be named are turned and shifted a
    little, anew in each epoch; those to be drawn are left as they are.
    """

    def __init__(self, data: LabelledImages, tasks: tuple[str, ...], *, patch: int, seed: int):
        self.data, self.tasks, self.patch = data, tasks, patch
        self.generator = torch.Generator().manual_seed(seed)
        self.latents = patchify(data.images, patch)
        self.start_epoch()

    def start_epoch(self) -> None:
        self.augmented = patchify(augment(self.data.images, self.generator), self.patch)

    def __len__(self) -> int:
        return len(self.data.labels)

    def __getitem__(self, index: int) -> list[Tensor]:
        label, task = self.data.labels[index], self.tasks[int(torch.randint(len(self.tasks), ()))]
        return [label, self.latents[index]] if task == "draw" else [self.augmented[index], label]


def endless(dataset: LabelImagePairs, batches: Iterable[Any]) -> Iterator[Any]:
    """Batches for as long as one wants, epoch after epoch."""
    while True:
        yield from batches
        dataset.start_epoch()
