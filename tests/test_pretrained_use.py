"""Models that begin with a language model: files, samples, times, and what of them is trained."""

import copy
import json
import shutil
import sys

import pytest
import torch
from checks import no_typecheck
from language_models import EOS, NUM_TEXT, Hub, begun, image, language_model, text, write_gguf
from tiny import awake

from transfusion_pytorch import Condition, TextToken, TrainConfig, Trainer, Transfusion, language_model_dim

transformers = pytest.importorskip("transformers")

TIMES = ["norms", "added", "token", "output"]


# files


@pytest.mark.parametrize(
    ("family", "shard", "dtype"),
    [
        ("llama, tied", "5GB", torch.float32),
        ("llama, llama3", "20KB", torch.float32),
        ("qwen2", "20KB", torch.bfloat16),
        ("qwen3", "5GB", torch.bfloat16),
    ],
)
def test_a_folder_is_read_as_the_module_is(tmp_path, family, shard, dtype):
    theirs = language_model(family).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    weights, expected = begun(tmp_path).state_dict(), begun(theirs).state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name
        assert weight.dtype == dtype
    assert language_model_dim(tmp_path) == language_model_dim(theirs) == begun(theirs).dim


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_of_a_repository_only_what_is_read_is_downloaded(tmp_path, monkeypatch, shard):
    theirs = language_model("llama, tied")
    theirs.save_pretrained(tmp_path / "hub", max_shard_size=shard)
    expected = sorted(file.name for file in (tmp_path / "hub").glob("*.safetensors"))
    shutil.copy(tmp_path / "hub" / expected[0], tmp_path / "hub" / "consolidated.safetensors")  # the same once more
    hub = Hub(tmp_path / "hub", tmp_path / "downloads", monkeypatch)
    weights = begun("someone/model").state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in begun(theirs).state_dict().items())
    assert hub.weights == expected


def test_nothing_large_is_downloaded_of_another_architecture(tmp_path, monkeypatch):
    language_model().save_pretrained(tmp_path / "hub")
    path = tmp_path / "hub" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(model_type="gpt2")))
    hub = Hub(tmp_path / "hub", tmp_path / "downloads", monkeypatch)
    with pytest.raises(ValueError, match="of type 'gpt2' cannot be the trunk"):
        begun("someone/model")
    assert not hub.weights
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: 1 / 0)
    with pytest.raises(FileNotFoundError, match=r"'someone/model' is no folder here, and a language model could not"):
        begun("someone/model")


def test_a_tokenizer_is_made_of_what_there_is(tmp_path):
    theirs = language_model("qwen2")
    theirs.save_pretrained(tmp_path)
    assert begun(tmp_path).tokenizer is None
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(["a", "b", "ab", "<s>"])}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="Qwen2Tokenizer")))
    assert begun(tmp_path).tokenizer.encode("abb").tolist() == [2, 1]
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match=r"no fast tokenizer of tokenizer\.model .*hand one over with tokenizer="):
        assert begun(tmp_path).tokenizer is None


