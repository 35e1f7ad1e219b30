"""Plans: the parts of a sample that are to come, as users write them and parsed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from transfusion_pytorch.sequence.checks import check_int, check_shape, check_type
from transfusion_pytorch.sequence.samples import Modality, Shape, is_sequence


class TextPart(NamedTuple):
    """Text, of at most `most` ids."""

    most: int | None = None


class ModalityPart(NamedTuple):
    """A modality of this shape."""

    type: int
    shape: Shape


Part = TextPart | ModalityPart
ShapeOf = Callable[[int, Shape | None, str], Shape]


@dataclass(frozen=True)
class Plan:
    """The `parts` to come, in order. After them the model continues if `free`, else the sample ends. `name` is the
    option that this was made of.
    """

    parts: tuple[Part, ...] = ()
    free: bool = True
    name: str = "plan"


def parse_plan(plan: Any, num_modalities: int, shape_of: ShapeOf, *, first: Modality | None = None) -> Plan:
    """Parses a user's `plan`. `shape_of` completes or refuses the shape of a modality; a bare type in the first place
    gets the shape of `first`, the `init_modality`.
    """
    if not isinstance(plan, (list, tuple)) or not plan:
        raise TypeError(f"plan must be a list of parts, such as ['text', (0, (4, 4)), 'text'], got {plan!r}")
    given = [_with_shape(plan[0], first), *plan[1:]]
    parts = tuple(_parse_part(part, f"plan, part {i}", num_modalities, shape_of) for i, part in enumerate(given))
    for part, following in pairwise(parts):
        if isinstance(part, TextPart) and isinstance(following, TextPart):
            raise ValueError(f"plan: two texts follow each other in {plan!r}; make them one")
    return Plan(parts, free=False)


def forced_plan(forced: Any, num_modalities: int, shape_of: ShapeOf, *, first: Modality | None = None) -> Plan:
    """`force_modality_at_start`: one modality, then anything."""
    name = "force_modality_at_start"
    given = _with_shape(forced, first)
    modality, shape = _type_and_shape(given, num_modalities, f"{name}, a type or (type, shape)")
    return Plan((ModalityPart(modality, shape_of(modality, shape, name)),), name=name)


def _with_shape(part: Any, first: Modality | None) -> Any:
    is_bare = isinstance(part, int) and not isinstance(part, bool)
    return (part, first.shape) if is_bare and first is not None and part == first.type else part


def _parse_part(part: Any, where: str, num_modalities: int, shape_of: ShapeOf) -> Part:
    if part == "text":
        return TextPart()
    if isinstance(part, (tuple, list)) and len(part) == 2 and isinstance(part[0], str):
        if part[0] != "text":
            raise ValueError(f"{where}: expected 'text', ('text', most), a type or (type, shape), got {part!r}")
        return TextPart(check_int(part[1], f"{where}: the most ids of a text"))
    if isinstance(part, str):
        raise ValueError(f"{where}: expected 'text', ('text', most), a type or (type, shape), got {part!r}")
    modality, shape = _type_and_shape(part, num_modalities, where)
    return ModalityPart(modality, shape_of(modality, shape, where))


def _type_and_shape(given: Any, num_modalities: int, where: str) -> tuple[int, Shape | None]:
    modality, shape = given if is_sequence(given) and len(given) == 2 else (given, None)
    modality = check_type(modality, num_modalities, where)
    if shape is None:
        return modality, None
    return modality, check_shape(shape, f"{where}: the shape")


def check_types(types: Any, num_modalities: int, name: str) -> frozenset[int]:
    """Several types of a model's modalities. Raises `TypeError` or `ValueError` for anything else."""
    if not isinstance(types, Sequence) or isinstance(types, str):
        raise TypeError(f"{name} must be a list of types, such as [0], got {types!r}")
    return frozenset(check_type(modality, num_modalities, name) for modality in types)
