"""Models that are saved and loaded: the same bits, and errors that say what is wrong."""

import copy
import json
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy
import pytest
import torch
from checks import compiles
from tiny import CHANNELS, awake, ragged_batch, tiny
from torch import nn, tensor

from transfusion_pytorch import (
    TimePolicy,
    Transformer,
    Transfusion,
    UNetDown,
    UNetUp,
    register_component,
)
from transfusion_pytorch.saving.files import load_metadata, load_tensors, save_tensors

TRUNK = dict(dim=16, depth=2, heads=2, dim_head=8)


class Scale(nn.Module):
    """A user's own module, which only they can build."""

    def __init__(self, factor: nn.Parameter | None = None):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0)) if factor is None else factor

    def forward(self, x):
        return x * self.factor


@register_component(name="test.Shift", version=2)
class Shift(nn.Module):
    """A registered one, with a buffer that is not saved, and a tensor that is no buffer."""

    def __init__(self, channels: int, *, by: float = 0.5):
        super().__init__()
        self.shift = nn.Parameter(torch.full((channels,), by))
        self.register_buffer("ramp", torch.arange(channels) / 10, persistent=False)
        self.last = torch.tensor(1.5)

    def forward(self, x):
        return x + self.shift + self.ramp + self.last


class Trunk(Transformer):
    """A subclass, whose arguments are its own."""

    def __init__(self, *, width: int):
        super().__init__(width, depth=1, heads=2, dim_head=8)


class ListConfig(Sequence):
    """What configuration libraries have instead of lists."""

    def __init__(self, *items):
        self.items = items

    def __getitem__(self, index):
        return self.items[index]

    def __len__(self):
        return len(self.items)


def lower(text: str):
    return tuple(int(size) for size in text.split(","))


def unet(num_dim: int = 2):
    return UNetDown(3, 16, dim_hidden=8, num_dim=num_dim), UNetUp(3, 16, dim_hidden=8, num_dim=num_dim)


PICTURES = dict(dim_latent=3, modality_default_shape=(4, 4))
BUILT = {
    "default": lambda: tiny(),
    "trunk": lambda: tiny(
        transformer=Transformer(16, depth=3, heads=2, dim_head=8, kv_heads=1, num_residual_streams=2, dropout=0.3),
        time_policy=TimePolicy("logit_normal", mean=0.3, shift=2.0, prob_clean_captioned=0.2),
    ),
    "options": lambda: tiny(
        trunk=dict(attn_laser=True, use_value_residual=True, ff_kwargs=dict(activation="swiglu"), unet_skips=False),
        modality_default_shape=[(2, 3), None],
        modality_num_dim=(None, numpy.int64(0)),
        add_pos_emb=(True, None),
        flow_loss_weight=(0.5, 2.0),
        text_loss_weight=numpy.float64(0.3),
        model_output_clean=True,
        odeint_kwargs=dict(method="euler", atol=1e-3, rtol=1e-3, options=dict(dtype=torch.float64)),
        ignore_index=-7,
        prob_uncond=0.4,
        reconstruction_loss_weight=0.25,
        fallback_to_default_shape_if_invalid=True,
    ),
    "list-likes": lambda: Transfusion(
        num_text_tokens=10,
        dim_latent=ListConfig(3, 2),
        modality_default_shape=ListConfig(torch.Size([4, 4]), torch.Size([])),
        transformer=OrderedDict(TRUNK),
    ),
    "without text": lambda: Transfusion(num_text_tokens=0, **PICTURES, transformer=TRUNK),
    "one pair for two": lambda: Transfusion(
        num_text_tokens=10,
        dim_latent=(3, 3),
        modality_default_shape=(4, 4),
        pre_post_transformer_enc_dec=unet(),
        transformer=TRUNK,
    ),
    "component": lambda: Transfusion(num_text_tokens=10, **PICTURES, modality_encoder=Shift(3), transformer=TRUNK),
}


