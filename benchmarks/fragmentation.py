"""Decode steps of rows that lie apart in the cache beside those of neighbours: `python benchmarks/fragmentation.py`.

Eight requests of about 500 tokens write text, in three engines that take turns step by step:

- `neighbours`: a ninth has just ended, whose row was the last one
- `ended`: of 24, two of three have just ended; the cache closes the gaps
- `apart`: of 24, two of three keep their rows and write nothing; the cache exchanges rows so that the eight are next to
  each other

`first` is the step in which that happens: rows move, and the state of the decode steps is made anew. `later` are the
steps behind it. Figures are medians, and ratios those of medians. Writes `results/fragmentation.md` and `.json`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from jobs import Library
from report import save_table

ROWS, WIDTH, LENGTH = 8, dict(dim=512, depth=8, heads=8, dim_head=64), 440
QUICK_WIDTH, QUICK_LENGTH = dict(dim=64, depth=2, heads=2, dim_head=32), 20
BEFORE, UNTIMED, STEPS = 2, 20, 40  # steps; an engine reorders its weights in one of the untimed ones
TARGET = 1.1


def engine_of(model: Any, count: int, length: int) -> Any:
    """An engine in which so many requests write text."""
    engine = model.create_engine()
    for seed in range(count):
        prompt = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed))
        engine.submit(prompt, max_length=length + 100, text_temperature=0.0, allowed_modalities=[])
    for _ in range(BEFORE):
        engine.step()
    return engine


def neighbours(model: Any, length: int) -> Any:
    engine = engine_of(model, ROWS + 1, length)
    end(engine, [max(engine.scheduler.active, key=place)])
    return engine


def ended(model: Any, length: int) -> Any:
    engine = engine_of(model, 3 * ROWS, length)
    end(engine, others_of(engine))
    return engine


def apart(model: Any, length: int) -> Any:
    engine = engine_of(model, 3 * ROWS, length)
    others = others_of(engine)
    engine.scheduler.active = [it for it in engine.scheduler.active if it not in others]
    return engine


def place(request: Any) -> int:
    return request.branch.row.index


def others_of(engine: Any) -> list[Any]:
    """All but every third row."""
    return [it for it in engine.scheduler.active if place(it) % 3]


def end(engine: Any, requests: list[Any]) -> None:
    """With the next step."""
    for request in requests:
        request.is_cancelled = True


STATES: dict[str, Callable[[Any, int], Any]] = {"neighbours": neighbours, "ended": ended, "apart": apart}


def milliseconds(engine: Any) -> float:
    start = time.perf_counter()
    engine.step()
    return 1000 * (time.perf_counter() - start)


def check(engine: Any, where: str) -> None:
    rows = sorted(map(place, engine.scheduler.active))
    if rows != list(range(ROWS)):
        raise RuntimeError(f"{where}: the requests that write have the rows {rows}")


def measure(model: Any, length: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a step in every state."""
    first: dict[str, list[float]] = {name: [] for name in STATES}
    later: dict[str, list[float]] = {name: [] for name in STATES}
    names = list(STATES)
    for number in range(rounds):
        engines = {name: state(model, length) for name, state in STATES.items()}
        rows = sorted(map(place, engines["apart"].scheduler.active))
        if rows != list(range(0, 3 * ROWS, 3)):
            raise RuntimeError(f"the rows that are to lie apart are {rows}")
        turn = names[number % len(names) :] + names[: number % len(names)]
        for name in turn:
            first[name].append(milliseconds(engines[name]))
            check(engines[name], name)
        for step in range(UNTIMED + STEPS):
            for name in turn[step % len(turn) :] + turn[: step % len(turn)]:
                taken = milliseconds(engines[name])
                if step >= UNTIMED:
                    later[name].append(taken)
        for name, engine in engines.items():
            check(engine, name)
    return {name: dict(first=statistics.median(first[name]), later=statistics.median(later[name])) for name in STATES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times that every state is made (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: does it run at all?")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    width, length = (QUICK_WIDTH, QUICK_LENGTH) if args.quick else (WIDTH, LENGTH)
    model = Library("ours").build(num_text=256, transformer=width, latents=(4,), shapes=((2, 2),)).eval()
    with torch.no_grad():
        model.to_logits.weight[model.eos_id] = 0  # never the likeliest: nobody ends
    figures = measure(model, length, 1 if args.quick else args.rounds)
    base = figures["neighbours"]
    said = f"Milliseconds of a decode step of {ROWS} rows. A ratio of `later` is to be at most {TARGET}."
    lines = [
        "# Rows that lie apart",
        "",
        said,
        "",
        "| state | first | later | first / neighbours | later / neighbours |",
        "|---|---|---|---|---|",
    ]
    for name, each in figures.items():
        each |= {f"{kind} ratio": each[kind] / base[kind] for kind in ("first", "later")}
        ratios = " | ".join(f"{each[f'{kind} ratio']:.2f}" for kind in ("first", "later"))
        lines.append(f"| {name} | {each['first']:.1f} | {each['later']:.1f} | {ratios} |")
    print(save_table("fragmentation", lines, dict(states=figures), threads=args.threads, quick=args.quick))


if __name__ == "__main__":
    main()
