"""`TrainConfig`: every choice of a training run, from code, a YAML file or the command line."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

BATCH_SIZE = 16  # where neither a batch size nor a token budget is asked for


def option(default: Any, help: str) -> Any:
    """A field with the text that `--help` shows."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """How a `Trainer` trains. Every field is an option of the scripts' command line and of a YAML file.

    A step is one step of the optimizer. It sees the same samples on any number of processes: `batch_size` counts the
    samples of all processes and micro-batches together, and so does `packs_per_step` with a `token_budget`.

    Raises `ValueError` for values that make no sense, and for options that do not go together.
    """

    steps: int | None = option(None, "optimizer steps (or give epochs)")
    epochs: int | None = option(None, "passes through the data, instead of steps")
    batch_size: int | None = option(None, "samples in a step, over all processes (16 without a token budget)")
    accumulation: int = option(1, "micro-batches in which each process computes a step of batch-size samples")
    token_budget: int | None = option(None, "pack samples into micro-batches of up to so many tokens instead")
    packs_per_step: int = option(1, "such packs in a step, over all processes")
    num_workers: int = option(0, "processes that load and pack data, beside each training process")
    seed: int = option(0, "of everything random")

    optimizer: Literal["adamw", "muon"] = option("adamw", "muon takes the hidden matrices, and AdamW the rest")
    learning_rate: float = option(1e-3, "the highest learning rate, of AdamW")
    muon_learning_rate: float = option(0.02, "that of Muon")
    beta1: float = option(0.9, "of AdamW")
    beta2: float = option(0.99, "of AdamW")
    weight_decay: float = option(0.05, "of matrices; biases and gains do not decay")
    clip: float | None = option(1.0, "longest gradient; longer ones are scaled down")
    schedule: Literal["cosine", "constant"] = option("cosine", "of the learning rate, behind the warm-up")
    warmup: int = option(100, "steps in which the learning rate rises, at most a tenth of all")
    cooldown: float = option(0.2, "last part of the steps in which a constant schedule falls linearly")
    final_factor: float = option(0.0, "learning rate at the end, relative to the highest")

    ema_beta: float | None = option(0.99, "of the moving average of the weights; none for no average")
    ema_every: int = option(10, "steps between its updates")
    ema_start: int = option(100, "steps before it starts, at most a quarter of all")

    velocity_consistency: bool = option(False, "add the velocity consistency loss against the moving average")

    device: str | None = option(None, "cpu, cuda or mps (the best one that is here)")
    precision: Literal["fp32", "bf16", "fp16"] | None = option(None, "autocast (fp32, or what accelerate says)")
    checkpointing: Literal["none", "full", "selective"] = option("none", "of activations, which saves memory")
    compile: bool = option(False, "compile the layers; samples are then packed and padded to the token budget")

    log_every: int = option(10, "steps between the lines of metrics.csv")
    details_every: int = option(200, "steps between losses by source and by time (0 for never)")
    validate_every: int | None = option(None, "steps between validations (a tenth of all; 0 for none but the last)")
    sample_every: int | None = option(None, "steps between samples (as validations; 0 for none but the last)")
    save_every: int | None = option(None, "steps between checkpoints (as validations; 0 for none but the last)")
    keep_last: int = option(2, "checkpoints that are kept")
    keep_best: int = option(1, "checkpoints that are kept beside them, of the lowest validation loss")
    tracker: Literal["none", "trackio", "wandb", "tensorboard"] = option("none", "where metrics are sent to")
    project: str = option("transfusion", "the name of the project there")

    on_bad_step: Literal["skip", "stop"] = option("skip", "when loss or gradient is not finite or explodes")
    explosion: float | None = option(100.0, "a gradient so many times as long as usual explodes; none for no check")
    on_bad_sample: Literal["stop", "skip"] = option("stop", "when a sample cannot be packed: NaN, unknown ids, ...")

    def __post_init__(self) -> None:
        for spec in fields(self):
            value, kind = getattr(self, spec.name), _HINTS[spec.name]
            if not _fits(value, kind):
                raise TypeError(f"{spec.name} must be {_describe(kind)}, got {value!r}")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"give steps or epochs, not both, got {self.steps} and {self.epochs}")
        if self.batch_size is not None and self.token_budget is not None:
            raise ValueError("give batch_size or token_budget, not both: with a budget, packs_per_step sizes a step")
        if self.token_budget is not None and self.accumulation != 1:
            raise ValueError("accumulation goes with batch_size; with a token_budget, set packs_per_step")
        if self.token_budget is None and self.packs_per_step != 1:
            raise ValueError("packs_per_step goes with a token_budget; with batch_size, set accumulation")
        if self.compile and self.token_budget is None:
            raise ValueError("compile needs a token_budget, to which batches are padded: one graph for one shape")
        if self.velocity_consistency and self.ema_beta is None:
            raise ValueError("velocity_consistency needs a moving average, but ema_beta is none")
        for name in _POSITIVE:
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in _NOT_NEGATIVE:
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        for name in ("cooldown", "final_factor", "beta1", "beta2", "ema_beta"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {value}")

    def resolved(self, num_steps: int | None) -> "TrainConfig":
        """With every default that depends on something filled in. `num_steps` are those that the epochs come to."""
        steps = num_steps if self.steps is None else self.steps
        if steps is None and self.epochs is None:
            raise ValueError("give steps, or epochs")
        if steps is None:
            raise ValueError("how many steps epochs have is unknown for packs of tokens, and for streams: give steps")
        tenth = max(steps // 10, 1)
        sizes = dict(batch_size=BATCH_SIZE) if self.batch_size is None and self.token_budget is None else {}
        every = {
            name: tenth if getattr(self, name) is None else getattr(self, name)
            for name in ("validate_every", "sample_every", "save_every")
        }
        warmup, start = min(self.warmup, steps // 10), min(self.ema_start, steps // 4)
        return replace(self, steps=steps, epochs=None, warmup=warmup, ema_start=start, **sizes, **every)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "the configuration") -> "TrainConfig":
        """Raises `ValueError` for names that are no option."""
        if unknown := sorted(set(values) - set(_HINTS)):
            raise ValueError(f"{source} has unknown options {', '.join(unknown)}; known are {', '.join(_HINTS)}")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "TrainConfig":
        return cls.from_dict(read_yaml(path), source=str(path))


def add_arguments(parser: argparse.ArgumentParser, defaults: TrainConfig, *, skip: Sequence[str] = ()) -> None:
    """An option for every field (`--batch-size`), and `--config FILE` for a YAML file of them.

    `defaults` are those that `--help` shows. Options that are left away are not in the namespace, see
    `config_from_arguments`; those in `skip` are left to the script.
    """
    group = parser.add_argument_group("training", "also in a YAML file, with _ for -")
    group.add_argument("--config", type=Path, help="YAML file of the options below; those given here come first")
    for spec in fields(TrainConfig):
        if spec.name in skip:
            continue
        default = getattr(defaults, spec.name)
        shown = "" if default is None else f" (default: {default})"
        reading: dict[str, Any] = dict(type=_reader(spec.name), metavar=_metavar(_HINTS[spec.name]))
        if _HINTS[spec.name] is bool:
            reading = dict(action=argparse.BooleanOptionalAction)
        group.add_argument(
            f"--{spec.name.replace('_', '-')}",
            dest=spec.name,
            default=argparse.SUPPRESS,
            help=spec.metadata["help"].replace("%", "%%") + shown,
            **reading,
        )


def config_from_arguments(arguments: argparse.Namespace, defaults: TrainConfig) -> TrainConfig:
    """The defaults, under the YAML file of `--config`, under the options that were given."""
    given = {name: value for name, value in vars(arguments).items() if name in _HINTS}
    path = getattr(arguments, "config", None)
    written = {} if path is None else read_yaml(path)
    chosen = written | given
    for one, other in (("steps", "epochs"), ("batch_size", "token_budget")):  # a choice takes the place of the other
        for name, rival in ((one, other), (other, one)):
            if chosen.get(name) is not None and rival not in chosen:
                chosen[rival] = None
    if chosen.get("token_budget") is not None:
        chosen.setdefault("accumulation", 1)
    return TrainConfig.from_dict(defaults.as_dict() | chosen, source=str(path or "the command line"))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Raises `ValueError` that names the file where it is no YAML mapping."""
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ImportError('YAML files need PyYAML: pip install "transfusion-pytorch[train]"') from error
    try:
        read = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{path} must be a list of options, `name: value`, got {type(read).__name__}")
    return {name: _number(value) for name, value in read.items()}


