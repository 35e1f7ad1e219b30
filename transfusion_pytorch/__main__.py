"""`python -m transfusion_pytorch sample ...`."""

import argparse
from collections.abc import Sequence

from transfusion_pytorch.commands import sample
from transfusion_pytorch.commands.errors import run_command


def main(given: Sequence[str] | None = None) -> None:
    """Runs the command of these arguments, or of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m transfusion_pytorch", description="One transformer that writes and draws."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sampling = commands.add_parser("sample", help="draw from captions, caption images", description=sample.__doc__)
    sample.add_arguments(sampling)
    sampling.set_defaults(run=sample.run)
    arguments = parser.parse_args(given)
    run_command(lambda: arguments.run(arguments))


if __name__ == "__main__":
    main()
