"""Where figures and pictures of a run go besides its own files: trackio, TensorBoard, Weights & Biases.

The services are reached through the trackers of Hugging Face `accelerate`.

h height, w width.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Tracker(Protocol):
    """What the trainer reports to."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Numbers, and images: `(h, w, 3)` of uint8, a tensor or a NumPy array."""
        ...

    def finish(self) -> None:
        """Waits until everything is written or sent."""
        ...


@dataclass(frozen=True)
class AccelerateTracker:
    """One of accelerate's trackers, and how it takes images: `log_images(tracker, images, step)`."""

    tracker: Any
    log_images: Callable[[Any, dict[str, Any], int], None]

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Raises `ValueError` for what is neither a number nor an image."""
        images, numbers = {}, {}
        for name, value in values.items():
            if getattr(value, "ndim", 0):
                images[name] = as_image(name, value)
            else:
                numbers[name] = float(value)
        if numbers:
            self.tracker.log(numbers, step=step)
        if images:
            self.log_images(self.tracker, images, step)

    def finish(self) -> None:
        self.tracker.finish()


def _trackio_images(tracker: Any, images: dict[str, Any], step: int) -> None:
    from trackio import Image

    tracker.log({name: Image(image) for name, image in images.items()}, step=step)


def _tensorboard_images(tracker: Any, images: dict[str, Any], step: int) -> None:
    tracker.log_images({name: image[None] for name, image in images.items()}, step=step, dataformats="NHWC")


def _wandb_images(tracker: Any, images: dict[str, Any], step: int) -> None:
    tracker.log_images({name: [image] for name, image in images.items()}, step=step)


# How each takes images, and its options for a run that goes on under its name.
IMAGE_LOGGERS = {"trackio": _trackio_images, "tensorboard": _tensorboard_images, "wandb": _wandb_images}
OPTIONS: dict[str, Callable[[str], dict[str, Any]]] = {
    "trackio": lambda run: dict(name=run, resume="allow"),
    "tensorboard": lambda run: {},
    "wandb": lambda run: dict(name=run, id=run, resume="allow"),
}
TRACKERS = tuple(IMAGE_LOGGERS)


def create_tracker(
    name: str, *, project: str, run: str, folder: str | Path, config: Mapping[str, Any] | None = None
) -> Tracker:
    """Opens a tracker: `"trackio"` (local), `"tensorboard"` (files in `folder/project/run`) or `"wandb"`.

    To be called by one process, after the `Accelerator` was made if there is one. A run of the same name goes on.
    `config` describes it; what is no number or text is written as JSON. Raises `ValueError` for an unknown name and
    `ImportError` that says what to install.
    """
    if name not in TRACKERS:
        raise ValueError(f"unknown tracker '{name}'; there are {', '.join(TRACKERS)}")
    for package in ("accelerate", name):
        if find_spec(package) is None:
            raise ImportError(
                f"the tracker '{name}' needs {package}, which is not installed: "
                f'pip install "transfusion-pytorch[train]" {name}'
            )
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # which accelerate's trackers ask whether this is the main process
    kind = LOGGER_TYPE_TO_CLASS[name]
    place = (f"{project}/{run}", str(folder)) if kind.requires_logging_directory else (project,)
    tracker = kind(*place, **OPTIONS[name](run))
    tracker.start()
    if config:
        tracker.store_init_configuration({key: _as_setting(value) for key, value in config.items()})
    return AccelerateTracker(tracker, IMAGE_LOGGERS[name])


def _as_setting(value: Any) -> bool | int | float | str:
    return value if isinstance(value, (bool, int, float, str)) else json.dumps(value, default=str)


def as_image(name: str, value: Any) -> Any:
    """An image as trackers take it, a NumPy array (h, w, 3). Raises `ValueError` for anything else."""
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
    if array.ndim != 3 or array.shape[-1] != 3 or str(array.dtype) != "uint8":
        raise ValueError(
            f"'{name}': an image is (height, width, 3) of uint8, got {tuple(array.shape)} of {array.dtype}"
        )
    return array