def test_a_gguf_file_is_read(tmp_path):
    theirs = language_model()
    write_gguf(theirs, tmp_path / "tiny.gguf")
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    model = begun(tmp_path, gguf_file="tiny.gguf", tokenizer=tokenizer)
    with torch.no_grad():
        made = model(text(2, 9), return_loss=False)[..., :NUM_TEXT]
        torch.testing.assert_close(made, theirs(text(2, 9)).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(FileNotFoundError, match=r"has no file other\.gguf, which gguf_file names"):
        begun(tmp_path, gguf_file="other.gguf")


@pytest.mark.parametrize(
    ("time", "family"), list(zip(TIMES, ["llama, llama3", "qwen2", "qwen3", "llama, tied"], strict=True))
)
@pytest.mark.parametrize("untied", [False, True])
def test_models_are_saved_and_loaded(tmp_path, time, family, untied):
    model = awake(begun(language_model(family), time_conditioning=time, untied=untied))
    model.save_pretrained(tmp_path)
    loaded = Transfusion.from_pretrained(tmp_path)
    assert loaded.vocabulary == model.vocabulary
    sample = [[text(4), image(), text(2), (1, torch.ones(3, 3))]]
    for times in (0.0, 0.7):
        options = dict(times=times, return_loss=False, noise={0: torch.ones(6, 4), 1: torch.ones(3, 3)})
        assert torch.equal(loaded(sample, **options), model(sample, **options))


def test_tied_rows_stay_tied(tmp_path):
    begun(language_model("llama, tied")).save_pretrained(tmp_path)
    loaded = Transfusion.from_pretrained(tmp_path)
    trunk = dict(dim=48, depth=1, norm="rms")
    with torch.device("meta"):
        blank = Transfusion(**loaded.constructor_arguments() | dict(transformer=trunk))
    blank.to_empty(device="cpu").reset_parameters()
    for model in (loaded, copy.deepcopy(loaded), blank):
        before = model.to_logits(torch.ones(1, 48)).detach()
        with torch.no_grad():
            model.text_embedding.text.weight.add_(1.0)
            model.text_embedding.markers.weight.add_(1.0)
        torch.testing.assert_close(model.to_logits(torch.ones(1, 48)), before + 48)


# samples


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("time", TIMES)
def test_a_cache_changes_nothing(time, untied):
    model = awake(begun(language_model(), time_conditioning=time, untied=untied))
    prompts = [[text(4), image()], [text(6)], None, [image(3), text(2), (1, torch.ones(2, 3))]]
    options = dict(max_length=60, cfg_scale=2.0, modality_steps=2, force_modality_at_start=1)
    made = [
        model.sample_many(prompts, cache_kv=cache, generator=torch.Generator().manual_seed(3), **options)
        for cache in (True, False)
    ]
    for samples in zip(*made, strict=True):
        for parts in zip(*samples, strict=True):
            cached, uncached = (part if torch.is_tensor(part) else part[1] for part in parts)
            torch.testing.assert_close(cached, uncached)


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("untied", [False, True])
def test_a_batch_is_its_samples(time, untied):
    model = awake(begun(language_model(), time_conditioning=time, untied=untied))
    samples = [[text(4), image(), text(3)], [text(9)], [image(1), (1, torch.ones(3, 3))], [(1, torch.ones(2, 3))]]
    whole = model(samples, return_loss=False)
    for row, sample in zip(whole, samples, strict=True):
        [alone] = model([sample], return_loss=False)
        torch.testing.assert_close(row[: len(alone)], alone)


def seeded():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("time", TIMES)
def test_modalities_of_one_size_are_drawn_together(time):
    model = awake(begun(language_model(), time_conditioning=time, untied=True))
    options = [dict(force_modality_at_start=(0, (2, 3))), dict(force_modality_at_start=(1, (6,)))]
    engine = model.create_engine()
    given = dict(max_length=12, modality_steps=2, cfg_scale=1.0, listen=False)
    requests = [engine.submit(None, generator=seeded(), **given, **each) for each in options]
    while not engine.is_idle:
        engine.step()
    for request, each in zip(requests, options, strict=True):
        alone = model.sample(None, max_length=12, modality_steps=2, cfg_scale=1.0, generator=seeded(), **each)
        torch.testing.assert_close(request.result()[1][1], alone[1][1])


def test_text_is_as_the_tokenizer_makes_it():
    """No sos in front of text, and the eos of the language model behind it, once."""
    model = begun(language_model())
    pack = model.packer()
    end = torch.tensor([EOS])

    def tokens(*sample):
        return pack([list(sample)]).stream.token.tolist()

    words = text(3)
    assert tokens(words) == [*words.tolist(), EOS]
    assert tokens(torch.cat((words, end))) == [*words.tolist(), EOS]
    assert tokens(torch.cat((end, words))) == [EOS, *words.tolist(), EOS]
    assert tokens(Condition(words), end) == [*words.tolist(), EOS]
    assert tokens((1, torch.ones(3, 3)))[0] == model.sos_id
    assert pack(words[None]).stream.token.tolist() == words.tolist()


def test_its_own_id_ends_a_sample():
    model = awake(begun(language_model()))
    model.to_logits.register_forward_hook(lambda _, args, logits: logits.index_fill(-1, torch.tensor([EOS]), 1000.0))
    sample = model.sample(text(4), max_length=20, text_temperature=0.0)
    assert sample[0].tolist() == [*text(4).tolist(), EOS]
    assert sample.reason.value == "eos"
    # plain text of a given length goes on
    assert model.generate_text_only(text(1, 4), 8, temperature=0.0).tolist() == [[EOS] * 4]


def test_a_sample_that_began_from_nothing_is_a_prompt_and_a_sample():
    model = awake(begun(language_model()))
    options = dict(text_temperature=0.0, allowed_modalities=())
    short, long = (model.sample(None, max_length=most, **options) for most in (8, 16))
    assert short[0][0] == model.sos_id
    again = model.sample(list(short), max_length=16, **options)
    assert again[0].tolist() == long[0].tolist()
    packed = model.packer()([list(short)]).stream.token.tolist()
    assert packed[: len(short[0])] == short[0].tolist()


def test_the_end_of_text_is_no_caption_and_no_event():
    model = begun(language_model()).eval()
    end = torch.tensor([EOS])
    for sample, is_captioned in (([image()], False), ([image(), end], False), ([image(), text(2)], True)):
        assert model.packer()([sample]).stream.spans.is_captioned.tolist() == [is_captioned]
    events = list(model.sample_stream([text(2)], plan=[0], modality_steps=1, max_length=40))
    assert events[-1].sample[-1][-1] == EOS
    assert not [event for event in events if isinstance(event, TextToken)]


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("untied", [False, True, ["norms"]])
def test_padded_text_is_read_as_it_is(time, untied):
    model = awake(begun(language_model(), time_conditioning=time, untied=untied))
    batch = [[text(7)], [text(5, seed=1)]]
    padded = model.packer(token_budget=64)(batch)
    torch.testing.assert_close(model(padded, return_loss=False), model(batch, return_loss=False))


def test_batches_of_models_with_other_times_are_refused():
    batch = begun(language_model()).packer()([[text(3), image()]])
    with pytest.raises(ValueError, match="packed"):
        begun(language_model(), time_conditioning="token")(batch)


def test_markers_are_never_written_in_plain_text():
    model = awake(begun(language_model()))
    with torch.no_grad():
        model.to_logits.markers.weight.mul_(1000)
    written = model.generate_text_only(text(2, 4), 30)
    assert written.shape == (2, 26)
    assert (written < NUM_TEXT).all()


# times


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("time", TIMES)
def test_spans_are_told_their_time(time, untied):
    model = awake(begun(language_model(), time_conditioning=time, untied=untied))
    hidden, sample = [], [[text(3), image()]]
    model.modalities[0].adapter.to_latent.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    for t in (0.2, 0.7):
        model(sample, times=t, noise=image().flatten(0, 1))  # the noise is the image: only the time differs
    assert not torch.allclose(*hidden)


@pytest.mark.parametrize("time", ["norms", "added", "output"])
def test_a_new_model_begins_as_its_language_model(time):
    """Nothing but a time token changes what the trunk makes of latents before anything is learned."""
    model, hidden = begun(language_model(), time_conditioning=time).eval(), []
    model.modalities[0].adapter.to_latent.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    for t in (0.2, 0.7):
        model([[text(3), image(), text(2)]], times=t, noise=image().flatten(0, 1))
    torch.testing.assert_close(*hidden)


def test_a_time_token_is_one_more_token():
    lengths = {}
    for time in ("added", "token"):
        model = begun(language_model(), time_conditioning=time)
        lengths[time] = len(model.packer()([[text(3), image(), (1, torch.ones(3, 3)), text(1)]]).stream.token)
    assert lengths["token"] == lengths["added"] + 2


# what is trained


@pytest.mark.parametrize("family", ["llama", "llama, tied"])
@pytest.mark.parametrize("time", ["norms", "added"])
def test_frozen_text_stays_the_same_to_the_bit(family, time):
    model = begun(language_model(family), untied=True, freeze_text=True, time_conditioning=time)
    batch = text(2, 20)
    before, written = model(batch, return_loss=False).detach(), model.generate_text_only(batch, 30, temperature=0.0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    names = {}
    for _ in range(3):
        optimizer.zero_grad()
        model([[text(4), image(), text(3)], [(1, torch.ones(3, 3)), text(2)], [text(5)]]).backward()
        names = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        optimizer.step()
    after = model(batch, return_loss=False).detach()
    assert torch.equal(after[..., :NUM_TEXT], before[..., :NUM_TEXT])
    assert not torch.equal(after[..., NUM_TEXT:], before[..., NUM_TEXT:])
    assert torch.equal(model.generate_text_only(batch, 30, temperature=0.0), written)
    assert {name.split(".")[4] for name in names if name.startswith("transformer.layers")} == {"1", "2"}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == names


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", ["llama", "llama, tied"])
def test_frozen_text_is_loaded_frozen(tmp_path, family):
    model = begun(language_model(family), untied=True, freeze_text=True)
    every = {name for name, _ in model.named_parameters()}
    model.save_pretrained(tmp_path)
    loaded = Transfusion.from_pretrained(tmp_path, dtype=torch.float64)
    assert trained_names(loaded) == trained_names(copy.deepcopy(loaded)) == trained_names(model) < every
    assert trained_names(Transfusion.from_pretrained(tmp_path, freeze_text=False)) == every
    loaded.unfreeze_text()
    assert trained_names(loaded) == every
    loaded.save_pretrained(tmp_path)
    assert trained_names(Transfusion.from_pretrained(tmp_path)) == every


@pytest.mark.parametrize("options", [{}, dict(untied=True, freeze_text=True), dict(untied=["feedforward"])])
def test_runs_with_shared_weights_go_on_where_they_stopped(tmp_path, options):
    data = [[text(5), image()], [text(6)]] * 8
    config = TrainConfig(steps=4, batch_size=4, save_every=2, ema_beta=None, validate_every=0, sample_every=0)

    def run():
        return Trainer(begun(language_model("llama, tied"), **options), data, config, folder=tmp_path)

    whole = run()
    whole.fit()
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000004")
    resumed = run()
    resumed.fit(resume=True)
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, whole.model.get_parameter(name)), name


def test_text_that_shares_its_layers_cannot_be_frozen():
    with pytest.raises(ValueError, match="build the transformer with untied=True"):
        begun(language_model(), freeze_text=True)
    with pytest.raises(ValueError, match="build the transformer with untied=True"):
        begun(language_model(), untied=["attention"]).freeze_text()


# errors


def test_other_architectures_are_refused(tmp_path):
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=10)
    with pytest.raises(ValueError, match=r"of type 'gpt2' cannot be the trunk; supported are llama, qwen2, qwen3"):
        begun(transformers.GPT2LMHeadModel(config))
    config.save_pretrained(tmp_path)  # without a weight: nothing large is read before
    with pytest.raises(ValueError, match="of type 'gpt2'"):
        begun(tmp_path)
    with pytest.raises(ValueError, match="sliding windows are not supported"):
        begun(language_model("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=0))
    with pytest.raises(ValueError, match="rotary positions of type 'proportional' are not supported, only default, "):
        begun(language_model(rope_parameters=dict(rope_type="proportional", rope_theta=100.0)))
    with pytest.raises(ValueError, match="hidden_act 'silu'"):
        begun(language_model(hidden_act="gelu"))


@no_typecheck
def test_a_language_model_is_a_module_or_a_name():
    with pytest.raises(TypeError, match="a folder, or the id of a repository, got int"):
        begun(3)


def test_what_is_no_language_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        begun(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        begun(tmp_path)
    with pytest.raises(TypeError, match="hand over the causal language model, not its decoder alone"):
        begun(language_model().model)
    language_model().config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"from safetensors only; .* with its tokenizer \(tokenizer=\.\.\.\)"):
        begun(tmp_path)


def test_incomplete_files_are_refused(tmp_path):
    language_model().save_pretrained(tmp_path, max_shard_size="20KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    gone = index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    (tmp_path / gone).unlink()
    with pytest.raises(FileNotFoundError, match=f"names {gone}, which is not there"):
        begun(tmp_path)
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != gone}
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lacks \d+ weights, the first being model\.layers"):
        begun(tmp_path)


def test_weights_that_contradict_their_configuration_are_refused():
    theirs = language_model()
    theirs.config.intermediate_size = 72
    with pytest.raises(ValueError, match=r"up_proj\.weight has the shape \(80, 48\)"):
        begun(theirs)


def test_tokenizers_of_other_models_are_refused():
    tokenizers = pytest.importorskip("tokenizers")
    large = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(70)}, unk_token="0"))
    with pytest.raises(ValueError, match="the tokenizer has 70 ids, and the language model 64"):
        begun(language_model(), tokenizer=large)


