"""Check the wheel named on the command line, in an environment where it is installed and the tree is not."""

import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import transfusion_pytorch

names = zipfile.ZipFile(sys.argv[1]).namelist()
strays = [name for name in names if not name.startswith(("transfusion_pytorch/", "transfusion_pytorch-"))]
if strays:
    sys.exit(f"the wheel holds files from outside the package: {strays}")
if "transfusion_pytorch/py.typed" not in names:
    sys.exit("the wheel has no py.typed: type checkers would ignore its annotations")

imported = Path(transfusion_pytorch.__file__)
if "site-packages" not in imported.parts:
    sys.exit(f"imported from the tree, not from the wheel: {imported}")
print(f"transfusion-pytorch {version('transfusion-pytorch')} imports from its wheel: {transfusion_pytorch.Transfusion}")