def batch_for(model: Transfusion, name: str) -> list:
    torch.manual_seed(5)
    if name in ("default", "trunk"):
        return ragged_batch()
    pictures = [torch.randn(4, 4, 3), torch.randn(4, 4, 3)]
    if not model.vocabulary.num_text:
        return [[picture] for picture in pictures]
    second = torch.randn(2, 4, 3) if name == "one pair for two" else torch.randn(CHANNELS[1])
    other = [(1, second)] if model.num_modalities == 2 else []
    return [[tensor([1, 2, 3]), pictures[0], *other], [pictures[1], tensor([4, 5])], [tensor([6, 7])]]


def values(model: Transfusion, batch: list) -> list[torch.Tensor]:
    """Logits, and losses with everything random, in the mode of the model."""
    torch.manual_seed(3)
    _, parts = model(batch, return_breakdown=True)
    return [model(batch, return_loss=False), *parts]


def assert_same(one: Transfusion, other: Transfusion, batch: list) -> None:
    for mode in (True, False):
        for a, b in zip(values(one.train(mode), batch), values(other.train(mode), batch), strict=True):
            assert torch.equal(a, b)
    state, copied = one.state_dict(), other.state_dict()
    assert list(state) == list(copied)
    assert all(torch.equal(state[name], copied[name]) and state[name].dtype == copied[name].dtype for name in state)


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def change(folder: Path, **entries) -> None:
    """Changes a configuration by hand."""
    (folder / "config.json").write_text(json.dumps(config_of(folder) | entries))


@pytest.fixture
def folder(tmp_path):
    """A saved model."""
    awake(tiny()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# the round trip


@pytest.mark.parametrize("name", BUILT)
def test_the_same_bits_come_back(name, tmp_path):
    model = awake(BUILT[name]())
    model.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    loaded = Transfusion.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert not loaded.training
    assert not any(module.training for module in loaded.modules())
    assert_same(model, loaded, batch_for(model, name))
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    assert loaded.time_policy == model.time_policy
    assert loaded.odeint_kwargs == model.odeint_kwargs
    assert loaded.prob_uncond == model.prob_uncond
    loaded.save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(tmp_path)
    sampled = [
        each.eval().sample(max_length=20, generator=torch.Generator().manual_seed(1)) for each in (model, loaded)
    ]
    assert repr(sampled[0]) == repr(sampled[1])


def test_tensors_that_are_not_saved_are_those_of_a_plain_model(tmp_path):
    model = awake(BUILT["component"]())
    model.save_pretrained(tmp_path)
    assert not any("ramp" in name for name in load_tensors(tmp_path / "model.safetensors"))
    loaded = Transfusion.from_pretrained(tmp_path)
    plain = dict(BUILT["component"]().named_buffers())
    assert plain.keys() == dict(loaded.named_buffers()).keys() != set()
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, plain[name]), name
    assert loaded.modalities[0].encoder.last == 1.5
    assert not any(each.is_meta for each in (*loaded.parameters(), *loaded.buffers()))


def test_the_configuration_is_readable(tmp_path):
    tiny(modality_default_shape=((2, 3), ())).save_pretrained(tmp_path)
    config = config_of(tmp_path)
    assert (config["library"], config["format_version"]) == ("transfusion_pytorch", 1)
    assert config["class"] == "transfusion_pytorch.transfusion.Transfusion"
    arguments = config["arguments"]
    assert arguments["dim_latent"] == list(CHANNELS)
    assert arguments["modality_default_shape"] == [[2, 3], []]
    assert arguments["channel_first_latent"] is False
    assert arguments["transformer"]["component"] == "Transformer"
    assert arguments["transformer"]["arguments"]["dim"] == 16
    assert arguments["time_policy"]["arguments"] == dict(
        distribution="uniform",
        mean=0.0,
        std=1.0,
        shift=1.0,
        noise_limit=0.0,
        prob_clean_captioned=0.5,
        concentration=1.5,
    )