def test_somebody_must_say_what_ends_text():
    theirs = language_model(eos_token_id=None)
    with pytest.raises(ValueError, match="hand over eos_id"):
        begun(theirs)
    assert begun(theirs, eos_id=7).eos_id == 7
    with pytest.raises(ValueError, match="eos_id must be an id of text, 0 to 63"):
        begun(theirs, eos_id=64)


def test_transformers_is_asked_for(monkeypatch):
    theirs = language_model()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"transfusion-pytorch\[pretrained\]"):
        begun(theirs)


def test_modalities_alone_have_no_tables_of_text():
    model = Transfusion(num_text_tokens=0, dim_latent=3, transformer=dict(dim=16, depth=1, untied=True))
    model(torch.randn(2, 4, 3), modality_type=0).backward()
    with pytest.raises(ValueError, match="tie_embeddings needs text"):
        Transfusion(num_text_tokens=0, dim_latent=3, tie_embeddings=True, transformer=dict(dim=16, depth=1))


@no_typecheck
def test_wrong_choices_are_refused_before_anything_is_loaded():
    theirs = language_model()
    for options, error, message in (
        (dict(num_experts=2), ValueError, "num_experts=2 are of untied weights"),
        (dict(num_experts=0, untied=True), ValueError, "num_experts is at least 2, text and one for modalities, got 0"),
        (dict(transformer=dict(depth=2)), ValueError, "transformer: the language model says that; leave it out"),
        (dict(gguf_file="x.gguf"), ValueError, "the language model is a module already"),
        (dict(dtype=torch.int32), TypeError, "dtype must be a floating point type"),
        (dict(eos_id=2.5), TypeError, "eos_id must be an int"),
    ):
        with pytest.raises(error, match=message):
            begun(theirs, **options)
    with pytest.raises(ValueError, match="meta device, without numbers"):
        begun(theirs.to("meta"))
    blank = Transfusion(num_text_tokens=0, dim_latent=3, transformer=dict(dim=16, depth=1, untied=True))
    with pytest.raises(ValueError, match="the model has no text"):
        blank.freeze_text()


def test_cut_off_files_are_named(tmp_path):
    language_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        begun(tmp_path)
