"""Checks of numbers, shapes and types that a user hands over."""

from collections.abc import Callable
from math import inf, isfinite
from numbers import Real
from typing import Any

from transfusion_pytorch.sequence.samples import MAX_AXES, Shape, is_int, is_sequence


def check_int(value: Any, name: str, *, least: int = 1) -> int:
    """A plain int. Raises `TypeError` or `ValueError` unless `value` is one and at least `least`."""
    if not is_int(value):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if int(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def check_number(
    value: Any, name: str, *, least: float | None = None, above: float | None = None, most: float | None = None
) -> float:
    """A plain float. Raises `TypeError` or `ValueError` unless `value` is a finite number within its bounds."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = inf
    if not isfinite(number):
        raise ValueError(f"{name} must be finite, got {value}")
    low = [f"at least {least}"] * (least is not None) + [f"above {above}"] * (above is not None)
    bounds = " and ".join(low + [f"at most {most}"] * (most is not None))
    is_low = (least is not None and number < least) or (above is not None and number <= above)
    if is_low or (most is not None and number > most):
        raise ValueError(f"{name} must be {bounds}, got {value}")
    return number


def check_bool(value: Any, name: str) -> None:
    """Raises `TypeError` for anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def check_probability(value: Any, name: str) -> float:
    """A plain float. Raises `TypeError` or `ValueError` unless `value` is a number from 0 to 1."""
    try:
        return check_number(value, name, least=0, most=1)
    except ValueError as error:
        raise ValueError(f"{name} is a probability, got {value}") from error


def check_shape(shape: Any, name: str) -> Shape:
    """A shape as a tuple of ints. Raises `ValueError` unless all of them are positive."""
    is_shape = is_sequence(shape) and all(map(is_int, shape))
    if not is_shape or len(shape) > MAX_AXES or any(int(size) < 1 for size in shape):
        raise ValueError(f"{name} must be a tuple of 0 to {MAX_AXES} positive ints, such as (4, 4), got {shape!r}")
    return tuple(map(int, shape))


def check_type(modality: Any, num_modalities: int, name: str) -> int:
    """The type of one of a model's modalities. Raises `TypeError` or `ValueError` for anything else."""
    if not is_int(modality):
        raise TypeError(f"{name}: a modality type is an int, got {modality!r}")
    if not 0 <= int(modality) < num_modalities:
        raise ValueError(f"{name}: unknown modality type {modality}, this model has {num_modalities} (from 0)")
    return int(modality)


def per_modality(value: Any, count: int, name: str, *, is_one: Callable[[Any], bool] | None = None) -> tuple[Any, ...]:
    """One entry for each modality: a single value is meant for all of them."""
    if is_one(value) if is_one is not None else not is_sequence(value):
        return (value,) * count
    if value is None:
        return (None,) * count
    if len(value) != count:
        raise ValueError(f"{name}: expected one value or {count}, one for each entry of dim_latent, got {len(value)}")
    return tuple(value)
