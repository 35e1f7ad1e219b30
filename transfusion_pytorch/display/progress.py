"""A progress bar for many samples at once, in a terminal or a notebook."""

import warnings
from types import TracebackType
from typing import Any


def load_tqdm() -> Any:
    """The tqdm class that suits where we are: widgets in a notebook that has them, else text.

    Raises `ImportError` with the extra to install where tqdm is missing.
    """
    try:
        from tqdm import TqdmWarning
    except ModuleNotFoundError as error:
        raise ImportError(
            'progress bars need tqdm, which is not installed: pip install "transfusion-pytorch[notebook]"'
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmWarning)  # a notebook without ipywidgets gets bars of text
        from tqdm.auto import tqdm
    return tqdm


class SampleProgress:
    """A bar of finished samples, with the tokens written and the drawing steps made so far.

    >>> with SampleProgress(total=100, show=True) as progress:
    ...     progress.update(finished=3, tokens=120, steps=48)

    With `show=False` it is silent and needs no tqdm. Leaving the `with` closes the bar, on an error too.
    """

    def __init__(self, total: int, *, show: bool = True) -> None:
        # miniters=0: tokens and steps are shown as they come, also while no sample is finished
        self.bar = load_tqdm()(total=total, unit="sample", dynamic_ncols=True, miniters=0) if show else None

    def __enter__(self) -> "SampleProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def update(self, *, finished: int, tokens: int, steps: int) -> None:
        """Takes counts since the start, not what came on top. Cheap: it draws ten times a second at most."""
        if self.bar is None:
            return
        self.bar.set_postfix({"tokens": tokens, "steps": steps}, refresh=False)
        self.bar.update(finished - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
