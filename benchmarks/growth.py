"""What a token costs as the cache grows, with attention and without.

The cost at a length is the time from the first use of the logit layer to the last, as a prompt of about that length is
continued by some ids, divided by their number: reading the prompt comes before. Attention's own part is the kernels
that these steps call, on operands of the same shapes and strides, and nothing else: it must grow with the cache. The
rest should not.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from jobs import Library
from products import Recorder, attention_of, replay

LENGTHS = (64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)
TOKENS = 32
BATCH = 4


def decode_growth(package: str, *, quick: bool, rounds: int = 5) -> dict[str, Any]:
    """Milliseconds per step (of 4 rows), all and attention alone, as the cache comes to each length.

    The steps end at the length, so that a cache that doubles at powers of two is not doubled among them.
    """
    width = dict(dim=64, depth=2, heads=2, dim_head=32) if quick else dict(dim=256, depth=4, heads=4, dim_head=64)
    lengths = (32, 64) if quick else LENGTHS
    tokens, rounds = (8, 2) if quick else (TOKENS, rounds)
    library = Library(package)
    model = library.build(num_text=256, transformer=width).eval()
    prompts = {length: torch.randint(0, 256, (BATCH, length - tokens - 1)) for length in lengths}
    steps = {length: attention_of(new_calls(model, prompt, tokens)) for length, prompt in prompts.items()}
    every: dict[int, list[float]] = {length: [] for length in lengths}
    attention: dict[int, list[float]] = {length: [] for length in lengths}
    for _ in range(rounds):
        for length, prompt in prompts.items():
            every[length].append(1000 * seconds(library, model, prompt, tokens) / tokens)
            attention[length].append(1000 * replay(steps[length]) / tokens)
    return {
        "lengths": list(lengths),
        "all": [statistics.median(every[length]) for length in lengths],
        "attention": [statistics.median(attention[length]) for length in lengths],
    }


def new_calls(model: Any, prompt: torch.Tensor, tokens: int) -> list[Any]:
    """What the steps after the first call: the first reads the prompt."""
    calls = []
    for number in (1, 1 + tokens):
        with Recorder() as recorder:
            model.generate_text_only(prompt, prompt.shape[1] + number)
        calls.append(recorder.calls)
    return calls[1][len(calls[0]) :]


def seconds(library: Library, model: Any, prompt: torch.Tensor, tokens: int) -> float:
    """Of `tokens` steps after the one that reads the prompt."""
    stamps: list[float] = []
    hook = library.logit_layer(model).register_forward_pre_hook(lambda *_: stamps.append(time.perf_counter()))
    model.generate_text_only(prompt, prompt.shape[1] + tokens + 1)
    hook.remove()
    if len(stamps) != tokens + 1:
        raise RuntimeError(f"the logit layer was used {len(stamps)} times for {tokens + 1} ids")
    return stamps[-1] - stamps[0]


def growth_lines(study: dict[str, Any]) -> list[str]:
    """The study as a table."""
    lines = [
        f"Cached decoding of {BATCH} rows, dim 256, depth 4, ms per step. Attention is its kernels alone.",
        "",
        "| length | all | attention | without attention |",
        "|---|---|---|---|",
    ]
    for length, every, attention in zip(study["lengths"], study["all"], study["attention"], strict=True):
        lines.append(f"| {length:,} | {every:.2f} | {attention:.2f} | {every - attention:.2f} |")
    rest = [a - b for a, b in zip(study["all"], study["attention"], strict=True)]
    lines += ["", f"From the shortest to the longest, all but attention costs {rest[-1] / rest[0]:.2f} times as much."]
    return lines


def plot_growth(study: dict[str, Any], folder: Path) -> Path:
    """Draws `decode-growth.png`. Returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    rest = [a - b for a, b in zip(study["all"], study["attention"], strict=True)]
    for label, values in (("all", study["all"]), ("attention alone", study["attention"]), ("all but attention", rest)):
        axes.plot(study["lengths"], values, marker="o", label=label)
    axes.set(xlabel="tokens in the cache", ylabel="ms per step of 4 rows", ylim=(0, None))
    axes.legend(frameon=False)
    path = folder / "decode-growth.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
