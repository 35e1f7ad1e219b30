"""Autoencoders of diffusers, tiny and random, against diffusers' own calls."""

import json
import pickle
import re
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from checks import no_typecheck
from torch import nn

from transfusion_pytorch import Transfusion, pretrained_autoencoder
from transfusion_pytorch.data.latents import encoder_key
from transfusion_pytorch.modalities.autoencoder import drawing_from
from transfusion_pytorch.pretrained.autoencoders import FAMILIES

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what diffusers imports
    diffusers = pytest.importorskip("diffusers")

KL = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(4, 8),
    latent_channels=4,
    norm_num_groups=2,
)
CONFIGS = {
    "AutoencoderKL": KL | dict(scaling_factor=0.5, shift_factor=0.25),
    "AutoencoderDC": dict(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    ),
    "AutoencoderTiny": dict(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
        scaling_factor=2.0,
        shift_factor=0.5,
    ),
    "AutoencoderKLWan": dict(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 2.0, 0.5, 1.5],
    ),
    "AutoencoderOobleck": dict(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=6,
        decoder_input_channels=4,
        audio_channels=2,
        sampling_rate=100,
    ),
}
DATA_SHAPES = {
    "AutoencoderKL": (3, 8, 12),
    "AutoencoderDC": (3, 8, 12),
    "AutoencoderTiny": (3, 8, 12),
    "AutoencoderKLWan": (3, 5, 16, 16),
    "AutoencoderOobleck": (2, 32),
}
LATENT_SHAPES = {
    "AutoencoderKL": (4, 6),
    "AutoencoderDC": (4, 6),
    "AutoencoderTiny": (2, 3),
    "AutoencoderKLWan": (2, 2, 2),
    "AutoencoderOobleck": (4,),
}
# mean and standard deviation of each channel, as the configurations above say them
SCALES = {
    "AutoencoderKL": ([0.25] * 4, [2.0] * 4),
    "AutoencoderDC": ([0.0] * 4, [1 / 0.41407] * 4),
    "AutoencoderTiny": ([0.5] * 4, [0.5] * 4),
    "AutoencoderKLWan": ([0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 1.5]),
}
every_class = pytest.mark.parametrize("name", CONFIGS)


def autoencoder(name, **changes):
    torch.manual_seed(0)
    with pytest.warns(FutureWarning) if name == "AutoencoderOobleck" else nullcontext():
        return getattr(diffusers, name)(**(CONFIGS[name] | changes)).eval()


def data_of(name, count=2):
    return torch.rand(count, *DATA_SHAPES[name], generator=torch.Generator().manual_seed(1)) * 2 - 1


def raw_latents(model, data):
    """The mode of the posterior, or the latents."""
    made = model.encode(data)
    if hasattr(made, "latent_dist"):
        return made.latent_dist.mode()
    return made.latents if hasattr(made, "latents") else made.latent


def halves_of(name, model, **options):
    """Without randomness, unless asked for."""
    mode = dict(posterior="mode") if FAMILIES[name].has_posterior else {}
    return pretrained_autoencoder(model, **(mode | options))


def column(values, data):
    return torch.tensor(values).reshape(1, -1, *[1] * (data.ndim - 2))


def transfusion(name, encoder, decoder):
    return Transfusion(
        num_text_tokens=8,
        dim_latent=4,
        channel_first_latent=True,
        modality_default_shape=LATENT_SHAPES[name],
        modality_encoder=encoder,
        modality_decoder=decoder,
        transformer=dict(dim=16, depth=1, heads=2, dim_head=8),
    )


# the scale, and what is computed


@every_class
@torch.no_grad()
def test_latents_have_the_scale_of_the_configuration(name):
    model, data = autoencoder(name), data_of(name)
    encoder, _ = halves_of(name, model)
    expected = raw_latents(model, data)
    if name in SCALES:
        mean, std = (column(values, expected) for values in SCALES[name])
        expected = (expected - mean) / std
    latents = encoder(data)
    assert latents.shape == (2, 4, *LATENT_SHAPES[name])
    torch.testing.assert_close(latents, expected)


@every_class
@torch.no_grad()
def test_latents_are_decoded_as_by_diffusers(name):
    model = autoencoder(name)
    _, decoder = halves_of(name, model)
    latents = torch.randn(2, 4, *LATENT_SHAPES[name])
    raw = latents
    if name in SCALES:
        mean, std = (column(values, latents) for values in SCALES[name])
        raw = latents * std + mean
    data = decoder(latents)
    assert data.shape == (2, *DATA_SHAPES[name])
    torch.testing.assert_close(data, model.decode(raw).sample)


