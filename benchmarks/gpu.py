"""Everything that needs a GPU to be proved, in one go: `python benchmarks/gpu.py`, at most 8 minutes.

The most valuable first: versions, equal results by every path, no wait for the device, throughput of training with
traces and of decoding, the PyPI package. The page `results/gpu.md` is written again after every row. `--quick` shows
on a CPU, in tiny sizes, that everything runs.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # the package of this checkout, wherever this is called from

import torch  # noqa: E402
from gpu_checks import check_equality, check_waits  # noqa: E402
from gpu_decoding import check_sampling, decode  # noqa: E402
from gpu_device import Run  # noqa: E402
from gpu_page import Page  # noqa: E402
from gpu_training import train_large, train_small  # noqa: E402
from gpu_workloads import LARGE, QUICK_LARGE, QUICK_SMALL, SMALL, Size  # noqa: E402

from transfusion_pytorch.training.flops import peak_flops  # noqa: E402

PARTS = ("where", "equality", "sampling", "waits", "135M", "decoding 135M", "1B", "decoding 1B", "peer")
PEER_SECONDS = 100


def main() -> None:
    options = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.quick:
        raise SystemExit("no GPU is found; --quick runs everything in tiny sizes on the CPU")
    torch.manual_seed(0)
    folder = options.out or HERE / "results" / ("quick" if options.quick else "")
    deadline = time.monotonic() + 60 * options.minutes
    compiles = device.type == "cuda" or options.compile
    run = Run(device, Page(folder), deadline, options.quick, options.peer, compiles)
    small, large = (QUICK_SMALL, QUICK_LARGE) if options.quick else (SMALL, LARGE)
    results: dict[str, Any] = {}
    parts = {
        "where": lambda: where(run),
        "equality": lambda: check_equality(run),
        "sampling": lambda: check_sampling(run),
        "waits": lambda: check_waits(run),
        small.name: lambda: results.update({small.name: train_small(run, small)}),
        f"decoding {small.name}": lambda: results.update({f"decoding {small.name}": decode(run, small)}),
        large.name: lambda: results.update({large.name: train_large(run, large)}),
        f"decoding {large.name}": lambda: results.update({f"decoding {large.name}": decode(run, large)}),
        "peer": lambda: results.update(peer=compare_peer(run, small)),
    }
    for name in options.parts:
        _, failure = run.page.attempt(f"part {name}", parts[name])
        if failure:
            run.page.add(run.page.section("Parts that failed", "See the tracebacks."), part=name, failure=failure)
        write_targets(run, results)
    print(f"{run.page.folder / 'gpu.md'}", flush=True)


def arguments() -> argparse.Namespace:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parse.add_argument("--minutes", type=float, default=8.0, help="what would take longer is skipped (default: 8)")
    parse.add_argument("--peer", metavar="PYTHON", help="interpreter of an environment with the PyPI package 0.20.0")
    parse.add_argument("--quick", action="store_true", help="tiny sizes, on a CPU too: does it run at all?")
    parse.add_argument("--compile", action="store_true", help="on a CPU: compile all the same, which takes minutes")
    parse.add_argument("--out", type=Path, help="folder of the page (default: results, or results/quick)")
    return parse.parse_args()


def where(run: Run) -> None:
    """Versions, the device, and what it could compute at most."""
    section = run.page.section("Where", "No figure of a `--quick` run means anything." if run.quick else "")
    facts = dict(
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        commit=commit(),
        python=platform.python_version(),
        torch=torch.__version__,
        device="CPU",
        command=" ".join(["python benchmarks/gpu.py", *sys.argv[1:]]),
    )
    facts |= {name: package_version(name) for name in ("triton", "transfusion-pytorch")}
    if run.has_gpu:
        properties = torch.cuda.get_device_properties(run.device)
        peak = peak_flops(run.device)
        facts |= {
            "device": properties.name,
            "memory GiB": properties.total_memory / 2**30,
            "multiprocessors": properties.multi_processor_count,
            "CUDA": torch.version.cuda,
            "dense bf16 TFLOP/s assumed": "unknown device: no MFU" if peak is None else peak / 1e12,
        }
    for name, value in facts.items():
        run.page.add(section, what=name, value=value)


def package_version(name: str) -> str:
    try:
        return version(name)
    except Exception:
        return "not installed"


def commit() -> str:
    """The short hash; unknown where the checkout travelled without its history."""
    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"


def compare_peer(run: Run, size: Size) -> dict[str, Any] | None:
    """The PyPI package on mixed batches of the same kind, as large as fit."""
    section = run.page.section(
        "PyPI package",
        "Steps of `transfusion-pytorch` 0.20.0 of the same width, depth, heads and vocabulary on mixed batches of the "
        "same kind, as large as fit, as it is by default (not compiled). It has as many keys and values as queries and "
        "projections of its own, so the number of parameters differs.",
    )
    reason = "skipped: no --peer" if run.peer is None else run.lacks(PEER_SECONDS)
    if reason:
        run.page.add(section, note=reason)
        return None
    answer, failure = run.page.attempt("peer", lambda: ask_peer(run, size))
    answer = answer or dict(failure=failure)
    decoding = answer.pop("decoding", [])
    run.page.add(section, **answer | {"tried before": "; ".join(answer.pop("tried", [])) or None})
    compare_decoding(run, decoding)
    return dict(answer, decoding=decoding) if "tokens" in answer or decoding else None


def compare_decoding(run: Run, rows: list[dict[str, Any]]) -> None:
    section = run.page.section(
        "PyPI package, decoding",
        "`generate_text_only` of the same package and size with its cache, from 130 ids, prefill included, after one "
        "call to warm up.",
    )
    for row in rows:
        run.page.add(section, **row)


def ask_peer(run: Run, size: Size) -> dict[str, Any]:
    """What `gpu_peer.py` says of the PyPI package, in an environment without our path."""
    request = json.dumps(dict(quick=run.quick, steps=2 if run.quick else 5))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [run.peer, str(HERE / "gpu_peer.py"), request],
        capture_output=True,
        text=True,
        env=environment | dict(TQDM_DISABLE="1", LOGURU_LEVEL="ERROR"),
        timeout=max(run.left, PEER_SECONDS),
        check=False,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1])
    answer = json.loads(done.stdout.splitlines()[-1])
    if "milliseconds" in answer:
        answer["tokens/s"] = 1000 * answer["tokens"] / answer["milliseconds"]
    return answer


def write_targets(run: Run, results: dict[str, Any]) -> None:
    """What was wanted, and what came of it so far."""
    section = run.page.section(
        "Targets", "Mixed batches, compiled. The ratio to the PyPI package is one of tokens/s, each at its own batch."
    )
    rows = []
    for name, least in (("135M", 40), ("1B", 48)):
        model = results.get(name) or {}
        mixed, causal = model.get("compiled mixed", {}), model.get("compiled causal", {})
        checkpointed = model.get("compiled, selective checkpoints mixed", {})
        figures = [row["MFU %"] for row in (mixed, checkpointed) if row.get("MFU %") is not None]
        rows.append(dict(target=f"MFU % of {name}", wanted=f">= {least}", found=max(figures, default=None)))
        found = mixed["ms"] / causal["ms"] if mixed and causal else None
        rows.append(dict(target=f"{name}: time of mixed / causal", wanted="<= 1.10", found=found))
    ours, peer = (results.get("135M") or {}).get("compiled mixed"), results.get("peer")
    found = ours["tokens/s"] / peer["tokens/s"] if ours and peer and "tokens/s" in peer else None
    rows.append(dict(target="135M: tokens/s of ours / PyPI package", wanted=">= 5", found=found))
    rows += decoding_targets(results)
    section.rows[:] = rows
    run.page.write()


def decoding_targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, least in (("135M", 30), ("1B", 60)):
        made = results.get(f"decoding {name}") or {}
        single = made.get("1 graph") or {}
        target = f"{name}: decoding at batch 1, % of reading the weights once a token"
        rows.append(dict(target=target, wanted=f">= {least}", found=single.get("% of limit")))
    made, peer = results.get("decoding 135M") or {}, (results.get("peer") or {}).get("decoding", [])
    ratios = [
        mine["tokens/s"] / row["tokens/s"]
        for row in peer
        if "tokens/s" in row and (mine := made.get(f"{row['rows']} graph") or made.get(f"{row['rows']} eager"))
    ]
    rows.append(
        dict(target="135M: decoding, ours / PyPI package (least)", wanted=">= 8", found=min(ratios, default=None))
    )
    return rows


if __name__ == "__main__":
    main()
