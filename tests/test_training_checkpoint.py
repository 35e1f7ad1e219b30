"""Checkpoints: every state makes the round trip, and nothing that goes wrong loses what was there."""

import copy
import errno
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter, OrderedDict
from pathlib import Path

import numpy
import pytest
import torch
from tiny import ragged_batch, tiny
from torch import nn
from torch.optim import lr_scheduler

from transfusion_pytorch.saving import files
from transfusion_pytorch.saving.files import PARTIAL
from transfusion_pytorch.saving.nested import flatten_state, map_tensors, unflatten_state
from transfusion_pytorch.training.checkpoint import Checkpoints
from transfusion_pytorch.training.checkpoint_files import load_checkpoint
from transfusion_pytorch.training.ema import create_ema, ema_state, load_ema_state
from transfusion_pytorch.training.random_states import random_states, set_random_states


def assert_same(one, other):
    """Equal to the bit, types included."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))
    elif isinstance(one, numpy.ndarray):
        assert one.dtype == other.dtype
        assert numpy.array_equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        assert [type(key) for key in one] == [type(key) for key in other]
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for item, twin in zip(one, other, strict=True):
            assert_same(item, twin)
    elif isinstance(one, float) and math.isnan(one):
        assert math.isnan(other)
    else:
        assert one == other


def through_disk(folder, **parts):
    """The parts as a checkpoint gives them back."""
    path = Checkpoints(folder).save(1, parts)
    return dict(load_checkpoint(path).parts)


STRANGE = {
    "numbers": [1, -(2**70), 1.0, -0.0, 0.1, 5e-324, math.inf, -math.inf, math.nan, True, None, "ä\n"],
    "tuples": ((), (1, (2.0, [3])), []),
    "int keys": {0: {"exp_avg": torch.randn(2), "step": torch.tensor(3.0)}, 10: {}},
    "odd keys": {(1, "a"): 1, None: 2, 1.5: 3, math.inf: 4, True: 5},
    "tags": {"$tensor": "x", "b": {"$tuple": [1]}, "c": {"$unknown": 1}},
    "dots": {"a.b": torch.tensor(1), "a": {"b": torch.tensor(2)}},
    "kinds": [torch.bfloat16, torch.device("cuda", 1), torch.Size([2, 3])],
    "mappings": [OrderedDict(b=1, a=torch.ones(1)), Counter({30: 1, 80: 2})],
    "numpy": [numpy.arange(3, dtype=numpy.uint32), numpy.float64(0.1), numpy.bool_(True), numpy.zeros((0, 2))],
    "tensors": [
        torch.tensor([math.nan, math.inf]),
        torch.randn(2, 3).T,
        torch.zeros(0, 3),
        torch.tensor(True),
        torch.randn(4).bfloat16(),
        torch.arange(3, dtype=torch.uint8),
    ],
}


def test_any_state_makes_the_round_trip(tmp_path):
    tensors, structure = flatten_state(STRANGE)
    assert_same(unflatten_state(tensors, json.loads(json.dumps(structure, allow_nan=False))), STRANGE)
    assert_same(through_disk(tmp_path, strange=STRANGE)["strange"], STRANGE)
    for name, value in STRANGE.items():
        assert_same(unflatten_state(*flatten_state(value)), value)
        assert_same(map_tensors(torch.clone, {name: value}), {name: value})


def test_a_shared_tensor_is_kept_once(tmp_path):
    weight = torch.randn(1000)
    state = {"embed": weight, "head": weight, "view": weight.view(1000)}
    assert len(flatten_state(state).tensors) == 2
    assert_same(through_disk(tmp_path, model=state)["model"], state)
    assert (tmp_path / "step-00000001" / "model.safetensors").stat().st_size < 5000


@pytest.mark.parametrize("value", [lambda step: 1.0, {1, 2}, 1j, nn.ReLU(), numpy.array(["a"]), b"bytes"])
def test_what_cannot_be_saved_is_named(tmp_path, value):
    with pytest.raises(TypeError, match=r"'param_groups\.0\.hook' of the state is a \w+"):
        flatten_state({"param_groups": [{"hook": value}]})
    with pytest.raises(TypeError, match=r"part 'optimizer' of the checkpoint: 'a\.1' of the state is a"):
        Checkpoints(tmp_path).save(1, {"optimizer": {"a": [0, value]}})
    assert not list(tmp_path.iterdir())


def test_a_shard_is_refused():
    class Shard(torch.Tensor):
        def full_tensor(self):
            raise AssertionError("a state is gathered by all processes together, not here")

    with pytest.raises(TypeError, match=r"'model\.w' of the state is one shard of a tensor; gather the state"):
        flatten_state({"model": {"w": torch.ones(2).as_subclass(Shard)}})


def test_unknown_tags_and_missing_tensors_are_errors():
    with pytest.raises(ValueError, match="'\\$later' is nothing that this version knows"):
        unflatten_state({}, {"$later": 1})
    with pytest.raises(ValueError, match=r"the tensor 'a\.b' of the state is missing"):
        unflatten_state({}, [{"$tensor": "a.b"}])


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.1, amsgrad=True)


def fused_adamw(parameters):
    return torch.optim.AdamW([{"params": parameters[:1], "lr": 0.02}, {"params": parameters[1:]}], fused=True)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True)


def muon(parameters):
    return torch.optim.Muon([parameter for parameter in parameters if parameter.ndim == 2], lr=0.1)


def warm_up(optimizer):
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, 9)
    return lr_scheduler.SequentialLR(optimizer, [lr_scheduler.LinearLR(optimizer, total_iters=4), cosine], [4])


def by_lambda(optimizer):
    return lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def in_steps(optimizer):
    return lr_scheduler.MultiStepLR(optimizer, [2, 4])


def one_cycle(optimizer):
    return lr_scheduler.OneCycleLR(optimizer, 0.1, 20, cycle_momentum=False)


class Training:
    """A model, its optimizer and scheduler, with dropout so that random numbers matter."""

    def __init__(self, make_optimizer, make_scheduler):
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1))
        self.optimizer = make_optimizer(list(self.model.parameters()))
        self.scheduler = make_scheduler(self.optimizer)
        self.generator = torch.Generator().manual_seed(3)

    def run(self, steps):
        for _ in range(steps):
            scale = random.random() + numpy.random.rand()
            loss = self.model(torch.randn(8, 4, generator=self.generator)).square().mean() * scale
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return self

    def parts(self):
        objects = dict(model=self.model, optimizer=self.optimizer, scheduler=self.scheduler)
        return {name: each.state_dict() for name, each in objects.items()} | {
            "random": random_states(data=self.generator)
        }

    def load(self, parts):
        self.model.load_state_dict(parts["model"])
        self.optimizer.load_state_dict(parts["optimizer"])
        self.scheduler.load_state_dict(parts["scheduler"])
        set_random_states(parts["random"], data=self.generator)
        return self


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # of SequentialLR's own
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # the same, in torch 2.6
@pytest.mark.parametrize("make_scheduler", [warm_up, by_lambda, in_steps, one_cycle])
@pytest.mark.parametrize("make_optimizer", [adamw, fused_adamw, sgd, muon])
def test_training_goes_on_as_if_it_had_never_stopped(tmp_path, make_optimizer, make_scheduler):
    if make_optimizer is muon and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    one = Training(make_optimizer, make_scheduler).run(3)
    saved = copy.deepcopy(one.parts())
    undisturbed = one.run(4).parts()
    Checkpoints(tmp_path).save(3, saved)  # not before: the type checker draws from Python's random numbers

    torch.manual_seed(9), random.seed(9), numpy.random.seed(9)
    loaded = dict(Checkpoints(tmp_path).load().parts)
    resumed = Training(make_optimizer, make_scheduler).run(1).load(loaded)
    assert_same(resumed.parts()["optimizer"], {**loaded["optimizer"]})
    assert_same(resumed.run(4).parts(), undisturbed)
    assert not torch.equal(undisturbed["model"]["0.weight"], loaded["model"]["0.weight"])


def test_random_states_cover_every_source(tmp_path):
    generator = torch.Generator().manual_seed(5)

    def numbers():
        return [
            random.random(),
            random.gauss(0, 1),
            numpy.random.randn(),
            torch.rand(2),
            torch.rand(2, generator=generator),
        ]

    random.gauss(0, 1)  # leaves a second number waiting
    numpy.random.randn()
    saved = random_states(own=generator)
    first = numbers()
    states = through_disk(tmp_path, random=saved)["random"]
    assert_same([numbers() != first, set_random_states(states, own=generator), numbers()], [True, None, first])
    with pytest.raises(ValueError, match="no random state was saved for other"):
        set_random_states(states, other=generator)


def test_random_states_of_gpus_go_back_to_as_many_as_there_are(monkeypatch):
    states = {0: torch.tensor([1]), 1: torch.tensor([2])}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(states.values()))
    saved = random_states()
    for count in (1, 2):
        back = {}
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device, back=back: back.update({device: state}))
        set_random_states(saved)
        assert_same(back, {device: states[device] for device in range(count)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    set_random_states(saved)  # a run that goes on without GPUs


def test_an_average_is_kept_without_the_model(tmp_path):
    model = tiny(modality_encoder=(nn.Linear(3, 3), None), modality_decoder=(nn.Linear(3, 3), None))
    ema = create_ema(model, update_after_step=0, update_every=1, include_online_model=True)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters_without_encoder_decoder():
                parameter.add_(torch.randn_like(parameter))
        ema.update()
    state = ema_state(ema)
    assert not [name for name in state if name.startswith("online_model.") or ".encoder." in name]
    assert int(state["step"]) == 3
    other = create_ema(tiny(modality_encoder=(nn.Linear(3, 3), None), modality_decoder=(nn.Linear(3, 3), None)))
    load_ema_state(other, through_disk(tmp_path, ema=state)["ema"])
    assert_same(dict(ema_state(other)), dict(state))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        load_ema_state(other, {**state, "surplus": torch.ones(1)})
    with pytest.raises(RuntimeError, match="Missing key"):
        load_ema_state(other, {name: tensor for name, tensor in state.items() if name != "step"})


def part(step):
    return {"model": {"w": torch.full((100,), float(step))}, "scheduler": {"last_epoch": step}}


def steps(folder):
    return sorted(int(path.name.split("-")[1]) for path in Path(folder).iterdir())


def test_the_last_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=1)
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: math.nan, 5: None, 6: 3.0}
    for step, loss in losses.items():
        path = checkpoints.save(step, part(step), figures=None if loss is None else {"loss": loss})
        assert path == tmp_path / f"step-{step:08d}"
        assert steps(tmp_path)[-1] == step
    assert steps(tmp_path) == [2, 5, 6]
    assert checkpoints.best().step == checkpoints.load("best").step == 2
    assert checkpoints.latest().step == checkpoints.load().step == 6
    assert [info.figures for info in checkpoints.infos()] == [{"loss": 1.0}, {}, {"loss": 3.0}]
    highest = Checkpoints(tmp_path, higher_is_better=True)
    assert highest.best().step == 6
    assert Checkpoints(tmp_path, metric="accuracy").best() is None
    with pytest.raises(FileNotFoundError, match="there is no checkpoint with a figure 'accuracy' in"):
        Checkpoints(tmp_path, metric="accuracy").load("best")


def test_load_takes_a_step_a_path_and_what_was_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", keep_last=5)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        checkpoints.load()
    for step in (1, 2, 3):
        checkpoints.save(step, part(step), figures={"loss": math.inf})
    assert_same(dict(checkpoints.load(2).parts), part(2))
    (tmp_path / "run" / "step-00000003").rename(tmp_path / "elsewhere")
    assert checkpoints.load(tmp_path / "elsewhere").figures == {"loss": math.inf}
    assert load_checkpoint(str(tmp_path / "elsewhere")).step == 3
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*step-00000007; the checkpoint before it is .*0002"):
        checkpoints.load(7)
    with pytest.raises(KeyError, match="has no part 'ema', only model, scheduler"):
        checkpoints.load().parts["ema"]
    with pytest.raises(FileExistsError, match=r"discard_after\(1\) removes it"):
        checkpoints.save(2, part(2))
    checkpoints.discard_after(1)
    assert steps(tmp_path / "run") == [1]


def test_processes_have_states_of_their_own(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, part(1), per_rank=[{"seed": torch.tensor(rank), "position": rank} for rank in range(2)])
    other = Checkpoints(tmp_path, is_main=False)
    assert other.save(2, part(2)) == tmp_path / "step-00000002"
    other.discard_after(0)
    assert steps(tmp_path) == [1]
    loaded = other.load()
    assert_same(loaded.of_rank(1, 2), {"seed": torch.tensor(1), "position": 1})
    assert loaded.of_rank(0, 4) is None
    assert list(loaded.parts) == ["model", "scheduler"]
    Checkpoints(tmp_path / "not made", is_main=False)
    assert not (tmp_path / "not made").exists()


@pytest.mark.parametrize("name", ["state", "rank-00000", "../model", "Model", ""])
def test_names_of_parts_are_checked(tmp_path, name):
    with pytest.raises(ValueError, match="names of parts are lower case words"):
        Checkpoints(tmp_path).save(1, {name: {}})


@pytest.mark.parametrize("arguments", [dict(keep_last=0), dict(keep_best=-1)])
def test_how_many_are_kept_is_checked(tmp_path, arguments):
    with pytest.raises(ValueError, match="keep_last must be at least 1"):
        Checkpoints(tmp_path, **arguments)


def cut(file):
    file.write_bytes(file.read_bytes()[:-50])


def alter(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def rewrite(**changes):
    return lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


DAMAGES = {
    "cut tensors": (
        "model.safetensors",
        cut,
        r"model\.safetensors is cut off .*: 4\d\d bytes instead of 5\d\d",
    ),
    "altered tensors": ("model.safetensors", alter, r"model\.safetensors is not what was saved"),
    "altered JSON": ("scheduler.json", alter, r"scheduler\.json is not what was saved"),
    "missing": ("scheduler.json", Path.unlink, r"scheduler\.json is missing"),
    "no state": ("state.json", Path.unlink, "is no checkpoint of transfusion-pytorch"),
    "cut state": ("state.json", cut, r"state\.json is not readable JSON"),
    "foreign": ("state.json", lambda file: file.write_text('{"epoch": 3}'), "it has no format number"),
    "newer": (
        "state.json",
        rewrite(format=2, written_by="9.0"),
        r"a newer version, 9\.0 \(format 2, this one reads 1",
    ),
    "older": ("state.json", rewrite(format=0), r"an older version, .* \(format 0, this one reads 1\)"),
    "altered step": ("state.json", rewrite(step=7), r"state\.json is not what was saved"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_one_before_offered(tmp_path, damage):
    name, change, message = DAMAGES[damage]
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        checkpoints.save(step, part(step))
    cut(tmp_path / "step-00000002" / "model.safetensors")  # so that it is not offered
    change(tmp_path / "step-00000003" / name)
    offer = rf"{message}.*; the checkpoint before it is {tmp_path}/step-00000001: load that one by its path"
    for which in ("latest", 3, tmp_path / "step-00000003"):
        with pytest.raises(ValueError, match=offer):
            dict(checkpoints.load(which).parts)
    assert_same(dict(checkpoints.load(1).parts), part(1))
    cut(tmp_path / "step-00000001" / "state.json")
    with pytest.raises(ValueError, match=rf"{message}.*; there is no checkpoint before it"):
        dict(checkpoints.load().parts)


def test_what_is_not_whole_is_neither_counted_nor_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(1, part(1))
    checkpoints.save(2, part(2))
    cut(tmp_path / "step-00000002" / "state.json")
    (tmp_path / "step-mine").mkdir()
    assert checkpoints.latest() is None
    checkpoints.save(3, part(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003", "step-mine"]


def test_a_checkpoint_of_another_model_says_how_it_differs(tmp_path):
    small, large = (tiny(trunk=dict(dim=dim), num_text_tokens=9) for dim in (16, 24))
    identity = dict(dim=16, options=dict(depth=2, shapes=(4, 4)))
    checkpoints = Checkpoints(tmp_path, identity=identity)
    checkpoints.save(1, {"model": small.state_dict()})
    loaded = checkpoints.load()
    assert_same(loaded.part_for("model", small.state_dict()), small.state_dict())
    with pytest.raises(
        ValueError, match=r"'model' in .* belongs to another model than this one: '\S+' is \(.*16.*24.*; and \d+ more"
    ):
        loaded.part_for("model", large.state_dict())
    checkpoints.save(2, {"model": dict(a=torch.ones(1), c=torch.ones(1))})
    message = r"'b' is missing; 'c' is not expected; 'a' is \(1,\) float32 instead of \(1,\) float64;"
    with pytest.raises(ValueError, match=message):
        checkpoints.load().part_for("model", dict(a=torch.ones(1).double(), b=torch.ones(1)))
    other = Checkpoints(tmp_path, identity=dict(dim=24, options=dict(depth=2, shapes=(4, 8)), new=True))
    message = r"another run: dim is 16 instead of 24; options.shapes is \[4, 4\] instead of \[4, 8\]; new is None"
    with pytest.raises(ValueError, match=message):
        other.load()
    assert load_checkpoint(tmp_path / "step-00000001").identity == json.loads(json.dumps(identity))


@pytest.mark.parametrize("calls", [0, 1, 2])
@pytest.mark.parametrize("writer", ["save_file", "flush"])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, writer, calls):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(1, part(1))
    real, countdown = getattr(files, writer), [calls]

    def fill(*args, **options):
        countdown[0] -= 1
        if countdown[0] >= 0:
            return real(*args, **options)
        if writer == "save_file":  # which has one exception of its own for everything
            raise files.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, writer, fill)
    with pytest.raises(
        OSError, match=r"step 2 could not be saved in .*No space left.*untouched: .*step-00000001"
    ) as info:
        checkpoints.save(2, {**part(2), "ema": part(3)["model"], "optimizer": part(4)["model"]})
    assert info.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert_same(dict(checkpoints.load().parts), part(1))


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"checkpoints cannot be written to .*file: File exists"):
        Checkpoints(tmp_path / "file")
    Checkpoints(tmp_path / "run").save(1, part(1))

    def refuse(*args, **options):
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match=r"checkpoints cannot be written to .*run: Read-only file system"):
        Checkpoints(tmp_path / "run")
    assert Checkpoints(tmp_path / "run", is_main=False).load().step == 1


def test_what_a_killed_process_left_is_removed_by_the_next_save(tmp_path):
    Checkpoints(tmp_path, keep_last=1).save(1, part(1))
    left = tmp_path / f".step-00000002{PARTIAL}0123"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    reader, writer = Checkpoints(tmp_path), Checkpoints(tmp_path, keep_last=1)
    assert reader.load().step == 1
    assert left.exists(), "whoever reads while another saves must not delete what that one is writing"
    writer.save(3, part(3))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_an_old_one_goes_only_after_the_new_one_is_there(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(1, part(1))
    seen = []
    monkeypatch.setattr(Checkpoints, "_remove_old", lambda self: seen.append([info.step for info in self.infos()]))
    checkpoints.save(2, part(2))
    assert seen == [[1, 2]]


def test_one_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(1, part(1))

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("transfusion_pytorch.training.checkpoint._remove", refuse)
    with pytest.warns(UserWarning, match=r"step-00000001 could not be removed: .*Permission denied"):
        checkpoints.save(2, part(2))
    assert checkpoints.latest().step == 2


def test_the_probe_of_a_killed_process_is_removed(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rmdir", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Checkpoints(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    Checkpoints(tmp_path).save(1, part(1))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_model_trains_on_from_a_checkpoint(tmp_path):
    """All parts at once, of the model that all this is for."""
    batch = ragged_batch()

    def build():
        torch.manual_seed(0)
        model = tiny()
        return (
            model,
            torch.optim.AdamW(model.parameters(), lr=1e-2),
            create_ema(model, update_after_step=0, update_every=1),
        )

    def train(model, optimizer, ema, count):
        for _ in range(count):
            model(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update()

    first = build()
    train(*first, 2)
    model, optimizer, ema = first
    parts = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), ema=ema_state(ema), random=random_states())
    Checkpoints(tmp_path).save(2, parts)
    train(*first, 2)
    second = build()
    loaded = Checkpoints(tmp_path).load()
    second[0].load_state_dict(loaded.part_for("model", second[0].state_dict()))
    second[1].load_state_dict(loaded.parts["optimizer"])
    load_ema_state(second[2], loaded.part_for("ema", ema_state(second[2])))
    set_random_states(loaded.parts["random"])
    train(*second, 2)
    assert_same(second[0].state_dict(), first[0].state_dict())
    assert_same(ema_state(second[2]), ema_state(first[2]))


def kills(folder, count, seed):
    script = Path(__file__).with_name("checkpoint_kills.py")
    command = [sys.executable, "-W", "ignore", str(script), str(folder), str(count), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes to kill are forked")
@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_whole_checkpoints(tmp_path, count):
    result = kills(tmp_path / "run", count, seed=count)
    assert result["left"] == []
    assert result["hits"] >= count / 4, "too few kills fell into a save"
    assert result["step"] > count / 2
    assert 1 <= result["kept"] <= 3