@torch.no_grad()
def test_means_of_a_configuration_go_with_its_factor():
    """As diffusers' pipelines do it: `(z - mean) * factor / std`."""
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    model = autoencoder("AutoencoderKL", latents_mean=mean, latents_std=std, shift_factor=None)
    data = data_of("AutoencoderKL")
    encoder, decoder = halves_of("AutoencoderKL", model)
    raw = raw_latents(model, data)
    expected = (raw - column(mean, raw)) * 0.5 / column(std, raw)
    torch.testing.assert_close(encoder(data), expected)
    torch.testing.assert_close(decoder(expected), model.decode(raw).sample)


@every_class
@torch.no_grad()
def test_a_batch_is_its_instances_one_by_one(name):
    model, data = autoencoder(name), data_of(name, count=3)
    for slicing in (False, True):
        encoder, decoder = halves_of(name, model, slicing=slicing)
        latents = encoder(data)
        torch.testing.assert_close(latents, torch.cat([encoder(each) for each in data.split(1)]), rtol=1e-4, atol=1e-5)
        decoded = torch.cat([decoder(each) for each in latents.split(1)])
        torch.testing.assert_close(decoder(latents), decoded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CONFIGS if FAMILIES[name].has_posterior])
@torch.no_grad()
def test_posteriors_are_sampled_from_the_generator(name):
    model, data = autoencoder(name), data_of(name)
    encoder, _ = pretrained_autoencoder(model)
    drawn = []
    for seed in (3, 3, 4):
        with drawing_from(torch.Generator().manual_seed(seed)):
            drawn.append(encoder(data))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    torch.manual_seed(5)
    expected = model.encode(data).latent_dist.sample()
    torch.manual_seed(5)
    torch.testing.assert_close(encoder.encode(data), expected)


