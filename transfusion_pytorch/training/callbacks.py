"""What a user adds to a `Trainer`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
        """Every `sample_every` steps. Returns figures, and images `(h, w, 3)` of uint8, for the tracker."""

    def on_save(self, trainer: Any, path: Path) -> None:
        """After a checkpoint was written."""

    def on_end(self, trainer: Any) -> None:
        """After the last step, or when the run is stopped."""
