"""What a user adds to a `Trainer`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transfusion_pytorch.evaluating import evaluating
from transfusion_pytorch.training.trackers import as_image


class Callback:
    """Override what you need. Every process calls them; write files where `trainer.is_main`.

    `trainer.step` is the number of steps done, `trainer.model` what is trained, `trainer.average` the EMA that samples.
    """

    def on_start(self, trainer: Any) -> None:
        """Before the first step, with everything resumed."""

    def on_step(self, trainer: Any, losses: Mapping[str, Any]) -> None:
        """After a step of the optimizer. `losses` are scalars on the device; reading them waits for it."""

    def on_validation(self, trainer: Any, figures: Mapping[str, float]) -> None:
        """After a validation."""

    def on_sample(self, trainer: Any) -> Mapping[str, Any] | None:
        """Every `sample_every` steps, and after the last, with the average in evaluation mode and without gradients.

        Returns what it made, by name, on the main process; what others return is dropped:

        - numbers, for `metrics.csv` (`samples/NAME`) and the tracker
        - images `(h, w, 3)` of uint8, tensors or NumPy arrays, for the tracker
        """

    def on_save(self, trainer: Any, path: Path) -> None:
        """After a checkpoint was written."""

    def on_end(self, trainer: Any) -> None:
        """After the last step, or when the run is stopped."""


class Sampled(NamedTuple):
    """What callbacks have sampled, by name."""

    figures: dict[str, float]
    images: dict[str, Any]


def sampled(callbacks: Sequence[Callback], trainer: Any) -> Sampled:
    """What `on_sample` of all callbacks returns. Raises `TypeError` and `ValueError` for what is neither a number nor
    an image, with or without a tracker.
    """
    figures: dict[str, float] = {}
    images: dict[str, Any] = {}
    for callback in callbacks:
        with evaluating(trainer.average):
            returned = callback.on_sample(trainer) or {}
        for name, value in returned.items():
            if getattr(value, "ndim", 0):
                images[name] = as_image(name, value)
            else:
                figures[name] = _as_number(callback, name, value)
    return Sampled(figures, images)


def _as_number(callback: Callback, name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{type(callback).__name__}.on_sample returned {type(value).__name__} as '{name}': expected a number, or "
            "an image as a tensor or array (height, width, 3) of uint8"
        ) from error
