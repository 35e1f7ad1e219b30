"""CUDA graphs on a machine without CUDA: what is captured is recorded operation by operation, and replayed into the
same memory.

Like the real ones: Python runs once, a capture leaves memory as it was, results lie where the first replay writes them,
and whatever reads a number from the device raises.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "unique")


class RecordedGraph:
    """Stands in for `torch.cuda.CUDAGraph`."""

    replays = 0  # of all graphs

    def __init__(self):
        self.operations = []

    def replay(self) -> None:
        RecordedGraph.replays += 1
        for operation, arguments, options, results in self.operations:
            again = tensors(operation(*arguments, **options))
            for result, new in zip(tensors(results), again, strict=True):
                if not shares_memory(result, (arguments, options)):
                    result.copy_(new)


class RecordedCapture(TorchDispatchMode):
    """Stands in for `torch.cuda.graph`."""

    def __init__(self, graph: RecordedGraph, *, capture_error_mode: str):
        super().__init__()
        assert capture_error_mode == "thread_local"
        self.graph, self.overwritten = graph, []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        options = options or {}
        if operation.overloadpacket.__name__ in READS:
            raise RuntimeError(f"{operation} is not permitted when stream is capturing")
        if operation._schema.is_mutable:
            self.overwritten += [(tensor, tensor.clone()) for tensor in tensors((arguments, options))]
        results = operation(*arguments, **options)
        self.graph.operations.append((operation, arguments, options, results))
        return results

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, before in reversed(self.overwritten):
            tensor.copy_(before)


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def shares_memory(tensor: torch.Tensor, arguments) -> bool:
    return any(tensor.untyped_storage().data_ptr() == each.untyped_storage().data_ptr() for each in tensors(arguments))
