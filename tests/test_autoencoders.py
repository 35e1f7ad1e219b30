"""Our own autoencoder: its halves, its losses, how reconstructions are scored, and how it travels with a model."""

import math

import pytest
import torch
import torch.nn.functional as F
from checks import no_typecheck
from PIL import Image
from torch import nn
from torch.distributions import Normal, kl_divergence

from transfusion_pytorch import AutoencoderObjective, KLAutoencoder, KLDecoder, KLEncoder, ModelCard, Transfusion
from transfusion_pytorch.autoencoder.halves import measure_scale
from transfusion_pytorch.autoencoder.model import Posterior, depth_to_space, space_to_depth
from transfusion_pytorch.autoencoder.objective import perceptual_distance
from transfusion_pytorch.autoencoder.scores import gaussian_windows, psnr, score, ssim
from transfusion_pytorch.commands.pictures import PictureModel
from transfusion_pytorch.data.images import FixedSize
from transfusion_pytorch.data.model_images import has_channels_first, image_reader_of, picture_channels
from transfusion_pytorch.modalities.autoencoder import DataLayout, drawing_from
from transfusion_pytorch.modalities.unet import ResidualBlock

SIZES = {1: (12,), 2: (8, 12), 3: (4, 8, 4)}


def small(num_dim=2, **options):
    sizes = dict(widths=(4, 8, 8), num_blocks=(0, 1, 1)) | options
    return KLAutoencoder(2, channels=3, num_dim=num_dim, **sizes).eval()


def data_of(num_dim=2, count=3):
    return torch.rand(count, 3, *SIZES[num_dim]) * 2 - 1