def test_what_was_changed_later_is_what_is_saved(tmp_path):
    model = awake(tiny())
    model.prob_uncond, model.time_policy = 0.3, TimePolicy(0.25)
    model.odeint_kwargs["method"] = "euler"
    model.save_pretrained(tmp_path)
    loaded = Transfusion.from_pretrained(tmp_path, ignore_index=-5)
    assert (loaded.prob_uncond, loaded.time_policy, loaded.ignore_index) == (0.3, TimePolicy(0.25), -5)
    assert loaded.odeint_kwargs["method"] == "euler"


def test_arguments_are_copies_and_survive_deepcopy(tmp_path):
    given = dict(activation="swiglu")
    trunk = Transformer(16, depth=1, heads=2, dim_head=8, ff_kwargs=given)
    given["activation"] = "geglu"
    model = copy.deepcopy(copy.deepcopy(tiny(transformer=trunk)))
    model.save_pretrained(tmp_path)
    assert config_of(tmp_path)["arguments"]["transformer"]["arguments"]["ff_kwargs"] == dict(activation="swiglu")


def test_device_and_dtype(tmp_path, folder):
    model = Transfusion.from_pretrained(folder)
    half = Transfusion.from_pretrained(folder, device="cpu", dtype=torch.bfloat16)
    for name, parameter in half.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).bfloat16()), name
    half.save_pretrained(tmp_path / "half")
    again = Transfusion.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.bfloat16
    assert_same(half, again, ragged_batch())
    with pytest.raises(TypeError, match="dtype must be a floating point type"):
        Transfusion.from_pretrained(folder, dtype=torch.int8)
    with pytest.raises(ValueError, match="weights cannot be loaded to device 'meta'"):
        Transfusion.from_pretrained(folder, device="meta")


def test_an_average_is_a_plain_model(tmp_path):
    model = awake(tiny(), 0.1)
    ema = model.create_ema(beta=0.5, update_after_step=0, update_every=1)
    ema.update()
    awake(model)
    ema.update()
    ema.ema_model.save_pretrained(tmp_path / "ema")
    assert_same(ema.ema_model, Transfusion.from_pretrained(tmp_path / "ema"), ragged_batch())


@compiles
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside of the compiler
def test_a_compiled_model_is_a_plain_model(tmp_path):
    model = awake(tiny())
    model.transformer.attention = "dense"
    model.compile()
    torch.compile(model).save_pretrained(tmp_path)
    assert load_tensors(tmp_path / "model.safetensors").keys() == tiny().state_dict().keys()
    assert Transfusion.from_pretrained(tmp_path).transformer.compile_options is None


def test_home_and_existing_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = awake(tiny())
    model.save_pretrained("~/a/model")
    (tmp_path / "a" / "model" / "notes.txt").write_text("mine")
    awake(model)
    model.save_pretrained("~/a/model")
    assert_same(model, Transfusion.from_pretrained("~/a/model"), ragged_batch())
    found = sorted(path.name for path in (tmp_path / "a" / "model").iterdir())
    assert found == ["README.md", "config.json", "model.safetensors", "notes.txt"]
    assert load_metadata(tmp_path / "a" / "model" / "model.safetensors") == {"format": "pt"}


