"""What a run says at its start, and what it writes as it goes."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transfusion_pytorch.network.attend import choose_attention
from transfusion_pytorch.training.config import TrainConfig
from transfusion_pytorch.training.launch import Launch
from transfusion_pytorch.training.metrics_file import MetricsFile
from transfusion_pytorch.training.trackers import Tracker, create_tracker


def describe_run(model: Any, config: TrainConfig, launch: Launch) -> Iterator[str]:
    """Sizes, devices, precision, the way of attention, and every option that is not the default."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    processes = "1 process" if launch.size == 1 else f"{launch.size} processes"
    shared = "" if launch.size == 1 else " (FSDP2)" if launch.shards else " (DDP)"
    yield f"model: {trained:,} parameters on {launch.device}, {processes}{shared}"
    kind = getattr(model.transformer, "attention", None)
    attention = "of the trunk" if kind is None else choose_attention(kind, launch.device.type, True)
    yield f"precision: {launch.precision}; attention: {attention}; compiled: {config.compile}"
    values = ((spec.name, getattr(config, spec.name), spec.default) for spec in fields(TrainConfig))
    yield "config: " + ", ".join(f"{name}={value}" for name, value, default in values if value != default)


def open_log(folder: Path, config: TrainConfig, *, resumed_step: int, is_main: bool) -> "RunLog":
    """The log of a run in its folder, with the tracker that it asks for; of a process that is not main, one that writes
    nothing.
    """
    if not is_main:
        return RunLog(None, None)
    metrics, tracker = MetricsFile(folder / "metrics.csv", resumed_step=resumed_step), None
    if config.tracker != "none":
        name, options = folder.resolve().name, config.as_dict()
        tracker = create_tracker(config.tracker, project=config.project, run=name, folder=folder, config=options)
    return RunLog(metrics, tracker)


class RunLog:
    """Figures to `metrics.csv`, a row for each step that has any, and to a tracker, where there are these."""

    def __init__(self, metrics: MetricsFile | None, tracker: Tracker | None) -> None:
        self.metrics, self.tracker = metrics, tracker
        self._step, self._row = 0, dict[str, float]()

    def write(self, step: int, figures: Mapping[str, float], *, prefix: str = "") -> None:
        named = {prefix + name: value for name, value in figures.items()}
        self._step = step
        self._row |= named
        self.track(step, named)

    def track(self, step: int, values: Mapping[str, Any]) -> None:
        if self.tracker is not None and values:
            self.tracker.log(values, step)

    def flush(self) -> None:
        """Writes the row of a step, before its checkpoint."""
        row, self._row = self._row, {}
        if self.metrics is not None and row:
            self.metrics.append(self._step, row)

    def close(self) -> None:
        self.flush()
        if self.tracker is not None:
            self.tracker.finish()
