"""Written by hand for CPUs. No other device runs any of this; `shortcuts.py` decides when it is used."""
