"""The run-time type checker that `TYPECHECK=1` puts around every function of the package."""

from beartype import BeartypeConf, beartype

# an int is welcome where a float is meant, as everywhere in Python
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
