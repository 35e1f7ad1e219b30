"""Latent statistics: a model with them is one without, trained on latents of mean 0 and variance 1."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from tiny import CHANNELS, Spy, awake, latents_of, noise_of, ragged_batch, tiny
from torch import nn, tensor

from transfusion_pytorch import Condition, DrawingProgress, Latents, ModalityDone, Transfusion
from transfusion_pytorch.modalities.statistics import ENOUGH, LatentStatistics, RunningStatistics

CLOSE = dict(rtol=1e-5, atol=1e-6)
SCALE = {0: (tensor([5.0, -3.0, 100.0]), tensor([8.0, 0.1, 3.0])), 1: (tensor([0.0, 7.0]), tensor([1.0, 50.0]))}


class Encoder(nn.Module):
    """Far from unit variance, and invertible. Latents and data have the same shape."""

    def __init__(self, sign: float = 1.0):
        super().__init__()
        self.scale = nn.Parameter(tensor([8.0, 0.5, 3.0]))
        self.sign = sign

    def forward(self, x):
        return x * self.scale**self.sign


def fitted(model: Transfusion) -> Transfusion:
    """With the statistics `SCALE`."""
    for kind, (mean, std) in SCALE.items():
        model.modalities[kind].statistics.set(mean, std)
    return model


def scaled(sample: list) -> list:
    """The same sample in the scale of users."""
    return [scaled_part(part) for part in sample]


def scaled_part(part):
    if isinstance(part, Condition):
        return Condition(scaled_part(part.part))
    kind, value = part if isinstance(part, tuple) else (0, part)
    if not value.is_floating_point():
        return part
    mean, std = SCALE[kind]
    return kind, value.double() * std + mean


def pair_of_models(**options) -> tuple[Transfusion, Transfusion]:
    plain = awake(tiny(**options))
    return plain, fitted(copy.deepcopy(plain))


# what they are


def test_running_statistics_are_those_of_all_numbers_at_once():
    data = torch.randn(1000, 3, dtype=torch.float64) * tensor([1e-3, 1.0, 1e3]) + tensor([1e6, 0.0, -5.0])
    running = RunningStatistics(3)
    for part in data.split([1, 300, 9, 690]):
        running.add(part)
    torch.testing.assert_close(running.mean, data.mean(dim=0), rtol=1e-12, atol=1e-12)
    exact = data.std(dim=0, correction=0)
    torch.testing.assert_close(running.std[1:], exact[1:], rtol=1e-12, atol=0)
    assert running.std[0] == 1  # it varies by less than single precision resolves


def test_far_from_zero_no_digit_is_lost():
    data = torch.randn(4096, 1) + 1e4
    running = RunningStatistics(1)
    for part in data.split(100):
        running.add(part)
    torch.testing.assert_close(running.std, data.double().std(dim=0, correction=0), rtol=1e-10, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e7])
def test_constant_channels_are_shifted_only(value):
    running = RunningStatistics(2)
    for size in (3, 7, 1):
        running.add(torch.stack((torch.full((size,), value), torch.randn(size)), dim=-1))
    assert running.std[0] == 1
    statistics = LatentStatistics(2)
    statistics.set(running.mean, running.std)
    assert statistics.normalize(tensor([[value, 0.0]]))[0, 0] == 0


def test_fitting_measures_every_modality_behind_its_encoder():
    model = tiny(modality_encoder=(Encoder(), None))
    batches = [
        [[tensor([1]), torch.randn(2, 3), (1, torch.randn(4, 2) * 3)], [tensor([1, 2])]],
        [[Latents(0, torch.randn(5, 3) + 2), Condition(torch.randn(2, 2, 3))]],
        [[(1, torch.randn(7, 2))]],
    ]
    model.fit_latent_statistics(batches)
    encoded = torch.cat(
        [
            batches[0][0][1] * Encoder().scale,
            batches[1][0][0].latents,
            (batches[1][0][1].part * Encoder().scale).reshape(-1, 3),
        ]
    ).detach()
    other = torch.cat([batches[0][0][2][1], batches[2][0][0][1]])
    for kind, values in ((0, encoded), (1, other)):
        statistics = model.modalities[kind].statistics
        torch.testing.assert_close(statistics.mean, values.mean(dim=0))
        torch.testing.assert_close(statistics.std, values.std(dim=0, correction=0))
    before = copy.deepcopy(model.modalities[0].statistics.std)
    model.fit_latent_statistics(batches)  # again: what they measure is not what they normalise
    assert torch.equal(model.modalities[0].statistics.std, before)
    model.fit_latent_statistics(iter([model.packer()(batch) for batch in batches]))
    assert torch.equal(model.modalities[0].statistics.std, before)
    model.fit_latent_statistics(iter(batches), max_batches=1)
    torch.testing.assert_close(model.modalities[0].statistics.mean, encoded[:2].mean(dim=0))


def test_fitting_takes_batches_of_floats_and_leaves_what_it_does_not_see():
    model = tiny()
    model.fit_latent_statistics([torch.randn(8, 4, 2) * 9], modality_type=1)
    assert model.modalities[1].statistics.is_set
    assert not model.modalities[0].statistics.is_set
    model.fit_latent_statistics([torch.randn(8, 4, 3)])
    assert model.modalities[1].statistics.is_set
    for loader in ([], [tensor([[1, 2]])], [[[tensor([1])]]]):
        with pytest.raises(ValueError, match="there are no latents to measure"):
            model.fit_latent_statistics(loader)
    with pytest.raises(ValueError, match="max_batches must be a positive int or None, got 0"):
        model.fit_latent_statistics([], max_batches=0)
    with pytest.raises(ValueError, match="sample 0, part 0: the tensor contains NaN"):
        model.fit_latent_statistics([[[torch.full((2, 3), torch.nan)]]])


def test_wrong_statistics_are_refused():
    statistics = LatentStatistics(2)
    with pytest.raises(ValueError, match="mean must be 2 finite numbers"):
        statistics.set(torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"std must be positive, got \[1\.0, 0\.0\]"):
        statistics.set(torch.ones(2), tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="std must be 2 finite numbers"):
        statistics.set(torch.ones(2), tensor([1.0, torch.inf]))
    statistics.set(torch.ones(2), torch.ones(2))
    statistics.set(None, None)
    assert not statistics.is_set


# training


def test_without_statistics_nothing_is_computed():
    latents = torch.randn(3, 2)
    assert LatentStatistics(2).normalize(latents) is latents
    assert LatentStatistics(2).denormalize(latents) is latents
    assert not any("statistics" in name for name in tiny().state_dict())


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize("of_clean", [False, True])
def test_training_sees_unit_variance(channel_first, of_clean, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", lambda x: noise_of(x.round(decimals=3)))
    plain, model = pair_of_models(channel_first_latent=channel_first, model_output_clean=of_clean)
    batch = [[Condition(torch.randn(2, 3)), *ragged_batch()[0]], *ragged_batch()[1:]]
    users = [scaled(sample) for sample in batch]
    if channel_first:
        batch, users = ([[first(part) for part in sample] for sample in each] for each in (batch, users))
    ema = plain.create_ema(), model.create_ema()
    made = []
    for one, samples, average in ((plain, batch, ema[0]), (model, users, ema[1])):
        options = dict(times=0.3, velocity_consistency_ema_model=average, return_breakdown=True)
        made.append([*one(samples, **options)[1], one(samples, return_loss=False)])
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def first(part):
    if isinstance(part, Condition):
        return Condition(first(part.part))
    if isinstance(part, tuple):
        return part[0], part[1].movedim(-1, 0)
    return part.movedim(-1, 0) if part.is_floating_point() else part


def test_raw_data_and_cached_latents_are_normalised_alike():
    model = fitted(awake(tiny(modality_encoder=(Encoder(), None))))
    raw = torch.randn(4, 3).double()
    latents = model.modalities[0].encoder(raw)
    losses = []
    for part in (raw, Latents(0, latents)):
        torch.manual_seed(0)
        losses.append(model([[tensor([1]), part]]))
    assert torch.equal(*losses)
    spy = Spy(model.modalities[0].adapter.to_model)
    model([[tensor([1]), raw]], return_loss=False)
    mean, std = SCALE[0]
    torch.testing.assert_close(spy.inputs[0], (latents - mean) / std)


def test_the_flow_loss_of_wide_latents_is_that_of_narrow_ones():
    torch.manual_seed(0)
    model, batch = tiny(dim_latent=3), [[tensor([1]), 8 * torch.randn(400, 3)]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = model(batch, return_breakdown=True)[1].flow[0]
    model.fit_latent_statistics([batch])
    after = model(batch, return_breakdown=True)[1].flow[0]
    assert 55 < before < 75  # 64 of the latents and 1 of the noise
    assert 1.8 < after < 2.2


def test_reconstruction_compares_what_users_see():
    """A decoder gets latents in the scale of its encoder."""
    decoder = Encoder(-1.0)
    model = fitted(awake(tiny(modality_decoder=(decoder, None), reconstruction_loss_weight=1.0)))
    spy = Spy(decoder)
    latents = tensor([5.0, -3.0, 100.0]).expand(4, 3)
    model([[tensor([1]), latents]], times=1.0)
    assert torch.allclose(spy.inputs[0], latents.double())


def test_gradients_reach_a_condition():
    plain, model = pair_of_models()
    x = torch.randn(2, 3).double().requires_grad_()
    y = (x.detach() * SCALE[0][1] + SCALE[0][0]).requires_grad_()
    for one, leaf in ((plain, x), (model, y)):
        torch.manual_seed(0)
        one([[Condition(leaf), tensor([1, 2])]]).backward()
    torch.testing.assert_close(y.grad * SCALE[0][1], x.grad, rtol=1e-4, atol=1e-6)


# sampling


def test_sampling_gives_what_users_know():
    plain, model = pair_of_models(modality_default_shape=((2, 2), (3,)))
    prompt = [tensor([1, 2]), torch.randn(2, 2, 3).double()]
    noise = torch.randn(9, 3).double()
    for options in (
        dict(plan=[("text", 3), 0, (1, (3,))], init_modality_noise=noise),
        dict(plan=[0], init_modality_noise=noise, modality_cfg_scale=1.5, cfg_scale=2.0),
        dict(plan=[0], return_unprocessed_modalities=True),
    ):
        made = [
            each.sample(given, max_length=60, generator=torch.Generator().manual_seed(1), **options)
            for each, given in ((plain, prompt), (model, scaled(prompt)))
        ]
        expected = scaled(made[0])
        assert len(made[1]) == len(expected) >= 5
        for part, other in zip(made[1], expected, strict=True):
            if isinstance(part, tuple):
                assert part[0] == other[0]
                torch.testing.assert_close(part[1], other[1], **CLOSE)
            else:
                assert torch.equal(part, other)
    made = [
        each.generate_modality_only(2, fixed_modality_shape=(2, 2), init_modality_noise=noise)
        for each in (plain, model)
    ]
    torch.testing.assert_close(made[1], scaled_part((0, made[0]))[1], **CLOSE)


def test_editing_takes_and_keeps_the_scale_of_users():
    plain, model = pair_of_models(modality_default_shape=((2, 2), (3,)))
    start = torch.randn(2, 2, 3).double()
    mask = tensor([[True, False], [False, True]])
    for options in (dict(strength=0.5), dict(modality_mask=mask)):
        made = [
            each.generate_modality_only(
                fixed_modality_shape=(2, 2), init_modality=given, generator=torch.Generator().manual_seed(1), **options
            )[0]
            for each, given in ((plain, start), (model, scaled_part(start)[1]))
        ]
        torch.testing.assert_close(made[1], scaled_part((0, made[0]))[1], **CLOSE)
    torch.testing.assert_close(made[1][~mask], scaled_part(start)[1][~mask], **CLOSE)


def test_a_decoder_gets_the_scale_of_its_encoder():
    decoder = Encoder(-1.0)
    model = fitted(awake(tiny(modality_decoder=(decoder, None), modality_default_shape=((2,), ()))))
    spy = Spy(decoder)
    options = dict(plan=[0], max_length=40, cfg_scale=1.0, modality_steps=2)
    latents = model.sample(
        tensor([1]), return_unprocessed_modalities=True, generator=torch.Generator().manual_seed(1), **options
    )[1][1]
    events = list(
        model.create_engine().submit(tensor([1]), generator=torch.Generator().manual_seed(1), **options).events()
    )
    [done] = [event for event in events if isinstance(event, ModalityDone)]
    torch.testing.assert_close(spy.inputs[-1][0], latents)
    torch.testing.assert_close(done.modality, decoder(latents).detach())
    *_, last = [event for event in events if isinstance(event, DrawingProgress)]
    torch.testing.assert_close(last.preview(), decoder(last.estimate * SCALE[0][1] + SCALE[0][0]).detach())


# state


def test_they_are_saved_and_loaded(tmp_path):
    model = fitted(awake(tiny()))
    model.save_pretrained(tmp_path)
    loaded = Transfusion.from_pretrained(tmp_path, dtype=torch.float32)
    other, copied = awake(tiny()), copy.deepcopy(model)
    assert set(model.state_dict()) - set(other.state_dict()) == {
        f"modalities.{kind}.statistics.{name}" for kind in (0, 1) for name in ("mean", "std")
    }
    other.load_state_dict(model.state_dict())
    pickled = io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    unpickled = torch.load(pickled, weights_only=False)
    for each in (loaded, other, copied, unpickled):
        for kind, (mean, std) in SCALE.items():
            statistics = each.modalities[kind].statistics
            assert torch.equal(statistics.mean, mean)
            assert torch.equal(statistics.std, std)
            assert statistics.mean.dtype == statistics.std.dtype == torch.float32
    with pytest.raises(RuntimeError, match=r"Missing key.*statistics\.mean"):
        model.load_state_dict(tiny().double().state_dict())


def test_they_keep_their_precision_whatever_the_parameters_have():
    model = fitted(tiny())
    mean = tensor([5.0, 1 / 3, 100.1])
    model.modalities[0].statistics.set(mean, mean)
    for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
        model.to(dtype)
        assert model.modalities[0].statistics.mean.dtype == torch.float32
        assert torch.equal(model.modalities[0].statistics.mean, mean)
    assert model.to("meta").modalities[0].statistics.mean.is_meta


def test_an_average_has_those_of_the_model():
    model = awake(tiny())
    before = model.create_ema(update_after_step=0, update_every=1)
    before.update()
    fitted(model)
    after = model.create_ema(update_after_step=0, update_every=1)
    for ema in (before, after):
        for _ in range(3):
            ema.update()
        for kind, (mean, std) in SCALE.items():
            statistics = ema.ema_model.modalities[kind].statistics
            assert torch.equal(statistics.mean, mean)
            assert torch.equal(statistics.std, std)


def test_a_packer_and_its_batches_know_nothing_of_them():
    model = awake(tiny())
    pack = pickle.loads(pickle.dumps(model.packer()))
    batch = pack([scaled(sample) for sample in ragged_batch()])
    fitted(model)
    losses = []
    for given in (batch, [scaled(sample) for sample in ragged_batch()]):
        torch.manual_seed(0)
        losses.append(model.eval()(given))
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)  # that batch is in single precision
    assert latents_of(ragged_batch(), 0).shape[-1] == CHANNELS[0]


# the warning


def far(count: int = ENOUGH, scale: float = 8.0, shift: float = 0.0) -> list:
    return [[tensor([1]), (1, torch.randn(count // 2, 2) * scale + shift)]]


def test_latents_far_from_unit_variance_are_told_once():
    model = tiny()
    message = r"modality 1: the latents have a standard deviation of [78]\.\d+ .*call model\.fit_latent_statistics"
    with pytest.warns(UserWarning, match=message):
        model(far())
    model(far())
    for options in (dict(scale=0.05), dict(shift=4.0)):
        with pytest.warns(UserWarning, match="modality 1"):
            tiny()(far(**options))
    with pytest.warns(UserWarning, match="modality 0: the latents have a standard deviation of 20"):
        tiny(modality_encoder=(nn.Linear(3, 3), None))([[Latents(0, torch.randn(400, 3) * 20)]])


@pytest.mark.parametrize(
    "options", [dict(count=ENOUGH - 2), dict(scale=0.3), dict(scale=4.0), dict(scale=1.0, shift=2.0)]
)
def test_no_false_alarm(options):
    tiny()(far(**options))


def test_no_alarm_where_it_is_no_use():
    fitted(tiny())(far(scale=500.0))
    model = tiny()
    model.eval()(far())  # not training
    model.sample([tensor([1]), (1, 8 * torch.randn(300, 2))], max_length=620)
    batch = model.packer()(far())
    model.train().to("meta")(batch.to("meta"))  # nobody waits for a device


def test_what_comes_from_a_cpu_is_told_wherever_it_goes():
    with pytest.warns(UserWarning, match="modality 1"):
        tiny().to("meta")(far())


def test_measuring_is_no_training():
    model = tiny()
    model.fit_latent_statistics([far()])
    assert model.training
    model(far())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, name: state.pop(f"{name}.std"), "only one of both is there"),
        (lambda state, name: state.pop(f"{name}.mean"), "only one of both is there"),
        (lambda state, name: state[f"{name}.std"].zero_(), "std must be positive"),
        (lambda state, name: state[f"{name}.mean"].fill_(float("nan")), "they must be finite"),
    ],
)
@pytest.mark.parametrize("is_set", [False, True])
def test_statistics_that_cannot_be_are_refused(change, message, is_set):
    model = fitted(tiny())
    state = copy.deepcopy(model.state_dict())
    change(state, "modalities.0.statistics")
    with pytest.raises(RuntimeError, match=rf"modalities.0.statistics.mean and .*: {message}"):
        (model if is_set else tiny()).load_state_dict(state)
