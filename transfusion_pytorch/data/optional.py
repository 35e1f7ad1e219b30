"""Imports of packages that are not always installed."""

import importlib
from types import ModuleType


def import_optional(module: str, *, extra: str) -> ModuleType:
    """Imports a module of an optional dependency, or says which extra installs it (`ImportError`)."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f'you need {package} here, which is not installed: pip install "transfusion-pytorch[{extra}]"'
        ) from error