def test_measured_latents_have_mean_0_and_standard_deviation_1(tmp_path):
    """Also after they were saved; and the decoder knows what was measured."""
    model = autoencoder("AutoencoderOobleck")
    batches = [data_of("AutoencoderOobleck", 3), data_of("AutoencoderOobleck", 5)]
    encoder, decoder = halves_of("AutoencoderOobleck", model, measured_on=batches)
    raw = torch.cat([raw_latents(model, batch) for batch in batches]).detach()
    torch.testing.assert_close(encoder.statistics.mean, raw.mean(dim=(0, 2)))
    torch.testing.assert_close(encoder.statistics.std, raw.std(dim=(0, 2), correction=0))
    latents = torch.cat([encoder(batch) for batch in batches]).detach()
    torch.testing.assert_close(latents.mean(dim=(0, 2)), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(latents.std(dim=(0, 2), correction=0), torch.ones(4))
    torch.testing.assert_close(decoder(latents), model.decode(raw).sample, rtol=1e-4, atol=1e-5)

    transfusion("AutoencoderOobleck", encoder, decoder).save_pretrained(tmp_path)
    loaded = Transfusion.from_pretrained(tmp_path).modalities[0]
    for half in (loaded.encoder, loaded.decoder):
        assert torch.equal(half.statistics.std, encoder.statistics.std)


def test_data_without_a_batch_cannot_be_measured():
    with pytest.raises(ValueError, match="there are no latents to measure"):
        pretrained_autoencoder(autoencoder("AutoencoderKL"), measured_on=[])


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderKLWan", "AutoencoderDC", "AutoencoderOobleck"])
def test_tiles_and_slices_are_switched_on_in_the_halves_alone(name):
    model = autoencoder(name)
    for half in halves_of(name, model, tiling=True):
        assert half.autoencoder.use_tiling
        assert half.autoencoder.use_slicing
    for half in halves_of(name, model, slicing=False):
        assert not half.autoencoder.use_tiling
        assert not half.autoencoder.use_slicing
    assert not model.use_tiling
    assert not model.use_slicing


def test_tiles_are_those_of_diffusers():
    model = autoencoder("AutoencoderKL", sample_size=16)
    data = torch.rand(1, 3, 24, 24) * 2 - 1
    encoder, _ = halves_of("AutoencoderKL", model, tiling=True)
    tiled = encoder.encode(data).detach()
    assert not torch.allclose(tiled, raw_latents(model, data))
    model.enable_tiling()
    torch.testing.assert_close(tiled, raw_latents(model, data).detach())


# as part of a Transfusion


@every_class
def test_an_autoencoder_is_saved_with_the_model_once_and_built_again(name, tmp_path):
    model, data = autoencoder(name), data_of(name)
    own = transfusion(name, *halves_of(name, model))
    own.save_pretrained(tmp_path)
    loaded = Transfusion.from_pretrained(tmp_path)
    assert set(loaded.state_dict()) == set(own.state_dict())
    assert all(torch.equal(tensor, own.state_dict()[key]) for key, tensor in loaded.state_dict().items())
    io = loaded.modalities[0]
    parameters = [each for half in io.frozen for each in half.parameters()]
    needed = {key: tensor.numel() for key, tensor in model.named_parameters() if not key.endswith(".weight_g")}
    assert sum(each.numel() for each in parameters) == sum(needed.values())
    assert not any(each.requires_grad or each.is_meta for each in parameters)
    with torch.no_grad():
        latents = own.modalities[0].encoder(data)
        assert torch.equal(io.encoder(data), latents)
        assert torch.equal(io.decoder(latents), own.modalities[0].decoder(latents))


@every_class
def test_shapes_of_latents_are_found_without_computing(name):
    """A packer knows them from a dry run on `meta`, and can be pickled for data workers."""
    model = transfusion(name, *halves_of(name, autoencoder(name)))
    samples = [[torch.tensor([1, 2]), data_of(name, 1)[0]], [data_of(name, 2)[1]]]
    packer = pickle.loads(pickle.dumps(model.packer()))
    batch = packer(samples, seeds=[1, 2])
    assert batch.stream.placements[0].shapes == (LATENT_SHAPES[name],) * 2
    assert torch.isfinite(model(batch))


@every_class
def test_a_model_trains_and_draws_through_it(name):
    halves = halves_of(name, autoencoder(name))
    model = transfusion(name, *halves)
    average = model.create_ema(beta=0.9)
    assert average.ema_model.modalities[0].encoder is halves.encoder
    loss = model([[torch.tensor([1]), data_of(name)[0]]])
    loss.backward()
    assert any(each.grad is not None for each in model.parameters_without_encoder_decoder())
    assert all(each.grad is None for half in halves for each in half.parameters())
    assert not any(module.training for half in halves for module in half.modules())
    drawn = model.generate_modality_only(batch_size=2, modality_type=0, modality_steps=2)
    assert drawn.shape == (2, *DATA_SHAPES[name])
    assert drawn.isfinite().all()


@every_class
def test_cached_latents_stay_valid(name, tmp_path):
    """What they depend on is the same after a call, and after the model was saved and loaded."""
    model = transfusion(name, *halves_of(name, autoencoder(name)))
    key = encoder_key(model.modalities[0])
    model.modalities[0].encoder(data_of(name))
    assert encoder_key(model.modalities[0]) == key
    model.save_pretrained(tmp_path)
    assert encoder_key(Transfusion.from_pretrained(tmp_path).modalities[0]) == key
    other = transfusion(name, *halves_of(name, autoencoder(name), tiling=name != "AutoencoderTiny", slicing=False))
    assert encoder_key(other.modalities[0]) != key


def test_normed_weights_are_plain_in_the_halves_and_stay_in_the_instance():
    model = autoencoder("AutoencoderOobleck")
    names = set(model.state_dict())
    encoder, _ = halves_of("AutoencoderOobleck", model)
    assert set(model.state_dict()) == names
    assert not any(name.endswith(("weight_g", "weight_v")) for name in encoder.state_dict())
    normed, plain = model.encoder.conv1, encoder.autoencoder.encoder.conv1
    expected = normed.weight_g * normed.weight_v / normed.weight_v.norm(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(plain.weight, expected.detach(), rtol=1e-6, atol=1e-7)


def test_an_instance_keeps_its_modules_and_the_halves_share_them():
    model = autoencoder("AutoencoderKL")
    encoder, decoder = halves_of("AutoencoderKL", model)
    assert model.encoder is encoder.autoencoder.encoder
    assert model.decoder is decoder.autoencoder.decoder
    assert encoder.autoencoder.decoder is None
    assert decoder.autoencoder.encoder is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(dim_latent=8), "modality_encoder, a PretrainedEncoder, has latents of dim_latent=4, got 8"),
        (dict(channel_first_latent=False), "has latents of channel_first_latent=True, got False"),
        (dict(modality_default_shape=(4,)), "has latents of modality_num_dim=2, got 1"),
    ],
)
def test_a_model_of_another_layout_is_refused(changes, message):
    encoder, decoder = halves_of("AutoencoderKL", autoencoder("AutoencoderKL"))
    options = dict(dim_latent=4, channel_first_latent=True, modality_default_shape=(4, 6)) | changes
    with pytest.raises(ValueError, match=message):
        Transfusion(
            num_text_tokens=8,
            modality_encoder=encoder,
            modality_decoder=decoder,
            transformer=dict(dim=16, depth=1),
            **options,
        )


