"""What goes beside a model: its card, its tokenizer, the hub, adapters; and models that are split over processes."""

import re
import warnings
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from checks import TYPECHECK
from huggingface_hub.errors import RepositoryNotFoundError
from test_saving_pretrained import Named, Scale, assert_same
from test_training_distributed import in_two, shard
from tiny import awake, ragged_batch, tiny
from torch import nn, tensor
from torch.nn.parallel import DistributedDataParallel

from transfusion_pytorch import ModelCard, Transfusion
from transfusion_pytorch.saving.card import MARK
from transfusion_pytorch.saving.files import load_tensors

# the card


def card_of(folder) -> tuple[dict, str]:
    """What is in YAML, and the rest."""
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_card_says_what_it_is_told(tmp_path):
    card = ModelCard(
        title="Digits",
        description="Draws digits.",
        training_data="1,500 handwritten digits",
        steps=12_000,
        figures={"drawn as asked": "100%", "nats": 0.0431234567, "seeds": 3, "a|b": torch.ones(1)},
        license="mit",
        tags=["digits", "transfusion"],
        datasets=["mnist"],
        language=["en"],
    )
    tiny(modality_default_shape=((4, 6), ())).save_pretrained(tmp_path, card=card)
    head, text = card_of(tmp_path)
    assert head == dict(
        library_name="transfusion_pytorch",
        license="mit",
        pipeline_tag="any-to-any",
        tags=["transfusion", "flow-matching", "digits"],
        datasets=["mnist"],
        language=["en"],
    )
    for line in (
        "# Digits",
        "Draws digits.",
        "1,500 handwritten digits",
        "Optimizer steps: 12,000",
        "| drawn as asked | 100% |",
        "| nats | 0.0431235 |",
        "| seeds | 3 |",
        "| a\\|b | 1 |",
        "| modality 0 | 3 channels, default shape (4, 6) |",
        "| modality 1 | 2 channels, default shape () |",
        "| transformer | dim 16, depth 2, heads 2 |",
    ):
        assert line in text.splitlines(), line


def test_the_code_of_the_card_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny().eval().save_pretrained("model")
    [code] = re.findall(r"```python\n(.*?)```", (tmp_path / "model" / "README.md").read_text(), flags=re.DOTALL)
    names = {}
    exec(code.replace("512", "8"), names)
    assert names["sample"][0][0] == names["model"].sos_id
    Named(num_text_tokens=1, dim_latent=3, modality_encoder=Scale(), transformer=dict(dim=8, depth=1)).save_pretrained(
        "own"
    )
    text = (tmp_path / "own" / "README.md").read_text()
    assert f"from {Named.__module__} import Named" in text
    assert "Named.from_pretrained('own', modality_encoder=...)" in text
    assert f"# - modality_encoder of modality 0: {Named.__module__}.Scale" in text


def test_a_readme_of_somebody_else_stays(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, card=ModelCard(title="Second"))
    assert "# Second" in (tmp_path / "README.md").read_text()
    own = (tmp_path / "README.md").read_text().replace(MARK, "") + "My words."
    (tmp_path / "README.md").write_text(own)
    model.save_pretrained(tmp_path, card=ModelCard(title="Third"))
    assert (tmp_path / "README.md").read_text() == own


def test_wrong_cards_are_refused():
    with pytest.raises(TypeError, match="tags must be a list of strings, got the string 'one'"):
        ModelCard(tags="one")
    with pytest.raises(TypeError):
        ModelCard(figures=[1])


# the tokenizer


def words(count: int = 8):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"w{i}": i for i in range(count)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return made


def test_a_tokenizer_travels_along(tmp_path):
    model = tiny()
    assert model.tokenizer is None
    model.save_pretrained(tmp_path / "a", tokenizer=words())
    loaded = Transfusion.from_pretrained(tmp_path / "a")
    assert loaded.tokenizer.encode("w3 w1").ids == [3, 1]
    loaded.save_pretrained(tmp_path / "b")
    Transfusion.from_pretrained(tmp_path / "b").save_pretrained(tmp_path / "c")  # which nobody has looked at
    assert Transfusion.from_pretrained(tmp_path / "c").tokenizer.encode("w7").ids == [7]
    loaded.tokenizer = words(3)
    loaded.save_pretrained(tmp_path / "d")
    assert Transfusion.from_pretrained(tmp_path / "d").tokenizer.get_vocab_size() == 3
    fast = SimpleNamespace(backend_tokenizer=words(4))  # as those of transformers are
    model.save_pretrained(tmp_path / "e", tokenizer=fast)
    assert Transfusion.from_pretrained(tmp_path / "e").tokenizer.get_vocab_size() == 4


