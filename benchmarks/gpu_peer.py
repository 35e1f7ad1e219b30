"""The PyPI package on the mixed batches of the GPU benchmark. Run by the interpreter of an environment that has it.

`python gpu_peer.py '{"size": "135M", "quick": false, "steps": 5}'` prints one line of JSON. Knows nothing of our
package, which has the same import name. Takes the largest batches that fit into the memory.
"""

import gc
import json
import statistics
import sys
import time
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

import torch
from gpu_device import intervals, mark, num_parameters, synchronize
from gpu_workloads import QUICK_SMALL, SMALL, Size, mixed_samples

TOKEN_BUDGETS = (16_384, 8_192, 4_096, 2_048)
ROWS, PROMPT = (1, 8, 64), 130
OWN_OPTIONS = ("kv_heads",)  # of ours: the peer has as many keys and values as queries


def main() -> None:
    options = json.loads(sys.argv[1])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = QUICK_SMALL if options["quick"] else SMALL
    budgets = (size.token_budget,) if options["quick"] else TOKEN_BUDGETS
    tried, answer = [], None
    for dtype in (torch.bfloat16, None):
        for budget in budgets:
            try:
                answer = train(size.with_budget(budget), device, dtype, options["steps"])
            except Exception as error:
                tried.append(f"{budget} tokens, {dtype or 'fp32'}: {type(error).__name__}: {str(error)[:120]}")
            if answer is not None:
                break
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if answer is not None:
            break
    decoded = [decode(size, device, rows, quick=options["quick"]) for rows in ((1, 2) if options["quick"] else ROWS)]
    print(json.dumps((answer or {}) | dict(tried=tried, decoding=decoded)), flush=True)


def build(size: Size, device: torch.device) -> Any:
    from transfusion_pytorch import Transfusion

    torch.manual_seed(0)
    transformer = {name: value for name, value in size.transformer.items() if name not in OWN_OPTIONS}
    return Transfusion(**size.model_arguments, transformer=transformer, add_pos_emb=True).to(device)


@torch.no_grad()
def decode(size: Size, device: torch.device, rows: int, *, quick: bool) -> dict[str, Any]:
    """Text tokens/s with its cache, in bf16 autocast or, where that fails, in fp32."""
    tokens, model = 4 if quick else 48, build(size, device).eval()
    prompt = torch.randint(0, size.vocabulary, (rows, PROMPT), device=device)
    row: dict[str, Any] = dict(rows=rows)
    for dtype in (torch.bfloat16, None):
        try:
            with nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype):
                for _ in range(2):
                    synchronize(device)
                    start = time.monotonic()
                    model.generate_text_only(prompt, PROMPT + tokens, cache_kv=True)
                    synchronize(device)
                    seconds = time.monotonic() - start
        except Exception as error:
            row["failure"] = f"{type(error).__name__}: {str(error)[:120]}"
            continue
        return row | {"tokens/s": rows * tokens / seconds, "precision": "fp32" if dtype is None else "bf16 autocast"}
    return row


def train(size: Size, device: torch.device, dtype: torch.dtype | None, steps: int) -> dict[str, Any]:
    """Steps of forward (in autocast if there is a `dtype`), backward and fused AdamW, as ours are timed."""
    model = build(size, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(3)
    marks, seconds = [], time.monotonic()
    for i in range(steps + 2):
        samples = mixed_samples(size, generator)
        batch = [[part.to(device) for part in sample.parts] for sample in samples]
        if i >= 2:
            marks.append(mark(device))
        with nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype):
            loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if i >= 2:
            marks.append(mark(device))
    synchronize(device)
    if not loss.isfinite():
        raise RuntimeError(f"the loss is not finite: {loss.item()}")
    return dict(
        tokens=size.token_budget,
        milliseconds=statistics.median(intervals(marks)[::2]),
        precision="fp32" if dtype is None else "bf16 autocast",
        parameters=num_parameters(model),
        version=version("transfusion-pytorch"),
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        seconds=time.monotonic() - seconds,
    )


if __name__ == "__main__":
    main()
