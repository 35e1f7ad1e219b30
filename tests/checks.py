"""What tests must know of how they are run."""

import os

import pytest

TYPECHECK = os.environ.get("TYPECHECK", "").lower() in ("1", "true")
no_typecheck = pytest.mark.skipif(TYPECHECK, reason="a stand-in of another type")
compiles = pytest.mark.skipif(TYPECHECK, reason="a compiled graph cannot check types")