def awake(model):
    """Without the zeros that its residual blocks start with, so that everything has an effect."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# halves


@pytest.mark.parametrize("num_dim", [1, 2, 3])
@pytest.mark.parametrize(("patch_size", "widths"), [(1, (4, 8, 8)), (2, (4, 8)), (4, (8,))])
@torch.no_grad()
def test_halves_lead_to_fewer_positions_and_back(num_dim, patch_size, widths):
    model = small(num_dim, patch_size=patch_size, widths=widths, num_blocks=(1,) * len(widths))
    data = data_of(num_dim)
    latents = model.encoder(data)
    assert latents.shape == (3, 2, *model.latent_shape(SIZES[num_dim]))
    assert model.latent_shape(SIZES[num_dim]) == tuple(side // 4 for side in SIZES[num_dim])
    assert model.decoder(latents).shape == data.shape


@pytest.mark.parametrize("num_dim", [1, 2, 3])
def test_positions_become_channels_and_back(num_dim):
    data = data_of(num_dim)
    deep = space_to_depth(data, 2)
    assert deep.shape == (3, 3 * 2**num_dim, *(side // 2 for side in SIZES[num_dim]))
    first = data[(slice(None), 0, *[slice(2)] * num_dim)]  # the cube at the start, of one channel
    assert torch.equal(deep[(slice(None), slice(2**num_dim), *[0] * num_dim)], first.flatten(1))
    assert torch.equal(depth_to_space(deep, 2), data)


@pytest.mark.parametrize("num_dim", [1, 2, 3])
def test_a_block_without_a_condition_starts_as_the_identity(num_dim):
    block, x = ResidualBlock(8, 8, num_dim=num_dim), torch.randn(2, 8, *[4] * num_dim)
    assert torch.equal(block(x), x)
    assert block.to_modulation is None
    assert not torch.equal(awake(block)(x), x)


@torch.no_grad()
def test_a_batch_is_its_instances_one_by_one():
    model, data = awake(small(posterior="mode")), data_of()
    latents = model.encoder(data)
    torch.testing.assert_close(latents, torch.cat([model.encoder(each) for each in data.split(1)]))
    decoded = torch.cat([model.decoder(each) for each in latents.split(1)])
    torch.testing.assert_close(model.decoder(latents), decoded)


@torch.no_grad()
def test_latents_are_the_mode_or_a_sample_of_the_posterior():
    model, data = awake(small()), data_of()
    mean, log_variance = model.encoder.posterior(data)
    with drawing_from(torch.Generator().manual_seed(1)):
        sampled = model.encoder(data)
    with drawing_from(torch.Generator().manual_seed(1)):
        expected = mean + (log_variance / 2).exp() * torch.randn(mean.shape)
    torch.testing.assert_close(sampled, expected)
    model.encoder.posterior_use = "mode"
    torch.testing.assert_close(model.encoder(data), mean)


def test_training_samples_from_the_generator_and_evaluation_takes_the_mode():
    model, data = awake(small()), data_of()
    with torch.no_grad():
        mode = model(data)
        torch.testing.assert_close(mode.data, model.decoder.decode(mode.posterior.mean))
        model.train()
        one, other, same = (model(data, generator=torch.Generator().manual_seed(seed)).data for seed in (1, 2, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_divergence_is_that_of_the_distributions():
    posterior = Posterior(torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5))
    normal = Normal(posterior.mean, (posterior.log_variance / 2).exp())
    expected = kl_divergence(normal, Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(posterior.divergence(), expected)
    drawn = torch.stack([posterior.sample() for _ in range(4000)])
    torch.testing.assert_close(drawn.mean(dim=0), posterior.mean, rtol=0, atol=0.3)
    torch.testing.assert_close(drawn.std(dim=0), normal.scale, rtol=0.1, atol=0)


@torch.no_grad()
def test_the_measured_scale_is_taken_away_by_one_half_and_put_back_by_the_other():
    model, data = awake(small(posterior="mode")), data_of(count=6)
    before, raw = model(data).data, model.encoder.posterior(data).mean
    measure_scale(model.encoder, model.decoder, data.split(2))
    latents = model.encoder(data)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3), correction=0), torch.ones(2))
    std = raw.std(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(model.decoder.statistics.std, std)
    torch.testing.assert_close(model.decoder(latents), before)
    torch.testing.assert_close(model(data).data, before)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8), (3, 8, 6), (3, 8, 8, 8), ()])
def test_data_of_another_layout_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected data of shape \(3, 4 k, 4 k\) with whole numbers k") as error:
        small().encoder(torch.zeros(2, *shape))
    assert f"got {shape}" in str(error.value)


def test_layouts_tell_shapes_in_both_directions():
    video = DataLayout(3, (4, 8, 8), has_first=True)
    assert video.latent_shape((9, 16, 24)) == (3, 2, 3)
    assert video.data_shape((3, 2, 3)) == (9, 16, 24)
    assert video.problem_of((3, 9, 16, 24)) is None
    assert video.problem_of((3, 1, 8, 8)) is None
    assert "(3, 4 k + 1, 8 k, 8 k)" in video.problem_of((3, 8, 16, 24))
    assert DataLayout(1, (2,)).problem_of((1, 0)) is not None
    assert small().latent_shape((8, 12)) == (2, 3)
    for axes in ((8,), (8, 8, 8), (8, 9)):
        with pytest.raises(ValueError, match=r"expected data of shape \(3, 4 k, 4 k\)"):
            small().latent_shape(axes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(widths=(4, 8), num_blocks=(1,)), "an entry for each resolution, got \\[4, 8\\] and \\[1\\]"),
        (dict(widths=(), num_blocks=()), "an entry for each resolution"),
        (dict(widths=(4, 0), num_blocks=(1, 1)), "at least 1"),
        (dict(patch_size=0), "at least 1"),
        (dict(num_dim=4), "convolutions need 1, 2 or 3 axes, got 4"),
        pytest.param(dict(posterior="mean"), 'posterior is "sample" or "mode", got \'mean\'', marks=no_typecheck),
    ],
)
def test_sizes_that_make_no_autoencoder_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        KLAutoencoder(2, **options)


# losses


class Features(nn.Module):
    """Two maps, as a pretrained classifier gives them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3))

    def forward(self, images):
        first = self.first(images)
        return first, self.second(first)


def test_losses_are_errors_nats_and_distances_of_features():
    model, data, features = awake(small()), data_of(), Features()
    objective = AutoencoderObjective(kl_weight=0.3, features=features, perceptual_weight=2.0)
    losses = objective(model, data)
    made = model(data)
    torch.testing.assert_close(losses.reconstruction, (made.data - data).square().mean())
    torch.testing.assert_close(losses.kl, made.posterior.divergence().sum() / data.numel())
    distances = [
        (F.normalize(one, dim=1) - F.normalize(other, dim=1)).square().sum(dim=1).mean()
        for one, other in zip(features(made.data), features(data), strict=True)
    ]
    torch.testing.assert_close(losses.perceptual, sum(distances) / 2)
    torch.testing.assert_close(losses.total, losses.reconstruction + 0.3 * losses.kl + 2.0 * losses.perceptual)