def test_a_link_is_replaced_and_not_followed(tmp_path, folder):
    """As folders of the hub's cache have them."""
    outside = tmp_path / "blob"
    outside.write_text("another model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(outside)
    tiny().save_pretrained(folder)
    assert outside.read_text() == "another model"
    Transfusion.from_pretrained(folder)


# a user's own modules


def autoencoded(**options) -> Transfusion:
    made = dict(
        modality_encoder=(Scale(), None),
        modality_decoder=(Scale(), None),
        to_modality_shape_fn=(None, lower),
    )
    return tiny(**made | options)


def test_own_modules_are_named_and_handed_over(tmp_path):
    model = awake(autoencoded())
    model.save_pretrained(tmp_path)
    arguments = config_of(tmp_path)["arguments"]
    assert arguments["modality_encoder"] == [{"module": f"{__name__}.Scale"}, None]
    assert arguments["to_modality_shape_fn"] == [None, {"module": f"{__name__}.lower"}]
    with pytest.raises(ValueError, match="names what only you can build") as error:
        Transfusion.from_pretrained(tmp_path, modality_decoder=Scale())
    assert str(error.value).splitlines()[1:] == [
        f"- modality_encoder of modality 0: {__name__}.Scale",
        f"- to_modality_shape_fn of modality 1: {__name__}.lower",
    ]
    assert "config.json" in str(error.value)
    assert "modality_encoder=..., to_modality_shape_fn=...)" in str(error.value)

    encoder = Scale()
    loaded = Transfusion.from_pretrained(
        tmp_path, modality_encoder=encoder, modality_decoder=[Scale(), None], to_modality_shape_fn=lower
    )
    assert loaded.modalities[0].encoder is encoder
    assert encoder.factor == model.modalities[0].encoder.factor != 2
    assert loaded.modalities[1].encoder is None
    assert loaded.modalities[1].spec.parse_shape("3") == (3,)
    assert_same(model, loaded, ragged_batch())


def test_an_own_trunk_and_an_own_pair(tmp_path):
    def pair():
        return nn.Linear(3, 16), nn.Linear(16, 3)

    options = dict(num_text_tokens=10, dim_latent=(3, 3), modality_default_shape=(2, 2))
    model = awake(Transfusion(transformer=Trunk(width=16), pre_post_transformer_enc_dec=pair(), **options))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names what only you can build") as error:
        Transfusion.from_pretrained(tmp_path)
    linear = "torch.nn.modules.linear.Linear"
    assert str(error.value).splitlines()[1:] == [
        f"- transformer: {__name__}.Trunk",
        f"- pre_post_transformer_enc_dec of modality 0: {linear} and {linear}",
        f"- pre_post_transformer_enc_dec of modality 1: {linear} and {linear}",
    ]
    assert "from_pretrained(..., transformer=..., pre_post_transformer_enc_dec=...)" in str(error.value)
    batch = [[torch.randn(2, 2, 3), tensor([1, 2]), (1, torch.randn(2, 2, 3))]]
    for given in (pair(), [pair(), pair()]):
        loaded = Transfusion.from_pretrained(tmp_path, transformer=Trunk(width=16), pre_post_transformer_enc_dec=given)
        assert_same(model, loaded, batch)
    with pytest.raises(ValueError, match="of modality 1: ") as error:
        Transfusion.from_pretrained(tmp_path, transformer=Trunk(width=16), pre_post_transformer_enc_dec=[pair(), None])
    assert "modality 0" not in str(error.value)


def test_a_function_without_a_name_is_named_all_the_same(tmp_path):
    tiny(to_modality_shape_fn=lambda text: (2,)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"to_modality_shape_fn of modality 0: .*<lambda>"):
        Transfusion.from_pretrained(tmp_path)
    assert Transfusion.from_pretrained(tmp_path, to_modality_shape_fn=lower).modalities[1].spec.parse_shape("7") == (7,)


def test_ties_stay_ties_and_nothing_else_is_tied(tmp_path):
    encoder = Scale()
    model = autoencoded(modality_encoder=(encoder, None), modality_decoder=(Scale(encoder.factor), None))
    model.save_pretrained(tmp_path)
    encoder = Scale()
    tied = Transfusion.from_pretrained(
        tmp_path, modality_encoder=encoder, modality_decoder=Scale(encoder.factor), to_modality_shape_fn=lower
    )
    assert tied.modalities[0].encoder.factor is tied.modalities[0].decoder.factor
    apart = Transfusion.from_pretrained(
        tmp_path, modality_encoder=Scale(), modality_decoder=Scale(), to_modality_shape_fn=lower
    )
    halves = apart.modalities[0]
    assert halves.encoder.factor.data_ptr() != halves.decoder.factor.data_ptr()
    assert halves.encoder.factor == halves.decoder.factor == 2


def test_one_module_for_two_that_were_different(tmp_path):
    awake(tiny(modality_encoder=(Scale(), Scale()))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"modalities\.0\.encoder\.factor and modalities\.1\.encoder\.factor differ"):
        Transfusion.from_pretrained(tmp_path, modality_encoder=Scale())
    Transfusion.from_pretrained(tmp_path, modality_encoder=[Scale(), Scale()])
    tiny(modality_encoder=Scale()).save_pretrained(tmp_path)  # one for both
    loaded = Transfusion.from_pretrained(tmp_path, modality_encoder=Scale())
    assert loaded.modalities[0].encoder is loaded.modalities[1].encoder


def test_a_component_that_reads_its_numbers_is_built_plainly(tmp_path):
    @register_component(name="test.Reads")
    class Reads(nn.Module):
        def __init__(self, size: int):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(size))
            self.total = float(self.weight.detach().sum())

        def forward(self, x):
            return x * self.weight * self.total

    model = awake(Transfusion(num_text_tokens=10, **PICTURES, modality_encoder=Reads(3), transformer=TRUNK))
    model.save_pretrained(tmp_path)
    assert_same(model, Transfusion.from_pretrained(tmp_path), batch_for(model, "component"))


