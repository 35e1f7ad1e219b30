"""Which weights of a language model are read, and what is found to be wrong before any of them are."""

import json
import shutil
from argparse import Namespace

import pytest
import torch
from language_models import NUM_TEXT, Hub, begun, language_model, text, write_gguf
from safetensors.torch import load_file, save_file
from torch import nn

from transfusion_pytorch import KLAutoencoder
from transfusion_pytorch.examples.language_models import write_random
from transfusion_pytorch.examples.pretrained import choose_language_model

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


def assert_same_logits(model, theirs, **close):
    with torch.no_grad():
        made = model.eval()(text(2, 9), return_loss=False)[..., :NUM_TEXT]
        torch.testing.assert_close(made, theirs(text(2, 9)).logits, **(dict(rtol=1e-4, atol=1e-4) | close))


def rewrite(folder, change):
    """Changes the dict of tensors of a folder with one file of weights."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# two tables or one


@pytest.mark.parametrize("is_folder", [False, True])
def test_tables_that_differ_are_not_tied_whatever_the_configuration_says(tmp_path, is_folder):
    theirs = source = language_model()
    theirs.config.tie_word_embeddings = True
    if is_folder:
        source = tmp_path
        theirs.config.tie_word_embeddings = False
        theirs.save_pretrained(tmp_path)
        set_config(tmp_path, tie_word_embeddings=True)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"ties lm_head\.weight to model\.embed_tokens\.weight, and the weights have"):
        model = begun(source)
    assert not model.tie_embeddings
    assert_same_logits(model, theirs)


@pytest.mark.parametrize("kept", [("model.embed_tokens.weight",), ("lm_head.weight",), "both"])
def test_tied_tables_are_read_under_either_name(tmp_path, kept):
    theirs = language_model("llama, tied")
    theirs.save_pretrained(tmp_path)

    def change(weights):
        table = weights.pop("model.embed_tokens.weight")
        names = ("model.embed_tokens.weight", "lm_head.weight") if kept == "both" else kept
        weights |= {name: table.clone() for name in names}

    rewrite(tmp_path, change)
    model = begun(tmp_path)
    assert model.tie_embeddings
    assert_same_logits(model, theirs)


# names and files


def test_one_file_goes_before_the_index_of_an_earlier_model(tmp_path, monkeypatch):
    language_model().save_pretrained(tmp_path / "hub", max_shard_size="20KB")
    theirs = language_model(rms_norm_eps=1e-3)
    with torch.no_grad():
        theirs.lm_head.weight.mul_(2)
    theirs.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "hub")
    set_config(tmp_path / "hub", rms_norm_eps=1e-3)
    assert_same_logits(begun(tmp_path / "hub"), theirs)
    hub = Hub(tmp_path / "hub", tmp_path / "downloads", monkeypatch)
    assert_same_logits(begun("someone/model"), theirs)
    assert hub.weights == ["model.safetensors"]
    for shard in (tmp_path / "hub").glob("model-*"):
        shard.unlink()
    assert_same_logits(begun(tmp_path / "hub"), theirs)


def test_a_decoder_that_was_saved_alone_is_read_where_its_tables_are_tied(tmp_path):
    theirs = language_model("llama, tied")
    theirs.model.save_pretrained(tmp_path)
    assert "norm.weight" in load_file(tmp_path / "model.safetensors")
    assert_same_logits(begun(tmp_path), theirs)
    language_model().model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 1 weights, the first being lm_head\.weight"):
        begun(tmp_path)


def test_weights_without_a_place_are_refused_in_a_module_and_named_in_a_file(tmp_path):
    theirs = language_model()
    theirs.save_pretrained(tmp_path)
    theirs.lm_head = nn.Linear(48, NUM_TEXT)
    with pytest.raises(ValueError, match=r"has no place for 1 weights, such as lm_head\.bias: .* another without them"):
        begun(theirs)
    rewrite(tmp_path, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    begun(tmp_path)  # in older files: no weight
    rewrite(tmp_path, lambda weights: weights.update({"lm_head.bias": torch.ones(NUM_TEXT)}))
    with pytest.warns(UserWarning, match=r"has no place for 1 weights, such as lm_head\.bias: they are left out"):
        model = begun(tmp_path)
    assert_same_logits(model, language_model())


@pytest.mark.parametrize("is_folder", [False, True])
def test_tables_of_other_sizes_are_refused(tmp_path, is_folder):
    theirs = language_model()
    theirs.lm_head = nn.Linear(48, NUM_TEXT + 6, bias=False)
    if is_folder:
        theirs.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"lm_head\.weight has the shape \(70, 48\), and its configuration makes it \(64"
    ):
        begun(tmp_path if is_folder else theirs)


def test_types_are_those_of_the_embedding_in_modules_and_folders(tmp_path):
    theirs = language_model().bfloat16()
    theirs.model.norm.float()
    theirs.save_pretrained(tmp_path)
    for source in (theirs, tmp_path):
        assert {parameter.dtype for parameter in begun(source).parameters()} == {torch.bfloat16}


# what is found before weights are read


WRONG = {
    "channels of the autoencoder": dict(dim_latent=(8, 3), modality_encoder=True),
    "ids of the tokenizer": dict(tokenizer=True),
    "text that is frozen and tied": dict(freeze_text=True),
    "a keyword that is none": dict(nonsense=1),
    "a time conditioning that is none": dict(time_conditioning="foo"),
}


def wrong_options(wrong):
    options = dict(WRONG[wrong])
    if "modality_encoder" in options:
        autoencoder = KLAutoencoder(4, channels=3)
        options |= dict(
            modality_encoder=(autoencoder.encoder, None),
            modality_decoder=(autoencoder.decoder, None),
            channel_first_latent=(True, False),
        )
    if "tokenizer" in options:
        words = {str(i): i for i in range(NUM_TEXT + 6)}
        options["tokenizer"] = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    return options


@pytest.mark.parametrize("wrong", WRONG)
def test_nothing_large_is_downloaded_where_anything_is_wrong(tmp_path, monkeypatch, wrong):
    language_model().save_pretrained(tmp_path / "hub")
    hub = Hub(tmp_path / "hub", tmp_path / "downloads", monkeypatch)
    with pytest.raises((ValueError, TypeError)) as error:
        begun("someone/model", **wrong_options(wrong))
    assert not hub.weights, error.value


@pytest.mark.parametrize("wrong", WRONG)
def test_a_gguf_file_is_not_loaded_where_anything_is_wrong(tmp_path, monkeypatch, wrong):
    write_gguf(language_model(), tmp_path / "tiny.gguf")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *args, **options: 1 / 0)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    options = dict(tokenizer=tokenizer) | wrong_options(wrong)
    with pytest.raises((ValueError, TypeError)):
        begun(tmp_path, gguf_file="tiny.gguf", **options)
    with pytest.raises(ZeroDivisionError):
        begun(tmp_path, gguf_file="tiny.gguf", tokenizer=tokenizer)


def test_scripts_check_a_language_model_before_its_weights_are_downloaded(tmp_path, monkeypatch):
    write_random(tmp_path / "hub")
    path = tmp_path / "hub" / "chat_template.jinja"
    template = path.read_text()
    hub = Hub(tmp_path / "hub", tmp_path / "downloads", monkeypatch)
    arguments = Namespace(model="someone/model", train="experts")
    for wrong, message in (("{% for %}", "the chat template is no Jinja"), (None, "no tokenizer with a chat template")):
        shutil.rmtree(hub.downloads, ignore_errors=True)
        path.unlink() if wrong is None else path.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            choose_language_model(arguments)
        assert not hub.weights
    path.write_text(template)
    assert choose_language_model(arguments).dim == 64
    assert hub.weights == ["model.safetensors"]


def test_weights_are_not_loaded_to_nowhere():
    theirs = language_model()
    with torch.device("meta"), pytest.raises(ValueError, match=r"cannot be loaded inside of torch\.device\(.meta.\)"):
        begun(theirs)


# configurations


LONGROPE = dict(
    rope_type="longrope",
    rope_theta=10_000.0,
    short_factor=[1.0, 1.5, 2.0, 2.5],
    long_factor=[4.0] * 4,
    original_max_position_embeddings=32,
)


@pytest.mark.parametrize(
    ("rotary", "bound"), [(dict(rope_type="dynamic", rope_theta=10_000.0, factor=4.0), 128), (LONGROPE, 32)]
)
@torch.no_grad()
def test_rotary_positions_that_change_in_long_samples_are_exact_in_short_ones(rotary, bound):
    theirs = language_model(rope_parameters=rotary)
    with pytest.warns(UserWarning, match=f"those of transformers in samples of up to {bound} positions"):
        model = begun(theirs).eval()
    for length, is_same in ((bound, True), (bound + 20, False)):
        ids = text(1, length)
        made, expected = model(ids, return_loss=False)[..., :NUM_TEXT], theirs(ids).logits
        assert torch.allclose(made, expected, rtol=1e-4, atol=1e-4) == is_same


def test_configurations_that_say_the_same_in_other_words():
    assert_same_logits(begun(language_model(hidden_act="swish")), language_model())
    window = dict(use_sliding_window=True, sliding_window=4, max_window_layers=28)
    theirs = language_model("qwen2", **window)
    assert_same_logits(begun(theirs), theirs)


@pytest.mark.parametrize("is_folder", [False, True])
def test_the_id_that_ends_text_may_be_that_of_generation(tmp_path, is_folder):
    theirs = language_model(eos_token_id=None)
    theirs.generation_config.eos_token_id = [7, 8]
    if is_folder:
        theirs.save_pretrained(tmp_path)
    assert begun(tmp_path if is_folder else theirs).eos_id == 7
