"""CUDA graphs of decode steps: a step is hundreds of small kernels, which the host cannot launch as fast as a GPU runs
them. A graph launches all of them at once.

CUDA only; elsewhere, and wherever a graph cannot be captured, the step runs as it is.
"""

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from transfusion_pytorch.network.shortcuts import is_hooked

STEPS_BEFORE_CAPTURE = 8  # capturing takes as long as a few steps, and a batch that changes at once is not worth it


class StepGraphs:
    """Makes the `StepGraph`s of an engine. After a capture that failed it makes no more: what cannot be captured once
    cannot be captured later, and a warning has said so.
    """

    def __init__(self, model: Any):
        self.model, self.device = model, model.device
        self.is_used = self.device.type == "cuda"

    def may_capture(self) -> bool:
        """Whether only the device notices that a step is replayed: hooks would be called once and never again."""
        return self.is_used and not is_hooked(self.model)

    def give_up(self, error: Exception) -> None:
        self.is_used = False
        with suppress(UserWarning):  # which is an error where warnings are, and would end the step in its middle
            warnings.warn(
                f"a decode step could not be captured in a CUDA graph; decoding goes on without, more slowly: {error}",
                stacklevel=2,
            )


class StepGraph:
    """One step of fixed shape, run again and again: as it is at first, then captured, then replayed.

    The step reads and changes tensors that stay where they are, and nothing else. Its results lie in memory of the
    graph: the next replay overwrites them. Memory of a graph is free once the graph is dropped.
    """

    def __init__(self, graphs: StepGraphs):
        self._graphs, self._num_steps = graphs, 0
        self._graph: Any = None
        self._results: Any = None

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    def run(self, step: Callable[[], Any]) -> Any:
        """The results of one step. `step` is the same function each time."""
        if self._graph is None and self._num_steps >= STEPS_BEFORE_CAPTURE and self._graphs.may_capture():
            self._capture(step)
        self._num_steps += 1
        if self._graph is None:
            return step()
        self._graph.replay()
        return self._results

    def _capture(self, step: Callable[[], Any]) -> None:
        """Records the kernels of a step, which does not run them: a capture that fails has changed nothing."""
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads (training, data loading) may go on using CUDA in the meantime
            with torch.cuda.device(self._graphs.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._results = step()
        except Exception as error:
            self._results = None
            self._graphs.give_up(error)
            return
        self._graph = graph