def test_gradients_go_through_the_features_and_leave_them_as_they_are():
    model, features = awake(small()), Features()
    objective = AutoencoderObjective(kl_weight=0.0, features=features).train()
    before = {name: tensor.clone() for name, tensor in features.state_dict().items()}
    objective(model.train(), data_of()).perceptual.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.decoder.parameters())
    assert all(parameter.grad is None for parameter in features.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in features.state_dict().items())


def test_the_perceptual_distance_is_0_for_equal_features_and_4_for_opposite_ones():
    maps = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)]
    assert perceptual_distance(maps, maps).item() == 0
    opposite = perceptual_distance([-3 * each for each in maps], maps)
    torch.testing.assert_close(opposite, torch.tensor(4.0))
    half = perceptual_distance([maps[0], -maps[1]], maps)
    torch.testing.assert_close(half, torch.tensor(2.0))


def test_weights_and_features_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="needs a network to compare features"):
        AutoencoderObjective(perceptual_weight=1.0)
    with pytest.raises(ValueError, match="weights are not negative"):
        AutoencoderObjective(kl_weight=-1.0)
    with pytest.raises(TypeError, match=r"gives a tensor \(b, f, ...\) or a list of them, got str"):
        AutoencoderObjective(features=Named())(small(), data_of())


class Named(nn.Module):
    def forward(self, images):
        return ("a map",)


# scores


def test_signal_to_noise_is_in_decibels_of_the_error():
    assert psnr(0.01) == pytest.approx(20)
    assert psnr(10**-2.4) == pytest.approx(24)
    assert psnr(0.0) == math.inf


@pytest.mark.parametrize("shape", [(20,), (14, 9), (5, 12, 13)])
def test_equal_data_are_similar_by_1(shape):
    data = torch.rand(2, 3, *shape) * 2 - 1
    torch.testing.assert_close(ssim(data, data), torch.ones(2, dtype=torch.float64))
    assert (ssim(data, data + 0.3 * torch.randn_like(data)) < 0.99).all()


def test_similarity_of_flat_images_is_that_of_their_luminance():
    one, other = torch.full((1, 1, 16, 16), -0.2), torch.full((1, 1, 16, 16), 0.6)  # 0.4 and 0.8 in [0, 1]
    expected = (2 * 0.4 * 0.8 + 0.01**2) / (0.4**2 + 0.8**2 + 0.01**2)
    assert ssim(one, other).item() == pytest.approx(expected, abs=1e-6)


def test_similarity_is_that_of_windows_one_by_one():
    """Against Wang's definition, in loops."""
    one, other = torch.rand(2, 1, 1, 13, 15, dtype=torch.float64) * 2 - 1
    x, y = (one[0, 0] + 1) / 2, (other[0, 0] + 1) / 2
    positions = torch.arange(11, dtype=torch.float64) - 5
    line = (-positions.square() / (2 * 1.5**2)).exp()
    window = line[:, None] * line / line.sum() ** 2
    found = []
    for row in range(3):
        for column in range(5):
            a, b = x[row : row + 11, column : column + 11], y[row : row + 11, column : column + 11]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
            found.append(luminance * (2 * covariance + 9e-4) / (var_a + var_b + 9e-4))
    torch.testing.assert_close(ssim(one, other), torch.stack(found).mean()[None])


def test_windows_are_as_wide_as_the_data_at_most():
    assert gaussian_windows(4).shape == (4, 1)
    assert gaussian_windows(28).shape == (28, 18)
    torch.testing.assert_close(gaussian_windows(28).sum(dim=0), torch.ones(18, dtype=torch.float64))