# from a folder


@every_class
def test_a_folder_is_read_offline(name, tmp_path):
    model, data = autoencoder(name), data_of(name)
    model.save_pretrained(tmp_path)
    encoder, decoder = halves_of(name, tmp_path, dim_latent=4)
    own_encoder, own_decoder = halves_of(name, model)
    with torch.no_grad():
        latents = own_encoder(data)
        torch.testing.assert_close(encoder(data), latents)
        torch.testing.assert_close(decoder(latents), own_decoder(latents))


def test_a_part_of_a_pipeline_is_read_in_a_dtype(tmp_path):
    autoencoder("AutoencoderKL").save_pretrained(tmp_path / "vae")
    encoder, _ = pretrained_autoencoder(tmp_path, subfolder="vae", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
    assert encoder.statistics.std.dtype == torch.float32
    assert encoder(data_of("AutoencoderKL").bfloat16()).dtype == torch.bfloat16
    batches = [data_of("AutoencoderKL")]
    halves = pretrained_autoencoder(tmp_path, subfolder="vae", dtype=torch.bfloat16, measured_on=batches)
    latents = halves.encoder(batches[0])
    assert latents.dtype == halves.decoder(latents).dtype == torch.float32


def test_channels_are_compared_before_weights_are_loaded(tmp_path):
    """Of which there are none here."""
    model = autoencoder("AutoencoderKL")
    model.save_config(tmp_path)
    with pytest.raises(ValueError, match="latents of 4 channels, but dim_latent=16 was asked for"):
        pretrained_autoencoder(tmp_path, dim_latent=16)


def test_a_pickle_is_not_loaded(tmp_path):
    autoencoder("AutoencoderKL").save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        pretrained_autoencoder(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "VQModel"}, "VQModel is not supported, only AutoencoderKL, AutoencoderDC"),
        ({"model_type": "llama"}, "is no autoencoder of diffusers: its configuration has no _class_name"),
    ],
)
def test_a_folder_of_something_else_is_refused(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        pretrained_autoencoder(tmp_path)


# mistakes


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_video_of_4_k_and_1_frames_keeps_all_of_them(frames):
    encoder, decoder = halves_of("AutoencoderKLWan", autoencoder("AutoencoderKLWan"))
    with torch.no_grad():
        latents = encoder(torch.zeros(1, 3, frames, 8, 8))
        assert latents.shape[2] == 1 + (frames - 1) // 4
        assert decoder(latents).shape[2] == frames


@pytest.mark.parametrize(("halvings", "factor"), [([False, True], 2), ([False, False], 1), ([True, True], 4)])
def test_video_is_halved_as_often_as_its_configuration_says(halvings, factor):
    """Frames are encoded in chunks of 4 behind the first, whatever a chunk becomes."""
    model = autoencoder("AutoencoderKLWan", temperal_downsample=halvings, dim_mult=[1, 1, 1])
    encoder, decoder = halves_of("AutoencoderKLWan", model)
    data = torch.zeros(1, 3, 5, 8, 8)
    with torch.no_grad():
        latents = encoder(data)
        assert encoder.layout.latent_shape((5, 8, 8)) == latents.shape[2:] == (1 + 4 // factor, 2, 2)
        assert decoder(latents).shape == data.shape
    with pytest.raises(ValueError, match=r"\(3, 4 k \+ 1, 4 k, 4 k\)"):
        encoder(data[:, :, :3])


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("AutoencoderKLWan", (3, 6, 8, 8), "(3, 4 k + 1, 8 k, 8 k)"),
        ("AutoencoderKLWan", (3, 5, 8, 12), "(3, 4 k + 1, 8 k, 8 k)"),
        ("AutoencoderKL", (3, 9, 8), "(3, 2 k, 2 k)"),
        ("AutoencoderKL", (1, 8, 8), "(3, 2 k, 2 k)"),
        ("AutoencoderTiny", (3, 8, 6), "(3, 4 k, 4 k)"),
        ("AutoencoderOobleck", (2, 33), "(2, 8 k)"),
        ("AutoencoderOobleck", (2, 4, 8), "(2, 8 k)"),
    ],
)
def test_what_would_be_dropped_is_refused(name, shape, expected):
    """By the model too, whether data are packed by it or by its packer."""
    model = transfusion(name, *halves_of(name, autoencoder(name)))
    for call in (model, model.packer()):
        with pytest.raises(ValueError, match="sample 0, part 0") as error:
            call([[torch.zeros(shape)]])
        assert f"expected data of shape {expected} with whole numbers k" in str(error.value)
        assert f"got {shape}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("AutoencoderDC", dict(posterior="mode"), "AutoencoderDC has no posterior: leave out posterior='mode'"),
        pytest.param("AutoencoderKL", dict(posterior="mean"), 'posterior is "sample" or "mode"', marks=no_typecheck),
        ("AutoencoderTiny", dict(tiling=True), "places tiles for a factor of 8, this has 4"),
        ("AutoencoderKL", dict(subfolder="vae", dtype=torch.float16), "subfolder, dtype go with a name or a folder"),
        ("AutoencoderKL", dict(dim_latent=3), "latents of 4 channels, but dim_latent=3 was asked for"),
    ],
)
def test_options_that_do_not_fit_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        pretrained_autoencoder(autoencoder(name), **options)


