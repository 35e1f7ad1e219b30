"""Errors as whoever types a command should see them."""

import os
import re
import sys
from collections.abc import Callable

from transfusion_pytorch.data.loading import SampleError
from transfusion_pytorch.training.trainer import TrainingError

# What the library raises with a message for its user. Anything else is a fault of its own and shows where it came from.
FOR_USERS = (ValueError, OSError, ImportError, SampleError, TrainingError)
EXIT_CODE = 2  # that of argparse


def run_command(main: Callable[[], None]) -> None:
    """Runs a script or command. An error that its user can mend is one line, and the exit code is 2.

    With `TRACEBACK=1` in the environment it is a traceback, as any other error is.
    """
    try:
        main()
    except FOR_USERS as error:
        if os.environ.get("TRACEBACK", "0") != "0":
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(EXIT_CODE)


def one_line(error: BaseException) -> str:
    """What an error says, in one line: `FileNotFoundError` of the system as "photos.tar: No such file or directory"."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(_without_traceback(str(error)).split()) or type(error).__name__


def _without_traceback(message: str) -> str:
    """What an error of a data worker says, behind the traceback that torch puts into its message."""
    found = re.match(r"Caught (\w+) in .*\nOriginal Traceback", message)
    return re.split(rf"^(?:\w+\.)*{found[1]}: ", message, flags=re.MULTILINE)[-1] if found else message
