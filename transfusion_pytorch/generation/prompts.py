"""A prompt made ready to be continued."""

from collections.abc import Sequence
from typing import Any

import torch

from transfusion_pytorch.sequence.samples import (
    Modality,
    Piece,
    Text,
    check_ids,
    parse_sample,
    split_opening,
    strip_markers,
)
from transfusion_pytorch.sequence.vocabulary import Vocabulary


def parse_prompt(prompt: Any, vocabulary: Vocabulary, where: str) -> list[Piece]:
    """The parts of a prompt as they came; none for None. Raises `TypeError` or `ValueError` that names the part at
    fault.
    """
    if prompt is None or (isinstance(prompt, list) and not prompt):
        return []
    pieces = parse_sample(prompt, vocabulary.num_modalities, where)
    for i, piece in enumerate(pieces):
        if isinstance(piece, Text):
            check_ids(piece.ids, vocabulary.num_logits, f"{where}, part {i}")
    return [_own(piece) for piece in pieces]


def _own(piece: Piece) -> Piece:
    """A copy: a request may wait, and whoever made it may use the memory again."""
    if isinstance(piece, Text):
        return Text(piece.ids.clone())
    return piece._replace(tensor=piece.tensor.detach().clone())


def bare_and_opened(pieces: Sequence[Piece], vocabulary: Vocabulary, where: str) -> tuple[list[Piece], list[int]]:
    """A bare sample to continue, and the ids of a modality that it opens at its end without giving it.

    A prompt may carry any markers that a returned sample has. Raises `ValueError` where one stands elsewhere.
    """
    bare, opened = split_opening(strip_markers(pieces, vocabulary), vocabulary)
    for piece in bare:
        if isinstance(piece, Text) and (piece.ids >= vocabulary.num_text).any():
            raise ValueError(
                f"{where}: markers of a modality stand where there is none, in the text {piece.ids.tolist()}"
            )
    return bare, opened


def without_text(pieces: Sequence[Piece], vocabulary: Vocabulary) -> list[Piece]:
    """What guidance compares with: text becomes null, structure and modalities stay."""
    return [
        piece
        if isinstance(piece, Modality)
        else Text(torch.where(piece.ids < vocabulary.num_text, vocabulary.null, piece.ids))
        for piece in pieces
    ]