def test_scores_are_over_all_numbers_of_all_data():
    """In batches of any size; what leaves the range is clipped."""
    model, data = awake(small().train()), data_of(count=5)
    scores = score(model, [data[:2], data[2:]], generator=torch.Generator().manual_seed(0))
    assert model.training
    model.eval()
    with torch.no_grad():
        made = model(data)
        error = ((made.data.clamp(-1, 1) - data) / 2).square().mean().item()
        nats = made.posterior.divergence()
    assert made.data.abs().max() > 1
    assert scores.psnr == pytest.approx(-10 * math.log10(error), abs=1e-4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        drawn = torch.cat([model.encoder.posterior(part).sample(generator) for part in (data[:2], data[2:])])
        error = ((model.decoder.decode(drawn).clamp(-1, 1) - data) / 2).square().mean().item()
    assert scores.psnr_of_samples == pytest.approx(-10 * math.log10(error), abs=1e-4)
    assert scores.ssim == pytest.approx(ssim(made.data.clamp(-1, 1), data).mean().item())
    assert scores.nats == pytest.approx(nats.mean().item(), rel=1e-5)
    assert scores.bits == pytest.approx(scores.nats / math.log(2))
    assert scores.bits_per_latent_number == pytest.approx(scores.bits / (2 * 2 * 3))
    with pytest.raises(ValueError, match="there is nothing to score"):
        score(model, [])


# saved, and as part of a Transfusion


def test_an_autoencoder_is_saved_and_loaded(tmp_path):
    model, data = awake(small(patch_size=2, posterior="mode")), torch.rand(2, 3, 16, 8)
    measure_scale(model.encoder, model.decoder, [data])
    model.save_pretrained(tmp_path)
    loaded = KLAutoencoder.from_pretrained(tmp_path)
    assert loaded.constructor_arguments() == model.constructor_arguments()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded.encoder(data), model.encoder(data))
    for card in (None, ModelCard(title="Mine")):
        model.save_pretrained(tmp_path, card=card)
        text = (tmp_path / "README.md").read_text()
        assert f"# {'KL autoencoder' if card is None else 'Mine'}" in text
        assert "modality_encoder=autoencoder.encoder" in text
        assert "None" not in text


@pytest.mark.parametrize("num_dim", [1, 2, 3])
def test_halves_plug_into_a_model_and_travel_with_it(num_dim, tmp_path):
    autoencoder, data = awake(small(num_dim)), data_of(num_dim)
    measure_scale(autoencoder.encoder, autoencoder.decoder, [data])
    model = Transfusion(
        num_text_tokens=8,
        dim_latent=autoencoder.dim_latent,
        channel_first_latent=True,
        modality_default_shape=autoencoder.latent_shape(SIZES[num_dim]),
        modality_encoder=autoencoder.encoder,
        modality_decoder=autoencoder.decoder,
        transformer=dict(dim=16, depth=1, heads=2, dim_head=8),
    )
    samples = [[torch.tensor([1, 2]), data[0]], [data[1]]]
    assert torch.isfinite(model(model.packer()(samples, seeds=[1, 2])))
    drawn = model.generate_modality_only(batch_size=2, modality_type=0, modality_steps=2)
    assert drawn.shape == (2, 3, *SIZES[num_dim])
    model.save_pretrained(tmp_path)
    io = Transfusion.from_pretrained(tmp_path).modalities[0]
    assert isinstance(io.encoder, KLEncoder)
    assert isinstance(io.decoder, KLDecoder)
    with torch.no_grad(), drawing_from(torch.Generator().manual_seed(1)):
        latents = io.encoder(data)
    with torch.no_grad(), drawing_from(torch.Generator().manual_seed(1)):
        assert torch.equal(latents, autoencoder.encoder(data))
        assert torch.equal(io.decoder(latents), autoencoder.decoder(latents))


def test_images_are_read_and_drawn_by_a_saved_model_without_being_told_how(tmp_path):
    autoencoder = KLAutoencoder(2, channels=1, widths=(4, 8), num_blocks=(0, 0))
    model = Transfusion(
        num_text_tokens=256,
        dim_latent=2,
        channel_first_latent=True,
        modality_default_shape=(4, 6),
        modality_encoder=autoencoder.encoder,
        modality_decoder=autoencoder.decoder,
        transformer=dict(dim=16, depth=1, heads=2, dim_head=8),
    )
    model.save_pretrained(tmp_path)
    pictures = PictureModel(Transfusion.from_pretrained(tmp_path), longest_text=4)
    io = pictures.model.modalities[0]
    assert picture_channels(io) == 1
    assert has_channels_first(io)
    reader = image_reader_of(io)
    assert (reader.size, reader.mode, reader.channels_first) == (FixedSize(8, 12), "L", True)
    Image.new("RGB", (30, 20), (255, 255, 255)).save(tmp_path / "white.png")
    assert torch.equal(pictures.read(tmp_path / "white.png"), torch.ones(1, 8, 12))


def test_a_model_with_other_channels_is_refused():
    autoencoder = small()
    with pytest.raises(ValueError, match="modality_encoder, a KLEncoder, has latents of dim_latent=2, got 4"):
        Transfusion(
            num_text_tokens=8,
            dim_latent=4,
            channel_first_latent=True,
            modality_encoder=autoencoder.encoder,
            transformer=dict(dim=16, depth=1),
        )
