"""Prompts: parsed, without their markers, and with what they open at their end."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from transfusion_pytorch.sequence.samples import (
    Modality,
    Piece,
    Sample,
    Text,
    as_ids,
    check_ids,
    find_openings,
    parse_part,
    parts_of,
    strip_markers,
)
from transfusion_pytorch.sequence.vocabulary import Vocabulary


class Prompt(NamedTuple):
    """A prompt in two parts.

    - `pieces`: its text and modalities, without markers
    - `opening`: the ids at its end that open a modality, empty if there are none. One of `meta`, `meta 4,`,
      `meta 4,4 som`, and without a shape `meta som` or `som`; the shape is not checked
    - `is_complete`: it ended with eos
    """

    pieces: list[Piece]
    opening: list[int]
    is_complete: bool = False


def parse_prompt(prompt: Any, vocabulary: Vocabulary, where: str) -> list[Piece]:
    """The parts of a prompt, markers included. None stands for nothing: None, `[]` and `[None]` have no parts, and of
    `[None, ids]` only the ids are left. Of a `Sample` its parts are the prompt.

    Tensors are copied: a request may wait, and its caller may use their memory again. Raises `TypeError` or
    `ValueError` that names the part at fault.
    """
    prompt = prompt.parts if isinstance(prompt, Sample) else prompt
    pieces = []
    for i, part in enumerate(parts_of(prompt)):
        if part is not None:
            piece = parse_part(part, vocabulary.num_modalities, f"{where}, part {i}")
            if isinstance(piece, Text):
                check_ids(piece.ids, vocabulary.num_logits, f"{where}, part {i}")
            pieces.append(_copied(piece))
    return pieces


def _copied(piece: Piece) -> Piece:
    if isinstance(piece, Text):
        return Text(piece.ids.clone())
    return piece._replace(tensor=piece.tensor.detach().clone())


def split_unfinished_modality(pieces: Sequence[Piece], vocabulary: Vocabulary, where: str) -> Prompt:
    """Removes markers, and splits off those at the end that open a modality.

    The markers of a returned sample may be there or not: around modalities they are placed anew. An opening that
    anything else follows is dropped (see `strip_markers`), so a sample that was cut off in one can be continued by the
    next turn of a conversation. Raises `ValueError` where any other marker is left: a closing behind no modality, or
    characters of a shape without `meta`.
    """
    bare = strip_markers(pieces, vocabulary)
    opening: list[int] = []
    if bare and isinstance(last := bare[-1], Text):
        ids = last.ids.tolist()
        # the only one that `strip_markers` leaves
        start = next((found.start for found in find_openings(ids, vocabulary)), len(ids))
        opening = ids[start:]
        bare[-1:] = [last._replace(ids=as_ids(ids[:start]))] if start else []
    for i, piece in enumerate(bare):
        if isinstance(piece, Text):
            begins = not i and _begins_with_sos(piece, vocabulary)
            if (piece.ids[int(begins) :] >= vocabulary.num_text).any():
                raise ValueError(
                    f"{where}: markers of a modality stand where there is none, in the text {piece.ids.tolist()}; "
                    "leave markers out, or give them as a returned sample has them"
                )
    is_complete = bool(pieces) and isinstance(last := pieces[-1], Text) and last.ids[-1:].tolist() == [vocabulary.eos]
    return Prompt(bare, opening, is_complete)


def _begins_with_sos(piece: Text, vocabulary: Vocabulary) -> bool:
    """Whether it is the text of a language model that began from nothing."""
    return not vocabulary.is_framed and int(piece.ids[0]) == vocabulary.sos


def without_text(pieces: Sequence[Piece], vocabulary: Vocabulary) -> list[Piece]:
    """The unconditional version for guidance: text becomes null, markers and modalities stay."""
    return [
        piece
        if isinstance(piece, Modality)
        else Text(torch.where(piece.ids < vocabulary.num_text, vocabulary.null, piece.ids))
        for piece in pieces
    ]
