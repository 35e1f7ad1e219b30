"""`MMDiT` beside the PyPI package `mmdit` 0.3.0, and beside `diffusers`' SD3 transformer with the same weights.

    make bench-mmdit
    python benchmarks/mmdit_training.py --rounds 7 --threads 1

One step is a forward and a backward pass over a batch of 8: 64 and 32 tokens of width 256, 4 blocks with 4 heads of 64
channels, in single precision. Inputs want gradients too.

| side | what |
|---|---|
| `mmdit, 4 streams` | the peer as it is by default, with 4 residual streams |
| `mmdit, 1 stream` | the peer with 1 |
| `ours, as the peer` | `MMDiT` of the same sizes and parts: GELU, queries and keys neither normalised nor rotated |
| `ours, equal size` | `MMDiT` by default, SwiGLU of 8/3 times the width: as many products as the peer |
| `ours` | `MMDiT` by default: SwiGLU of 4 times the width, normalised and rotated queries and keys |
| `sd3 ...` | `diffusers.SD3Transformer2DModel` and `MMDiT.from_sd3` of it; `rms` norms, `dual` attention as well |
| `..., bf16` | under autocast to bfloat16 |

All sides are in one process and take turns, each round beginning with another one (`harness.interleave`). Figures are
medians; ratios are ratios of medians. A package that is not installed is left out.
"""

import argparse
import importlib
import json
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import HERE, Measured, interleave, say
from report import environment
from torch import Tensor, nn

from transfusion_pytorch import MMDiT

BATCH, IMAGE_TOKENS, TEXT_TOKENS, WIDTH, DEPTH, HEADS, DIM_HEAD = 8, 64, 32, 256, 4, 4, 64
AS_PEER: dict[str, Any] = dict(activation="gelu", attn_bias=False, qk_norm="none", rope_axes=0)
EQUAL_FF = 688 / 256  # 8/3, rounded up to a multiple of 16
CHANNELS, POOLED = 16, 64  # of latents, and of the pooled text of SD3
TARGETS = {
    ("mmdit, 4 streams", "ours, as the peer"): 3.0,
    ("mmdit, 1 stream", "ours, as the peer"): 1.1,
    ("sd3, diffusers", "sd3, ours"): 1.0,
    ("sd3 rms, diffusers", "sd3 rms, ours"): 1.0,
    ("sd3 dual, diffusers", "sd3 dual, ours"): 1.0,
}
OTHERS = [
    ("mmdit, 4 streams", "ours, equal size"),
    ("mmdit, 1 stream", "ours, equal size"),
    ("mmdit, 4 streams", "ours"),
    ("mmdit, 1 stream", "ours"),
    ("ours, as the peer", "ours, as the peer, bf16"),
]
SD3 = {
    "sd3": {},
    "sd3 rms": dict(qk_norm="rms_norm"),
    "sd3 dual": dict(qk_norm="rms_norm", dual_attention_layers=(0, 1, 2, 3)),
}


class Step:
    """A forward and a backward pass, timed."""

    clock: Callable[[], float] = staticmethod(time.perf_counter)

    def __init__(self, model: nn.Module, call: Callable[[], Any], inputs: list[Tensor], *, bf16: bool = False):
        self.model, self.call, self.inputs, self.bf16 = model, call, inputs, bf16

    def __call__(self) -> float:
        self.model.zero_grad(set_to_none=True)
        for x in self.inputs:
            x.grad = None
        start = self.clock()
        with torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext():
            outs = self.call()
        sum(out.square().mean() for out in outs).backward()  # type: ignore[union-attr]
        return self.clock() - start

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def awake(model: nn.Module) -> nn.Module:
    """Past the zeros that it starts with, which some kernels multiply faster."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


def tokens() -> list[Tensor]:
    return [torch.randn(BATCH, count, WIDTH, requires_grad=True) for count in (IMAGE_TOKENS, TEXT_TOKENS)]


def ours(*, bf16: bool = False, **options: Any) -> Step:
    sizes = dict(depth=DEPTH, dim_head=DIM_HEAD, heads=HEADS, dim_cond=WIDTH)
    model = awake(MMDiT(dim_modalities=(WIDTH, WIDTH), dim_outs=CHANNELS, **sizes, **options))  # type: ignore[arg-type]
    inputs, t = tokens(), torch.rand(BATCH)
    return Step(model, partial(model, inputs, t), inputs, bf16=bf16)


def peer(streams: int) -> Step:
    module = importlib.import_module("mmdit.mmdit_generalized_pytorch")
    sizes = dict(depth=DEPTH, dim_head=DIM_HEAD, heads=HEADS, dim_cond=WIDTH)
    model = awake(module.MMDiT(dim_modalities=(WIDTH, WIDTH), num_residual_streams=streams, **sizes))
    inputs, cond = tokens(), torch.randn(BATCH, WIDTH)
    return Step(model, partial(model, modality_tokens=tuple(inputs), time_cond=cond), inputs)


def sd3_pair(options: dict[str, Any]) -> tuple[Step, Step]:
    """diffusers' SD3 transformer and ours, with the same weights and inputs; heads are as wide as the model allows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = importlib.import_module("diffusers")
    side = int(IMAGE_TOKENS**0.5)
    reference = awake(
        diffusers.SD3Transformer2DModel(
            sample_size=2 * side,
            patch_size=2,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=DEPTH,
            attention_head_dim=DIM_HEAD,
            num_attention_heads=WIDTH // DIM_HEAD,
            joint_attention_dim=WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=POOLED,
            pos_embed_max_size=2 * side,
            **options,
        )
    )
    model = MMDiT.from_sd3(reference)
    latents = torch.randn(BATCH, CHANNELS, 2 * side, 2 * side, requires_grad=True)
    text = torch.randn(BATCH, TEXT_TOKENS, WIDTH, requires_grad=True)
    inputs = dict(hidden_states=latents, encoder_hidden_states=text)
    inputs |= dict(pooled_projections=torch.randn(BATCH, POOLED), timestep=torch.rand(BATCH) * 1000)
    torch.testing.assert_close(model(**inputs), reference(**inputs).sample, rtol=1e-4, atol=1e-5)
    theirs = partial(reference, **inputs, return_dict=False)
    return Step(reference, theirs, [latents, text]), Step(model, lambda: [model(**inputs)], [latents, text])


