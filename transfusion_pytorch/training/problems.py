"""What goes wrong in a run without ending it: samples and steps that are left out."""

from collections import Counter
from collections.abc import Sequence

from transfusion_pytorch.data.loading import Skipped
from transfusion_pytorch.sequence.batch import Batch
from transfusion_pytorch.training.launch import Launch
from transfusion_pytorch.training.metrics import describe_bad_batch
from transfusion_pytorch.training.reporting import ProgressReporter
from transfusion_pytorch.training.step import StepResult

REPEATED = 10  # problems of a kind are reported so often, then counted
MOST_LEFT_OUT = 50  # steps in a row, after which a run is not worth going on with


class TrainingError(RuntimeError):
    """A run that stops because a step came out wrong, with the names of the samples in it."""


class Problems:
    """Reports them, and stops the run where it is to be stopped. All processes must call both methods alike."""

    def __init__(self, launch: Launch, progress: ProgressReporter, *, stops: bool) -> None:
        self.launch, self.progress, self.stops = launch, progress, stops
        self._reported: Counter[str] = Counter()
        self._steps_left_out = 0  # in a row

    def report_skipped(self, skipped: Sequence[Skipped]) -> None:
        """Samples that this process has left out."""
        for reference, reason in (entry for entries in self.launch.gather(list(skipped)) for entry in entries):
            self._report("left out", f"{reference.source}[{reference.index}]: {reason}")

    def check(self, step: int, result: StepResult | None, batches: Sequence[Batch]) -> None:
        """Reports a step that was not made; `result` is None where every sample of it was left out.

        Raises `TrainingError` if such steps are to stop the run, or if there were too many in a row.
        """
        if result is not None and result.is_made:
            self._steps_left_out = 0
            return
        self._steps_left_out += 1
        message = f"step {step}: {self._describe(result, batches)}"
        if self.stops and result is not None and result.problem is not None:
            raise TrainingError(f"{message}; set on_bad_step='skip' to leave such steps out")
        if self._steps_left_out >= MOST_LEFT_OUT:
            raise TrainingError(
                f"{message}; {self._steps_left_out} steps in a row were left out, nothing is trained now"
            )
        if result is None or not result.overflowed:
            self._report("step left out", message)

    def _describe(self, result: StepResult | None, batches: Sequence[Batch]) -> str:
        if result is None:
            return "every sample of it was left out"
        if result.problem is None:
            return "float16 overflowed"
        found = self.launch.gather([describe_bad_batch(batch) for batch in batches])
        samples = "; ".join(text for texts in found for text in texts)
        losses = ", ".join(f"{name} {value.item():.4g}" for name, value in result.losses.items())
        return "; ".join(part for part in (result.problem, f"losses: {losses}", samples) if part)

    def _report(self, kind: str, message: str) -> None:
        self._reported[kind] += 1
        if self._reported[kind] <= REPEATED:
            self.progress.write(f"{kind}: {message}")
        if self._reported[kind] == REPEATED:
            self.progress.write(f"{kind}: more of these are counted, and no longer told")
