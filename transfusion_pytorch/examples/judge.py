"""An image classifier, trained on the real images alone, that says what a generative model drew.

b, n, m images, c channels, h height, w width, f features; pixels are in [-1, 1].
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from transfusion_pytorch.training.schedule import learning_rate_factor

from .data import ImageData
from .run import progress

BATCH_SIZE = 128
# Four passes over the training images; small sets need more of them, and large ones are learned by then.
PASSES, LEAST_STEPS, MOST_STEPS = 4, 400, 2000


class Judge(nn.Module):
    """Three convolutions and a linear layer: quick on a CPU, for images of about 8x8 to 32x32 pixels."""

    def __init__(self, *, shape: tuple[int, int, int], num_classes: int, width: int = 16):
        super().__init__()
        self.shape = shape  # (c, h, w)
        stride = 2 if max(shape[1:]) > 16 else 1
        self.layers = nn.Sequential(
            convolution(shape[0], width, stride=stride),
            convolution(width, 2 * width),
            nn.MaxPool2d(2),
            convolution(2 * width, 4 * width),
            nn.AdaptiveMaxPool2d(3),
            nn.Flatten(),
            nn.Linear(9 * 4 * width, num_classes),
        )
        # With the channels last in memory the convolutions take half the time on a CPU.
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (torch's overloads lack it)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        return self.layers[-1](self.features(images))

    def features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        """What it decides by."""
        if images.shape[1:] != self.shape:
            raise ValueError(f"this judge reads images of shape {self.shape}, got {tuple(images.shape[1:])}")
        return self.layers[:-1](images.contiguous(memory_format=torch.channels_last))


class FeatureMaps(nn.Module):
    """What the convolutions of a judge make of images, one map after another: the feature network of a perceptual term
    (`AutoencoderObjective`).
    """

    def __init__(self, judge: Judge):
        super().__init__()
        self.layers = nn.ModuleList(list(judge.layers)[:4])

    def forward(self, images: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b f _h _w"]]:
        maps = []
        for layer in self.layers:
            images = layer(images)
            if isinstance(layer, nn.Sequential):
                maps.append(images)
        return maps


class ScoredJudge(NamedTuple):
    """A trained judge, frozen, with the fraction of the held-out images that it recognises."""

    judge: Judge
    test_accuracy: float


def convolution(channels_in: int, channels_out: int, *, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(channels_out), nn.ReLU())


def train_judge(
    data: ImageData, *, seed: int = 0, steps: int | None = None, device: torch.device | str = "cpu"
) -> ScoredJudge:
    """Trains a judge on `data.train` and scores it on `data.test`.

    The same seed gives the same judge on a CPU. The caller's random state is left as it was.
    """
    if steps is None:
        steps = min(max(PASSES * len(data.train.images) // BATCH_SIZE, LEAST_STEPS), MOST_STEPS)
    judge = seeded_judge(data, seed).to(device)
    images, labels = (tensor.cpu() for tensor in data.train)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-2, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, total=steps, warmup=steps // 7)
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in progress(steps, description="judge"):
        chosen = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        logits = judge(augment(images[chosen], generator).to(device))
        loss = F.cross_entropy(logits, labels[chosen].to(device), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    judge.eval().requires_grad_(False)
    return ScoredJudge(judge, accuracy(judge, *data.test))


def seeded_judge(data: ImageData, seed: int) -> Judge:
    """An untrained judge. Its weights are drawn on the CPU, so that no other device's random state is touched."""
    channels, height, width = data.train.images.shape[1:]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Judge(shape=(channels, height, width), num_classes=len(data.class_names))


def augment(images: Float[Tensor, "b c h w"], generator: Generator) -> Float[Tensor, "b c h w"]:
    """Turns by a few degrees, scales by a few percent, shifts by up to half a pixel, and adds a little noise.

    On the CPU, so that a seed means the same for every device.
    """
    batch, height, width = len(images), images.shape[2], images.shape[3]
    angle, growth = 0.03 * torch.randn(2, batch, generator=generator)
    shift_x, shift_y = torch.empty(2, batch).uniform_(-1, 1, generator=generator)
    cos, sin = (1 + growth) * torch.cos(angle), (1 + growth) * torch.sin(angle)
    # Positions run from -1 to 1, so half a pixel is 1 / width.
    rows = torch.stack([cos, -sin, shift_x / width, sin, cos, shift_y / height], dim=-1)
    grid = F.affine_grid(rows.reshape(batch, 2, 3), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    # A drawn image is never as clean as a real one.
    return moved + 0.05 * torch.randn(images.shape, generator=generator)


def recognised(judge: Judge, images: Float[Tensor, "n c h w"]) -> Int[Tensor, " n"]:
    """The class that the judge sees in each image. What is outside [-1, 1] is clipped, as in a picture."""
    return _outputs(judge, images, judge).argmax(dim=-1).to(images.device)


@torch.no_grad()
def _outputs(judge: Judge, images: Float[Tensor, "n c h w"], look: Callable[[Tensor], Tensor]) -> Float[Tensor, "n f"]:
    judge.eval()
    device = next(judge.parameters()).device
    return torch.cat([look(part.to(device).float().clamp(-1, 1)) for part in images.split(1000)])


def frechet_distance(judge: Judge, images: Float[Tensor, "n c h w"], others: Float[Tensor, "m c h w"]) -> float:
    """How far two sets of images are from each other: the Frechet distance between normal distributions of the judge's
    features (arXiv 1706.08500, with this judge instead of Inception). It depends on how many images there are: compare
    for equal numbers only. Raises `ValueError` for fewer than two images.
    """
    if min(len(images), len(others)) < 2:
        raise ValueError("the distance between sets of images needs at least two images in each")
    means, covariances = [], []
    for each in (images, others):
        features = _outputs(judge, each, judge.features).double().cpu()
        means.append(features.mean(dim=0))
        covariances.append(features.T.cov())
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # the trace of the root of a product of covariances is that of a symmetric matrix with the same eigenvalues
    product = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0)
    spread = sum(covariance.trace() for covariance in covariances) - 2 * product.sqrt().sum()
    return ((means[0] - means[1]).square().sum() + spread).item()


def accuracy(judge: Judge, images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"]) -> float:
    """The fraction of the images in which the judge sees the class asked for."""
    if len(images) == 0:
        raise ValueError("the accuracy on no images is undefined; pass at least one")
    return (recognised(judge, images) == labels.to(images.device)).float().mean().item()
