"""How fast this library generates, beside the PyPI package and beside the matrix products alone.

    python benchmarks/generation.py --peer PEER/bin/python --rounds 5
    python benchmarks/generation.py --workloads text draw-1 --quick
    python benchmarks/generation.py --profile text

Workloads (see `generation_jobs` and `mixed`): `text`, `draw-1`, `draw-16`, `mixed-64`; and two studies of this library
alone, `growth` (cost per token as the cache grows) and `leak` (resident memory over 1,000 requests). Writes
`results/generation.md` and `.json`.
"""

from pathlib import Path

from command import parser, print_profile, run_workload, settings_of
from growth import growth_lines, plot_growth
from harness import ROOT, in_fresh_worker, pythons_of
from leak import leak_lines
from report import Targets, environment, save, write_page

TARGETS = {
    "text": Targets(peer=5.0, limit=1.5),
    "draw-1": Targets(peer=3.5, limit=1.4),
    "draw-16": Targets(peer=3.0, limit=1.5),
    "mixed-64": Targets(peer=3.0, limit=1.6),
}
BF16 = {"draw-16": Targets(peer=5.0)}
STUDIES = {"growth": growth_lines, "leak": leak_lines}


def main() -> None:
    parse = parser("Generation: ours, the peer, and the limit.", list(TARGETS), list(STUDIES))
    parse.add_argument("--plots", type=Path, help="folder of plots (default: docs/images, or the results if --quick)")
    args = parse.parse_args()
    settings = settings_of(args)
    if args.profile:
        return print_profile(args, settings)
    title = "Generation" + (" (quick: sizes without meaning)" if args.quick else "")
    for name in args.workloads:
        rows, extra = [], {}
        if name in STUDIES:
            study = in_fresh_worker("ours", pythons_of(None)["ours"], settings, ("measure", dict(what=name)))
            failed = "error" in study
            lines = [study["error"]] if failed else STUDIES[name](study)
            extra[name] = study | {"lines": lines, "environment": environment(args.threads)}
            print("\n".join([name, *lines]))
            if name == "growth" and not failed:
                plot_growth(study, args.plots or (args.out if args.quick else ROOT / "docs" / "images"))
        else:
            rows.append(run_workload(name, args, settings, TARGETS[name]))
            if args.bf16 and name in BF16:
                rows.append(run_workload(name, args, settings, BF16[name], bf16=True))
        table = save(args.out, "generation", title, rows, extra, order=list(TARGETS))
    if not args.quick:
        write_page(args.out)
    print(table.read_text())


if __name__ == "__main__":
    main()