def test_tokenizers_that_do_not_fit(tmp_path, monkeypatch):
    model = tiny()
    with pytest.raises(ValueError, match="the tokenizer has 11 ids and the model num_text_tokens=10"):
        model.save_pretrained(tmp_path, tokenizer=words(11))
    with pytest.raises(
        TypeError, match=r"must be a tokenizers\.Tokenizer or a fast tokenizer of transformers, got list"
    ):
        model.save_pretrained(tmp_path, tokenizer=[1])
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(words(11).to_str())
    loaded = Transfusion.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.json of .* has 11 ids, and the model num_text_tokens=10"):
        loaded.tokenizer  # noqa: B018
    (tmp_path / "tokenizer.json").write_text("{}")
    loaded = Transfusion.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.json of .* is no tokenizer"):
        loaded.tokenizer  # noqa: B018
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install \"transfusion-pytorch\[tokenizers\]\""):
        loaded.tokenizer  # noqa: B018


# the hub


def test_a_repository_is_downloaded(tmp_path, monkeypatch):
    model = awake(tiny())
    model.save_pretrained(tmp_path)
    calls = []

    def download(repo_id, **options):
        calls.append((repo_id, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    options = dict(revision="v1", token="secret", cache_dir="c", force_download=True, local_files_only=False)
    loaded = Transfusion.from_pretrained("someone/model", **options)
    [(name, given)] = calls
    assert name == "someone/model" == loaded.name_or_path
    assert options.items() <= given.items()
    tokenizer = ["tokenizer.json", "chat_template.jinja", "tokenizer_config.json"]
    assert given["allow_patterns"] == ["config.json", "model.safetensors", *tokenizer, "README.md"]
    assert_same(model, loaded, ragged_batch())


def test_repositories_that_are_not_there(tmp_path, monkeypatch):
    message = "'someone/model' is no folder here, and no model could be had from the Hugging Face hub"
    with pytest.raises(FileNotFoundError, match=message):
        Transfusion.from_pretrained("someone/model", local_files_only=True, cache_dir=tmp_path)

    def fails(error):
        def download(*args, **options):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    response = SimpleNamespace(status_code=404, headers={}, request=None)
    absent = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    Exception.__init__(absent, "404")
    absent.response = response
    fails(absent)
    with pytest.raises(FileNotFoundError, match=message):
        Transfusion.from_pretrained("someone/model")
    fails(ConnectionError("no route"))
    with pytest.raises(OSError, match=f"{message} under that name: no route") as error:
        Transfusion.from_pretrained("someone/model")
    assert not isinstance(error.value, FileNotFoundError)
    if not TYPECHECK:
        with pytest.raises(TypeError, match="expected a folder or the id of a repository, got int"):
            Transfusion.from_pretrained(3)


class Hub:
    """Stands in for `HfApi`: keeps what it is asked for, and what was uploaded."""

    readme: str | None = None
    calls: list

    def __init__(self, token=None, **options):
        Hub.calls = [("token", token)]

    def create_repo(self, repo_id, **options):
        Hub.calls.append(("create_repo", repo_id, options))
        return SimpleNamespace(repo_id=f"someone/{repo_id}")

    def file_exists(self, repo_id, name, *, revision=None):
        assert name == "README.md"
        return self.readme is not None

    def hf_hub_download(self, repo_id, name, *, revision=None):
        return self.readme

    def upload_folder(self, *, folder_path, ignore_patterns, **options):
        files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        kept = {name: content for name, content in files.items() if name not in (ignore_patterns or [])}
        Hub.calls.append(("upload_folder", options, kept))
        return SimpleNamespace(commit_url="https://hub/commit/1")


def test_a_model_is_pushed(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    model = awake(tiny())
    address = model.push_to_hub(
        "digits", private=True, token="secret", commit_message="First", card=ModelCard("Digits")
    )
    assert address == "https://hub/commit/1"
    token, created, (_, options, files) = Hub.calls
    assert token == ("token", "secret")
    assert created == ("create_repo", "digits", dict(private=True, exist_ok=True))
    assert options == dict(repo_id="someone/digits", commit_message="First", revision=None, create_pr=False)
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert "Transfusion.from_pretrained('digits')" in files["README.md"].decode()
    assert_same(model, Transfusion.from_pretrained(tmp_path), ragged_batch())

    (tmp_path / "README.md").write_text("By hand.")
    monkeypatch.setattr(Hub, "readme", str(tmp_path / "README.md"))
    model.push_to_hub("digits")
    assert sorted(Hub.calls[-1][2]) == ["config.json", "model.safetensors"]
    (tmp_path / "README.md").write_text(f"Ours. {MARK}")
    model.push_to_hub("digits")
    assert "README.md" in Hub.calls[-1][2]


# adapters


def test_an_adapter_is_saved_and_loaded_by_itself(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        peft = pytest.importorskip("peft")
    awake(tiny()).float().save_pretrained(tmp_path / "base")
    base = Transfusion.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["to_qkv", "to_logits"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 40_000
    assert peft.PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == str(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(Transfusion.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    batch, losses = ragged_batch(), []
    for model in (adapted, loaded.eval(), Transfusion.from_pretrained(tmp_path / "base")):
        torch.manual_seed(0)
        losses.append(model(batch))
    assert torch.equal(losses[0], losses[1])
    assert not torch.allclose(losses[1], losses[2], rtol=1e-3)
    with pytest.raises(TypeError, match=r"the model carries a LoRA adapter .* merge_and_unload"):
        adapted.base_model.model.save_pretrained(tmp_path / "both")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert_same(merged, Transfusion.from_pretrained(tmp_path / "merged"), batch)


def test_quantised_weights_are_refused(tmp_path):
    model = tiny()

    class Packed(torch.Tensor): ...

    model.to_logits.weight = nn.Parameter(model.to_logits.weight.detach().as_subclass(Packed), requires_grad=False)
    with pytest.raises(TypeError, match=r"to_logits\.weight is of type .*; quantise a model after it is loaded"):
        model.save_pretrained(tmp_path)


# several processes


def fitted_share(rank):
    torch.manual_seed(rank)
    model = tiny()
    data = [[[(1, torch.randn(3 + 4 * rank, 2) * 5 + rank)]] for _ in range(2 + rank)]
    model.fit_latent_statistics(data)
    wrapped = DistributedDataParallel(awake(model, 0.0).float().train())
    wrapped([[tensor([1, 2]), (1, torch.randn(4, 2))]]).backward()
    if rank == 0:  # alone, in evaluation, nobody is waited for
        with torch.no_grad():
            wrapped.eval()([[tensor([1, 2]), (1, torch.randn(4, 2))]])
    statistics = model.modalities[1].statistics
    return [each[0][0][1] for each in data], statistics.mean, statistics.std


@pytest.mark.slow
def test_all_processes_have_the_statistics_of_all_data(tmp_path):
    made = in_two(fitted_share, tmp_path)
    data = torch.cat([part for parts, _, _ in made for part in parts])
    for _, mean, std in made:
        torch.testing.assert_close(mean, data.mean(dim=0))
        torch.testing.assert_close(std, data.std(dim=0, correction=0))
        assert torch.equal(mean, made[0][1])


def sharded_and_saved(rank):
    torch.manual_seed(0)
    model = awake(tiny())
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    shard(model)
    model.save_pretrained("sharded" if rank == 0 else "sharded-too")
    return whole


@pytest.mark.slow
def test_a_sharded_model_is_saved_whole_by_one_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole, _ = in_two(sharded_and_saved, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("sharded*")) == ["sharded"]
    saved = load_tensors(tmp_path / "sharded" / "model.safetensors")
    assert saved.keys() == whole.keys()
    assert all(torch.equal(saved[name], value) for name, value in whole.items())
    Transfusion.from_pretrained(tmp_path / "sharded")


def test_a_tokenizer_of_an_older_model_does_not_stay(tmp_path):
    model = tiny(num_text_tokens=10)
    model.save_pretrained(tmp_path, tokenizer=words())
    model.save_pretrained(tmp_path)
    assert Transfusion.from_pretrained(tmp_path).tokenizer is None
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text("theirs")  # of a folder that is not one of ours
    model.save_pretrained(other)
    assert (other / "tokenizer.json").read_text() == "theirs"