def _number(value: Any) -> Any:
    """YAML reads 1e-3 and none as text."""
    if value == "none":
        return None
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return int(number) if isinstance(number, float) and number.is_integer() and isinstance(value, str) else number


def _reader(name: str) -> Any:
    """A function that reads an option of the command line."""
    hint = _HINTS[name]

    def read(text: str) -> Any:
        if text == "none" and _fits(None, hint):
            return None
        for kind in (int, float, str):
            try:
                value = kind(text)
            except ValueError:
                continue
            if _fits(value, hint):
                return value
        raise argparse.ArgumentTypeError(f"expected {_describe(hint)}, got {text!r}")

    return read


def _metavar(hint: Any) -> str:
    choices = [choice for kind in _kinds(hint) for choice in get_args(kind) if get_origin(kind) is Literal]
    return "{" + ",".join(map(str, choices)) + "}" if choices else "X"


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    for kind in _kinds(hint):
        if get_origin(kind) is Literal:
            if value in get_args(kind):
                return True
        elif isinstance(value, bool):
            if kind is bool:
                return True
        elif isinstance(value, (int, float) if kind is float else kind):
            return True
    return False


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "none"}
    words = [
        " or ".join(map(repr, get_args(kind))) if get_origin(kind) is Literal else names[kind] for kind in _kinds(hint)
    ]
    return " or ".join(words)


_HINTS: dict[str, Any] = get_type_hints(TrainConfig)
_POSITIVE = (
    *("steps", "epochs", "batch_size", "accumulation", "token_budget", "packs_per_step", "learning_rate"),
    *("muon_learning_rate", "clip", "ema_every", "log_every", "keep_last", "explosion"),
)
_NOT_NEGATIVE = (
    "validate_every",
    "sample_every",
    "num_workers",
    "seed",
    "weight_decay",
    "warmup",
    "ema_start",
    "details_every",
    "save_every",
    "keep_best",
)
assert all(spec.default is not MISSING for spec in fields(TrainConfig))
