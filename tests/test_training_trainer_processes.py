"""The trainer on two processes, held to one: the same losses and weights, checkpoints that fit either, no hangs."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training_trainer import CONFIG, assert_equal_states, fresh_model, rows, samples, trainer, weights

pytestmark = pytest.mark.slow

SCRIPT = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from dataclasses import replace
from test_training_trainer import CONFIG, StopAt, fresh_model, samples, trainer, weights

folder, options = sys.argv[1], json.loads(sys.argv[2])
count, resume, extra = options.pop("count", 40), options.pop("resume", False), options.pop("extra", None)
config, model = replace(CONFIG, **options), fresh_model().double()
class Exchanges(StopAt):
    def on_start(self, trainer):
        self.counted, exchange = 0, torch.distributed.all_reduce
        def counting(*values, **options):
            self.counted += 1
            return exchange(*values, **options)
        torch.distributed.all_reduce = counting

    def on_step(self, trainer, losses):
        if trainer.step == self.at:
            sys.stdout.write(f"exchanged {self.counted}{chr(10)}")  # in one piece: two processes share the pipe
            sys.stdout.flush()

callbacks = [Exchanges(12)] if extra == "exchanges" else []
if extra == "signal" and os.environ["RANK"] == "1":
    callbacks = [StopAt(3, signal.SIGTERM)]
if extra == "adapter":
    import peft
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["to_qkv"]))
run = trainer(folder, config, data=samples(count), model=model, validation=samples(7), callbacks=callbacks)
if extra == "alone" and run.is_main:
    run.model.eval()
    run.model(samples(3))
    run.model.sample(max_length=8)
    run.model.train()
if extra == "sample":
    torch.manual_seed(run.launch.rank)
    run.average.sample(max_length=6 + 9 * run.launch.rank)  # all at once, each as long as it likes
fitted = run.fit(resume=resume)
sys.stdout.write(f"fitted {run.launch.rank} {run.launch.size} {fitted.step}{chr(10)}")  # in one piece, as above
sys.stdout.flush()
if extra == "adapter":
    run.save_pretrained(folder + "/adapter")
"""


def launch(folder, *, processes=2, fsdp=False, **options) -> str:
    """Runs a training on so many processes of this machine, as `accelerate launch` would start them."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    command += ["--use_fsdp", "--fsdp_version", "2"] if fsdp else ["--multi_gpu"] if processes > 1 else []
    command += ["--main_process_port", "0"] if processes > 1 else []
    script = Path(folder).parent / f"{Path(folder).name}.py"
    script.write_text(SCRIPT)
    tests = str(Path(__file__).parent)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([tests, str(Path(tests).parent)]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*command, str(script), str(folder), json.dumps(options)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout + done.stderr


def load_weights(folder, step: int = 12):
    """Those of the model and of the average in a checkpoint."""
    run = trainer(folder, model=fresh_model().double())
    run.fit(resume=Path(folder) / "checkpoints" / f"step-{step:08d}")
    return weights(run.model), weights(run.average)


def assert_close_states(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            other[name], value, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same_run(one: Path, other: Path):
    for mine, theirs in zip(rows(one), rows(other), strict=True):
        for name, value in mine.items():
            assert (value == "") == (theirs[name] == "")
            if value:
                assert float(theirs[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-7), (name, mine["step"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    trainer(folder, model=fresh_model().double(), validation=samples(7)).fit()
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(accumulation=2),
        dict(num_workers=1),
        dict(fsdp=True),
        dict(extra="alone"),
        dict(fsdp=True, extra="sample"),
    ],
    ids=["ddp", "accumulation", "workers", "fsdp", "one evaluates alone", "fsdp samples"],
)
def test_two_processes_are_one(tmp_path, alone, options):
    told = launch(tmp_path / "run", **options)
    assert "2 processes (FSDP2)" in told or "2 processes (DDP)" in told
    assert ("FSDP2" in told) == options.get("fsdp", False)
    assert told.count("fitted") == 2
    assert_same_run(alone, tmp_path / "run")
    for made, expected in zip(load_weights(tmp_path / "run"), load_weights(alone), strict=True):
        assert_close_states(expected, made)


def test_packed_by_tokens_two_processes_are_one(tmp_path):
    config = dict(batch_size=None, token_budget=40, packs_per_step=3)
    trainer(tmp_path / "one", replace(CONFIG, **config), model=fresh_model().double(), validation=samples(7)).fit()
    launch(tmp_path / "two", **config)
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_data_that_end_unevenly_hang_nobody(tmp_path):
    """Steps of three samples for four micro-batches: one process has nothing in one of them."""
    trainer(tmp_path / "one", replace(CONFIG, batch_size=3), model=fresh_model().double(), validation=samples(7)).fit()
    launch(tmp_path / "two", batch_size=3, accumulation=2)
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_checkpoints_fit_any_number_of_processes(tmp_path, alone, fsdp):
    """Saved on two, continued on one, on four, and on two again: the same samples follow."""
    launch(tmp_path / "run", fsdp=fsdp, keep_last=9)
    half = "step-00000005"
    for processes in (1, 4, 2):
        folder = tmp_path / f"on {processes}"
        shutil.copytree(tmp_path / "run" / "checkpoints" / half, folder / "checkpoints" / half)
        launch(folder, processes=processes, fsdp=fsdp and processes > 1, resume=True)
        later = [row for row in rows(alone) if int(row["step"]) > 5]
        assert [row["step"] for row in rows(folder)] == [row["step"] for row in later]
        for mine, theirs in zip(rows(folder), later, strict=True):
            assert float(mine["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-4)
        for made, expected in zip(load_weights(folder), load_weights(alone), strict=True):
            assert_close_states(expected, made)


def test_the_same_number_of_processes_goes_on_to_the_bit(tmp_path):
    launch(tmp_path / "whole")
    launch(tmp_path / "cut", steps=12)
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000012")
    launch(tmp_path / "cut", resume=True)
    for made, expected in zip(load_weights(tmp_path / "cut"), load_weights(tmp_path / "whole"), strict=True):
        assert_equal_states(made, expected)


def test_a_step_takes_two_exchanges(tmp_path):
    """One before it, of flags and counts, and one of losses; gradients travel in DDP."""
    for accumulation in (1, 2):
        options = dict(accumulation=accumulation, details_every=0, validate_every=0, save_every=0)
        told = launch(tmp_path / str(accumulation), extra="exchanges", **options)
        assert re.findall(r"exchanged (\d+)", told) == [str(12 * (1 + accumulation))] * 2


def test_a_signal_to_one_process_stops_all_and_the_run_goes_on(tmp_path):
    told = launch(tmp_path / "run", extra="signal")
    assert "fitted 0 2 4" in told  # one step later than the signal, which travels with the step that follows
    assert "fitted 1 2 4" in told
    launch(tmp_path / "run", resume=True)
    launch(tmp_path / "whole")
    for made, expected in zip(load_weights(tmp_path / "run"), load_weights(tmp_path / "whole"), strict=True):
        assert_equal_states(made, expected)


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_an_adapter_is_trained_and_saved_on_two_processes(tmp_path, fsdp):
    """Equal to that of one process."""
    pytest.importorskip("peft")
    launch(tmp_path / "one", processes=1, extra="adapter")
    launch(tmp_path / "two", fsdp=fsdp, extra="adapter")
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-7)
