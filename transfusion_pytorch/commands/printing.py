"""What a model has written, on a terminal."""

from transfusion_pytorch.display.lines import CONTROL_CHARACTERS


def without_controls(text: str) -> str:
    """Text that a terminal shows and does not obey: control characters but tabs and line ends become U+FFFD."""
    return CONTROL_CHARACTERS.sub("\ufffd", text)
