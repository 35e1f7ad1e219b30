"""Written by hand for CPUs. No other device runs any of this; `shortcuts.py` decides when it is used."""

from transfusion_pytorch.network.cpu.memory import keep_freed_memory

keep_freed_memory()