# components


def test_components_of_versions_and_names_unknown_here(folder, tmp_path):
    saved = config_of(folder)["arguments"]

    def with_trunk(**entries):
        change(folder, arguments=saved | dict(transformer=saved["transformer"] | entries))
        return pytest.raises(ValueError, match=r"config\.json: transformer: ")

    with with_trunk(version=7) as error:
        Transfusion.from_pretrained(folder)
    assert "'Transformer' is of version 7, newer than the 1 known here; upgrade transfusion_pytorch" in str(error.value)
    with with_trunk(component="Nobody") as error:
        Transfusion.from_pretrained(folder)
    assert "'Nobody' is unknown, those registered are" in str(error.value)
    with with_trunk(arguments=dict(width=16)) as error:
        Transfusion.from_pretrained(folder)
    assert "Transformer cannot be built from {'width': 16}" in str(error.value)
    with with_trunk(version="1"):
        Transfusion.from_pretrained(folder)
    with with_trunk(component="Nobody"):  # what is handed over need not be known
        Transfusion.from_pretrained(folder)
    trunk = Transformer(**TRUNK)
    assert Transfusion.from_pretrained(folder, transformer=trunk).transformer is trunk


def test_registering_what_is_no_component():
    with pytest.raises(ValueError, match="there is a component 'UNetDown' already"):

        @register_component(name="UNetDown")
        class Other(nn.Module): ...

    with pytest.raises(TypeError, match="arguments that have names; Positional takes sizes"):

        @register_component
        class Positional(nn.Module):
            def __init__(self, *sizes): ...

    with pytest.raises(TypeError, match="takes a class, got function"):
        register_component(lower)


def test_a_class_may_be_defined_again():
    """As a cell of a notebook does that runs twice."""
    for _ in range(2):

        @register_component(name="test.Again")
        class Again(nn.Module): ...

    model = Transfusion(num_text_tokens=10, **PICTURES, modality_encoder=Again(), transformer=TRUNK)
    assert model.constructor_arguments()["modality_encoder"] == [model.modalities[0].encoder]


