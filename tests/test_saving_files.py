"""Files that are whole or not there."""

import pytest
import torch
from safetensors.torch import save_file

from transfusion_pytorch.saving.files import (
    PARTIAL,
    load_json,
    load_metadata,
    load_tensors,
    save_json,
    save_tensors,
    whole_file,
    whole_folder,
)


def test_a_folder_appears_when_it_is_full(tmp_path):
    with whole_folder(tmp_path / "run") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "run").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run" / "a").read_text() == "1"


@pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path, failure):
    save_json(tmp_path / "a.json", 1)

    def fail_in(place, name):
        with place as partial:
            (partial / name if name else partial).write_text("half")
            raise failure

    with pytest.raises(type(failure)):
        fail_in(whole_file(tmp_path / "a.json"), "")
    with pytest.raises(type(failure)):
        fail_in(whole_folder(tmp_path / "run"), "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert load_json(tmp_path / "a.json") == 1


def test_a_folder_that_exists_is_not_replaced(tmp_path):
    with whole_folder(tmp_path / "run"):
        pass
    with pytest.raises(FileExistsError, match="exists already"), whole_folder(tmp_path / "run"):
        pass
    assert not list(tmp_path.glob(f"*{PARTIAL}*"))


def test_tensors_make_the_round_trip(tmp_path):
    buffer = torch.arange(6.0)
    tensors = {
        "whole": torch.randn(2, 3),
        "turned": torch.randn(2, 3).T,
        "half": buffer[:3],
        "other half": buffer[3:],
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "bf16": torch.randn(3).bfloat16(),
    }
    tensors["again"] = tensors["whole"]
    save_tensors(tmp_path / "t.safetensors", tensors, {"step": "3"})
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name
        assert loaded[name].dtype == tensor.dtype, name
    assert loaded["again"] is loaded["whole"]
    assert load_metadata(tmp_path / "t.safetensors") == {"step": "3"}


def test_what_is_cut_off_is_named(tmp_path):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.randn(100)})
    path.write_bytes(path.read_bytes()[:-50])
    for load in (load_tensors, load_metadata):
        with pytest.raises(ValueError, match=r"t\.safetensors is not a whole safetensors file"):
            load(path)
    (tmp_path / "a.json").write_text('{"a": 1')
    with pytest.raises(ValueError, match=r"a\.json is not readable JSON"):
        load_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("aliases", "message"),
    [("[1]", "must be a dict of names, got a list"), ('{"b": "c"}', "b is an alias of 'c'"), ("{", "are no JSON")],
)
def test_aliases_that_are_none(tmp_path, aliases, message):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"aliases": aliases})
    with pytest.raises(ValueError, match=rf"a.safetensors is malformed.*{message}"):
        load_tensors(tmp_path / "a.safetensors")


def test_json_without_end_is_named(tmp_path):
    (tmp_path / "a.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match=r"a.json is malformed: it is nested too deeply"):
        load_json(tmp_path / "a.json")