def test_tiles_of_video_are_placed_by_the_factor_that_its_configuration_says():
    halved_once = dict(dim_mult=[1, 1], temperal_downsample=[True])
    with pytest.raises(ValueError, match="AutoencoderKLWan places tiles for a factor of 8, this has 2: leave out"):
        pretrained_autoencoder(autoencoder("AutoencoderKLWan", **halved_once), tiling=True)
    model = autoencoder("AutoencoderKLWan", **halved_once, scale_factor_spatial=2)
    encoder, decoder = pretrained_autoencoder(model, tiling=True)
    video = torch.zeros(1, 3, 1, 264, 8)
    latents = encoder(video)
    assert latents.shape[2:] == encoder.layout.latent_shape(video.shape[2:]) == (1, 132, 4)
    assert decoder(latents).shape == video.shape


def test_an_instance_without_numbers_is_refused():
    with pytest.raises(ValueError, match="the autoencoder is on the meta device, without numbers"):
        pretrained_autoencoder(autoencoder("AutoencoderKL").to("meta"))


@no_typecheck
def test_options_that_are_none_are_refused(tmp_path):
    autoencoder("AutoencoderKL").save_pretrained(tmp_path)
    for options, message in (
        (dict(torch_dtype=torch.float16), r"unknown options torch_dtype; .* the type of the weights is dtype=\.\.\."),
        (dict(dtype="float16"), "dtype must be a floating point type such as torch.bfloat16, got 'float16'"),
        (dict(nonsense=1, revision="main"), "unknown options nonsense; there are dtype, subfolder, revision, "),
    ):
        with pytest.raises(TypeError, match=message):
            pretrained_autoencoder(tmp_path, **options)


@no_typecheck
def test_what_is_no_name_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere with an autoencoder of diffusers"):
        pretrained_autoencoder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no configuration of an autoencoder of diffusers"):
        pretrained_autoencoder(tmp_path)
    with pytest.raises(TypeError, match="a module, a folder, or the id of a repository, got int"):
        pretrained_autoencoder(3)
    with pytest.raises(TypeError, match=r"measured_on are batches, got one tensor; give a list"):
        pretrained_autoencoder(autoencoder("AutoencoderKL"), measured_on=data_of("AutoencoderKL"))


def test_another_module_is_refused():
    with pytest.raises(ValueError, match="Conv2d is not supported, only AutoencoderKL"):
        pretrained_autoencoder(nn.Conv2d(3, 4, 1))


def test_without_diffusers_the_extra_is_named(tmp_path, monkeypatch):
    model = transfusion("AutoencoderKL", *halves_of("AutoencoderKL", autoencoder("AutoencoderKL")))
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for load in (pretrained_autoencoder, Transfusion.from_pretrained):
        with pytest.raises(ImportError, match=r'pip install "transfusion-pytorch\[pretrained\]"'):
            load(tmp_path)


def test_the_page_on_autoencoders_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs/autoencoders.md").read_text()
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 4
    exec(compile("\n".join(blocks), "docs/autoencoders.md", "exec"), {"__name__": "page"})