def sides() -> dict[str, Step]:
    """All sides whose packages are installed."""
    made = {
        "ours": ours(),
        "ours, equal size": ours(ff_mult=EQUAL_FF),
        "ours, as the peer": ours(**AS_PEER),
        "ours, as the peer, bf16": ours(**AS_PEER, bf16=True),
    }
    try:
        made |= {"mmdit, 4 streams": peer(4), "mmdit, 1 stream": peer(1)}
    except ModuleNotFoundError as error:
        say(f"without the package mmdit: {error}")
    try:
        for name, options in SD3.items():
            made[f"{name}, diffusers"], made[f"{name}, ours"] = sd3_pair(options)
    except ModuleNotFoundError as error:
        say(f"without diffusers: {error}")
    return made


def ratios(measured: dict[str, Measured]) -> dict[str, dict[str, float | None]]:
    """How many times as fast the second of each pair is as the first."""
    found = {}
    for slow, fast in [*TARGETS, *OTHERS]:
        if slow in measured and fast in measured and measured[slow].median and measured[fast].median:
            ratio = measured[slow].median / measured[fast].median  # type: ignore[operator]
            found[f"{slow} / {fast}"] = dict(ratio=ratio, target=TARGETS.get((slow, fast)))
    return found


def markdown(result: dict[str, Any]) -> str:
    where = result["environment"]
    lines = ["# Multimodal transformers", "", "| side | parameters | ms |", "|---|---|---|"]
    lines += [
        f"| {name} | {each['parameters']:,} | {1000 * each['median']:.1f} |" for name, each in result["sides"].items()
    ]
    lines += ["", "| ratio | times | target |", "|---|---|---|"]
    for name, each in result["ratios"].items():
        lines.append(f"| {name} | {each['ratio']:.2f} | {'' if each['target'] is None else each['target']} |")
    lines += [
        "",
        f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}, {where['commit']}, {where['date']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="runs of every side (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="seconds of the processor, not of the wall: on a machine that others use",
    )
    parser.add_argument("--sides", nargs="+", help="only sides whose names begin with one of these")
    parser.add_argument("--quick", action="store_true", help="one round, results in results/quick: does it run at all?")
    parser.add_argument("--profile", metavar="SIDE", help="only print where a side spends its time")
    parser.add_argument("--out", type=Path, help="folder of results (default: results, or results/quick)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.cpu_time:
        Step.clock = staticmethod(time.process_time)
    chosen = {name: step for name, step in sides().items() if not args.sides or name.startswith(tuple(args.sides))}
    if args.profile:
        print_profile(chosen[args.profile])
        return
    for step in chosen.values():
        step()
    measured = interleave(chosen, 1 if args.quick else args.rounds)
    result = dict(
        sides={name: each.as_dict() | dict(parameters=chosen[name].parameters) for name, each in measured.items()},
        ratios=ratios(measured),
        environment=environment(args.threads),
    )
    folder = args.out or HERE / "results" / ("quick" if args.quick else "")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mmdit.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "mmdit.md").write_text(markdown(result))
    print(markdown(result))


def print_profile(step: Step) -> None:
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(5):
            step()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40))


if __name__ == "__main__":
    main()
