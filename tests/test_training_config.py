"""The configuration of a run: from code, YAML and the command line; and the learning rate that it asks for."""

import argparse
from dataclasses import replace

import pytest

from transfusion_pytorch import TrainConfig
from transfusion_pytorch.training.config import add_arguments, config_from_arguments
from transfusion_pytorch.training.schedule import learning_rate_factor

DEFAULTS = TrainConfig(steps=100, batch_size=8, learning_rate=0.5)


def read(*arguments: str, defaults: TrainConfig = DEFAULTS) -> TrainConfig:
    parser = argparse.ArgumentParser()
    add_arguments(parser, defaults)
    return config_from_arguments(parser.parse_args(arguments), defaults)


def test_the_command_line_comes_before_the_file_and_that_before_the_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("steps: 7e0\nlearning_rate: 1e-3\nema_beta: none\ncompile: false\noptimizer: muon\n")
    assert read() == DEFAULTS
    assert read("--config", str(file)) == replace(
        DEFAULTS, steps=7, learning_rate=1e-3, ema_beta=None, optimizer="muon"
    )
    assert read("--config", str(file), "--steps", "9", "--optimizer", "adamw").steps == 9
    assert read("--config", str(file), "--ema-beta", "0.5").ema_beta == 0.5
    assert TrainConfig.from_yaml(file) == TrainConfig(
        steps=7, learning_rate=1e-3, ema_beta=None, compile=False, optimizer="muon"
    )


def test_values_are_read_as_what_they_are():
    config = read("--clip", "none", "--token-budget", "64", "--packs-per-step", "2", "--compile", "--weight-decay", "0")
    assert (config.clip, config.token_budget, config.batch_size, config.compile) == (None, 64, None, True)
    assert read("--no-compile").compile is False


def test_one_choice_takes_the_place_of_another():
    assert (read("--epochs", "3").steps, read("--epochs", "3").epochs) == (None, 3)
    assert read("--token-budget", "64", defaults=replace(DEFAULTS, accumulation=4)).accumulation == 1
    packed = replace(DEFAULTS, batch_size=None, token_budget=64)
    assert (read("--batch-size", "4", defaults=packed).token_budget, read(defaults=packed).token_budget) == (None, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "many"], "argument --steps: expected a whole number or none, got 'many'"),
        (["--optimizer", "sgd"], "expected 'adamw' or 'muon', got 'sgd'"),
        (["--seed", "none"], "argument --seed: expected a whole number, got 'none'"),
    ],
)
def test_the_command_line_says_what_it_expects(arguments, message, capsys):
    with pytest.raises(SystemExit):
        read(*arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", r"run\.yaml has unknown options stepz; known are steps"),
        ("- 3", r"run\.yaml must be a list of options, `name: value`, got list"),
        ("a: [", r"run\.yaml is not YAML"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read("--config", str(tmp_path / "run.yaml"))


def test_defaults_that_depend_on_the_steps():
    config = TrainConfig(steps=50).resolved(None)
    assert (config.batch_size, config.warmup, config.ema_start) == (16, 5, 12)
    assert (config.validate_every, config.sample_every, config.save_every) == (5, 5, 5)
    assert TrainConfig(epochs=2).resolved(30).steps == 30
    with pytest.raises(ValueError, match="packs of tokens, and for streams: give steps"):
        TrainConfig(epochs=2, token_budget=10).resolved(None)


def test_cosine():
    factors = [learning_rate_factor(step, total=5, warmup=1) for step in range(6)]
    assert factors == pytest.approx([0.5, 1, 0.8536, 0.5, 0.1464, 0], abs=1e-4)
    assert learning_rate_factor(99, total=10, final=0.1) == pytest.approx(0.1)
    assert learning_rate_factor(0, total=1) == 1


def test_constant_with_a_cooldown():
    factors = [learning_rate_factor(s, total=10, schedule="constant", warmup=2, cooldown=0.4) for s in range(11)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    assert learning_rate_factor(9, total=10, schedule="constant", cooldown=0.0) == 1