def test_more_arguments_of_a_component_and_what_json_cannot_hold(tmp_path):
    @register_component(name="test.Open")
    class Open(nn.Module):
        def __init__(self, kind: str = "a", **more):
            super().__init__()

        def forward(self, x):
            return x

    def saved(**more):
        encoder = Open(**more)
        Transfusion(num_text_tokens=10, **PICTURES, modality_encoder=encoder, transformer=TRUNK).save_pretrained(
            tmp_path
        )
        return config_of(tmp_path)["arguments"]["modality_encoder"][0]

    made = saved(size=numpy.int32(3), flag=numpy.bool_(True), inner=Shift(2), dtype=torch.float16)
    inner = dict(component="test.Shift", version=2, arguments=dict(channels=2, by=0.5))
    assert made["arguments"] == dict(kind="a", size=3, flag=True, inner=inner, dtype={"torch.dtype": "float16"})
    Transfusion.from_pretrained(tmp_path)
    for wrong, message in (
        (dict(weight=torch.ones(2)), r"modality_encoder\[0\]\.weight is of type torch\.Tensor"),
        (dict(inner=Scale()), r"modality_encoder\[0\]\.inner is of type .*Scale"),
        (dict(table={1: 2}), r"modality_encoder\[0\]\.table: keys must be strings"),
    ):
        with pytest.raises(TypeError, match=message):
            saved(**wrong)
    with pytest.raises(ValueError, match=r"\.size is inf, which JSON cannot hold"):
        saved(size=float("inf"))


# subclasses


class Named(Transfusion):
    """Has the constructor of its parent."""

    def greeting(self):
        return "hello"


class Sized(Transfusion):
    """Has another."""

    def __init__(self, size: str):
        super().__init__(num_text_tokens=10, dim_latent=3, transformer=TRUNK | dict(depth={"small": 1, "big": 2}[size]))
        self.size, self.extra = size, nn.Parameter(torch.ones(2))

    def constructor_arguments(self):
        return dict(size=self.size)


def test_subclasses(tmp_path):
    model = Named(num_text_tokens=10, dim_latent=3, transformer=TRUNK)
    model.save_pretrained(tmp_path / "named")
    assert Named.from_pretrained(tmp_path / "named").greeting() == "hello"
    assert type(Transfusion.from_pretrained(tmp_path / "named")) is Transfusion
    sized = awake(Sized("small"))
    sized.save_pretrained(tmp_path / "sized")
    assert config_of(tmp_path / "sized")["arguments"] == dict(size="small")
    assert torch.equal(Sized.from_pretrained(tmp_path / "sized").extra, sized.extra)
    with pytest.raises(
        TypeError, match="Transfusion cannot be built without num_text_tokens, transformer and with size"
    ):
        Transfusion.from_pretrained(tmp_path / "sized")
    Sized.constructor_arguments, own = Transfusion.constructor_arguments, Sized.constructor_arguments
    try:
        with pytest.raises(TypeError, match=r"Sized cannot be built without size .*overrides constructor_arguments"):
            sized.save_pretrained(tmp_path / "not there")
    finally:
        Sized.constructor_arguments = own
    assert not (tmp_path / "not there").exists()


# what is refused


def test_weights_of_another_model_are_listed(folder):
    weights = load_tensors(folder / "model.safetensors")
    moved = weights.pop("to_logits.weight")
    save_tensors(folder / "model.safetensors", weights | {"to_logit.weight": moved})
    with pytest.raises(ValueError, match=r"model\.safetensors has the weights of another model") as error:
        Transfusion.from_pretrained(folder)
    assert str(error.value).splitlines()[1:] == [
        "1 missing:",
        "  to_logits.weight",
        "1 unexpected:",
        "  to_logit.weight",
    ]
    with pytest.raises(ValueError, match="another model") as error:
        Transfusion.from_pretrained(folder, num_text_tokens=11)
    assert str(error.value).splitlines()[1:] == [
        "1 of another shape:",
        "  text_embedding.weight: expected (30, 16), got (29, 16)",
    ]
    with pytest.raises(ValueError, match=r"\n  and \d+ more") as error:
        Transfusion.from_pretrained(folder, transformer=TRUNK | dict(depth=5))
    assert len(str(error.value).splitlines()) < 30


def test_foreign_new_and_broken_files(folder, tmp_path):
    def refused(error, message):
        with pytest.raises(error, match=message):
            Transfusion.from_pretrained(folder)

    saved = config_of(folder)
    change(folder, format_version=2, library_version="9.9")
    refused(ValueError, r"config\.json has format 2, written by transfusion_pytorch 9\.9; .*upgrade")
    change(folder, format_version="1")
    refused(ValueError, r"config\.json is malformed")
    for other, message in (
        (dict(model_type="llama"), r"config\.json is no configuration of transfusion_pytorch, but of 'llama'"),
        (dict(_class_name="UNet2DModel"), "but of 'UNet2DModel'"),
        (dict(library="other"), "but of 'other'"),
        ({}, "but a dict without its name"),
        ([1], "but a list without its name"),
    ):
        (folder / "config.json").write_text(json.dumps(other))
        refused(ValueError, message)
    (folder / "config.json").write_text(json.dumps(saved)[:100])
    refused(ValueError, r"config\.json is not readable JSON")
    (folder / "config.json").unlink()
    refused(FileNotFoundError, r"has no config\.json: it is no model that save_pretrained wrote")
    (folder / "config.json").write_text(json.dumps(saved | dict(arguments=saved["arguments"] | dict(colour="red"))))
    refused(TypeError, r"config\.json: .*Transfusion cannot be built with colour; its arguments are num_text_tokens")
    (folder / "config.json").write_text(json.dumps(saved | dict(arguments=saved["arguments"] | dict(prob_uncond=2))))
    refused(ValueError, r"config\.json: prob_uncond is a probability")
    (folder / "config.json").write_text(json.dumps(saved))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-9])
    refused(ValueError, r"model\.safetensors is not a whole safetensors file")


def test_options_that_are_none(folder):
    with pytest.raises(TypeError, match="cannot be built with colour"):
        Transfusion.from_pretrained(folder, colour="red")


def test_places_that_cannot_be_written_or_read(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("mine")
    model = tiny()
    with pytest.raises(NotADirectoryError, match="file is a file; save_pretrained needs the name of a folder"):
        model.save_pretrained(file)
    with pytest.raises(NotADirectoryError, match="file is a file; give the folder"):
        Transfusion.from_pretrained(file)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        Transfusion.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"there is no folder \.?/?models/a/b"):
        Transfusion.from_pretrained("models/a/b")
    assert file.read_text() == "mine"

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied", "secret")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError, match=r"closed cannot be written to: .*Permission denied"):
        model.save_pretrained(tmp_path / "closed")


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    model = tiny(odeint_kwargs=dict(method="euler", options=dict(grid=torch.ones(2))))
    with pytest.raises(TypeError, match=r"odeint_kwargs\.options\.grid is of type torch\.Tensor"):
        model.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="is on the meta device, without numbers"):
        tiny().to("meta").save_pretrained(tmp_path / "a")

    class Stateful(Scale):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state): ...

    with pytest.raises(TypeError, match=r"encoder\._extra_state is of type dict, which safetensors cannot hold"):
        autoencoded(modality_encoder=(Stateful(), None)).save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_failure_in_the_middle_leaves_what_was_there(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(
        "transfusion_pytorch.saving.files.save_file", lambda *args, **options: (_ for _ in ()).throw(full)
    )
    with pytest.raises(OSError, match="No space left"):
        awake(tiny()).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert isinstance(config_of(folder), Mapping)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("5", "is no configuration of transfusion_pytorch, but a int"),
        ("[" * 90_000 + "]" * 90_000, "nested too deeply"),
    ],
)
def test_configurations_of_odd_shapes(folder, content, message):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"config.json .*{message}"):
        Transfusion.from_pretrained(folder)


def test_devices_by_number_and_by_no_name(folder):
    assert Transfusion.from_pretrained(folder, device="cpu:0").device == torch.device("cpu")
    with pytest.raises(ValueError, match="weights cannot be loaded to device 'banana'"):
        Transfusion.from_pretrained(folder, device="banana")


def test_a_model_loaded_in_inference_mode_can_be_trained(folder):
    with torch.inference_mode():
        model = Transfusion.from_pretrained(folder)
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
