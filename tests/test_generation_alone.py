"""Text without modalities, modalities without text, and the choice of a token."""

import pytest
import torch
from generation_models import IMAGE, LINE, VECTOR, VIDEO, WRITES, build, noise
from torchdiffeq import odeint

from transfusion_pytorch import Latents, UNetDown, UNetUp
from transfusion_pytorch.generation import resolve
from transfusion_pytorch.generation.options import SamplingOptions
from transfusion_pytorch.generation.sampler import SamplingTensors, keep_min_p, sample_tokens
from transfusion_pytorch.sequence.samples import Modality, TypedModality


def choose(logits, allowed, *, temperature=1.0, min_p=0.0):
    """A token for each row, all with the same options."""
    options = [SamplingOptions(text_temperature=temperature, text_min_p=min_p)] * len(logits)
    sampling = SamplingTensors.of(options, device=logits.device, dtype=logits.dtype)
    return sample_tokens(logits, ~allowed, sampling, torch.rand(len(logits)))


def naive(model, ids, seq_len):
    """Greedy text, one whole forward pass for each token."""
    with torch.no_grad():
        while ids.shape[1] < seq_len:
            logits = model(ids, return_loss=False)[:, -1, : model.vocabulary.num_text]
            ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cache_kv", [True, False])
@pytest.mark.parametrize("transformer", [dict(), dict(kv_heads=1, use_value_residual=True, num_residual_streams=2)])
def test_greedy_text_is_that_of_the_naive_loop(transformer, cache_kv, dtype):
    model, prompt = build(num_text_tokens=9, transformer=transformer, dtype=dtype), torch.randint(0, 9, (3, 4))
    written = model.generate_text_only(prompt, 24, temperature=0.0, cache_kv=cache_kv)
    assert torch.equal(torch.cat([prompt, written], dim=1), naive(model, prompt, 24))
    assert len(written.unique()) > 4


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.uint8])
@pytest.mark.parametrize("seq_len", [0, 2, 4, 5, 9])
def test_text_has_the_length_that_was_asked_for(seq_len, dtype):
    prompt = torch.randint(0, 4, (2, 4)).to(dtype)
    written = build().generate_text_only(prompt, seq_len)
    assert written.shape == (2, max(seq_len - 4, 0))
    assert written.dtype == torch.long


def test_text_alone_has_no_markers():
    model = build(push=dict(meta=50.0, eos=50.0, som=50.0))
    written = model.generate_text_only(torch.tensor([[1], [2]]), 40, temperature=2.0, min_p=0.0)
    assert set(written.flatten().tolist()) == {0, 1, 2, 3}


def flow_alone(model, modality, shape, steps, **solver):
    """Solves the flow of one instance, which is a whole sample by itself."""
    start = noise()[: torch.Size(shape).numel(), : model.modalities[modality].spec.dim_latent].to(model.dtype)

    def velocity(t, x):
        sample = [[Modality(modality, x.reshape(*shape, x.shape[-1]))]]
        stream, values = model.pack_stream(sample), model.latents_by_type(sample)
        hidden = model.forward_stream(stream, values, t.reshape(1))
        return model.velocities(hidden, stream, values, t.reshape(1))[modality]

    with torch.no_grad():
        return odeint(velocity, start, torch.linspace(0, 1, steps + 1, dtype=start.dtype), **solver)[-1]


@pytest.mark.parametrize(("modality", "shape"), [(VECTOR, ()), (LINE, (4,)), (IMAGE, (2, 3)), (VIDEO, (1, 2, 2))])
@pytest.mark.parametrize("method", ["midpoint", "rk4", "explicit_adams"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 3e-4)])
def test_modality_alone_solves_its_flow(modality, shape, method, dtype, tolerance):
    model = build(dtype=dtype)
    solver = dict(
        modality_type=modality, fixed_modality_shape=shape, modality_steps=3, odeint_kwargs=dict(method=method)
    )
    got = model.generate_modality_only(2, init_modality_noise=noise(), **solver)
    expected = flow_alone(model, modality, shape, 3, method=method)
    assert got.shape == (2, *shape, expected.shape[-1])
    for instance in got:
        assert instance.dtype == dtype
        torch.testing.assert_close(instance.reshape(expected.shape), expected, atol=tolerance, rtol=0)


def test_modalities_of_a_batch_do_not_see_each_other(monkeypatch):
    model, starts = build(), noise(rows=12).split(4)
    options = dict(modality_type=LINE, fixed_modality_shape=(4,), modality_steps=2)
    alone = [model.generate_modality_only(init_modality_noise=start, **options) for start in starts]
    waiting = iter(starts)
    monkeypatch.setattr(resolve, "normal", lambda *seed_and_shape: next(waiting))
    batch = model.generate_modality_only(3, **options)
    torch.testing.assert_close(batch, torch.cat(alone), atol=1e-9, rtol=0)


@pytest.mark.parametrize("cache_kv", [True, False])
def test_the_stream_of_a_modality_alone_serves_all_evaluations(monkeypatch, cache_kv):
    model, laid = build(), []
    pack_stream = model.pack_stream
    monkeypatch.setattr(model, "pack_stream", lambda *args: laid.append(args) or pack_stream(*args))
    engine = model.create_engine(cache_kv=cache_kv)
    options = SamplingOptions(modality_steps=8, fixed_modality_shape=(3,))
    assert len(engine.draw_only(4, LINE, options)) == 4
    assert engine.stats.evaluations == 16
    assert len(laid) == 1


def test_options_of_what_is_made_alone_may_come_by_position():
    """In the order of the signatures: first what one cannot do without."""
    model, ids = build(), torch.tensor([[1, 2]])
    seeded = [dict(generator=torch.Generator().manual_seed(1)) for _ in range(4)]
    written = model.generate_text_only(ids, 12, 0.5, 0.3, False, **seeded[0])
    named = dict(prompt=ids, seq_len=12, temperature=0.5, min_p=0.3, cache_kv=False)
    assert torch.equal(written, model.generate_text_only(**named, **seeded[1]))
    drawn = model.generate_modality_only(2, LINE, (3,), 2, **seeded[2])
    named = dict(batch_size=2, modality_type=LINE, fixed_modality_shape=(3,), modality_steps=2)
    assert torch.equal(drawn, model.generate_modality_only(**named, **seeded[3]))


def test_the_length_of_a_sample_may_come_second_without_its_name():
    model, ids = build(push=dict(WRITES)), torch.tensor([1])
    options = dict(text_temperature=0.0, options=SamplingOptions(max_length=30))
    assert len(model.sample(ids, 9, **options)[0]) == 9
    assert [len(sample[0]) for sample in model.sample_many([ids, None], 9, **options)] == [9, 9]
    *_, ended = model.sample_stream(ids, 9, **options)
    assert len(ended.sample[0]) == 9
    assert len(model.sample_one(ids, **options)[0]) == 30  # that of the options
    assert len(model.sample(max_length=7, prompt=ids, **options)[0]) == 7


def test_modality_alone_begins_from_whatever_a_sample_may_begin_from():
    model = build(modality_default_shape=((), (2,), (2, 2), (1, 1, 2)))
    image = torch.randn(2, 3, 1, dtype=torch.float64)
    options = dict(strength=0.5, modality_steps=2, init_modality_noise=noise())
    expected = model.generate_modality_only(2, IMAGE, init_modality=image, **options)
    assert expected.shape == (2, 2, 3, 1)
    for init in ((IMAGE, image), [IMAGE, image], Latents(IMAGE, image), TypedModality(IMAGE, image)):
        assert torch.equal(model.generate_modality_only(2, IMAGE, init_modality=init, **options), expected)


class Doubles(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def test_latents_that_modality_alone_begins_from_are_not_encoded_again():
    model = build(dim_latent=1, modality_num_dim=2, modality_encoder=Doubles())
    image = torch.randn(2, 3, 1, dtype=torch.float64)
    options = dict(strength=0.5, modality_steps=2, init_modality_noise=noise())
    encoded = model.generate_modality_only(init_modality=Latents(0, 2 * image), **options)
    assert torch.equal(encoded, model.generate_modality_only(init_modality=image, **options))
    assert not torch.equal(encoded, model.generate_modality_only(init_modality=Latents(0, image), **options))


def test_modality_alone_takes_the_default_shape_and_the_users_channels():
    model = build(modality_default_shape=((), (2,), (3, 2), (1, 1, 2)), channel_first_latent=True)
    assert model.generate_modality_only(modality_type=IMAGE, modality_steps=1).shape == (1, 1, 3, 2)
    assert model.generate_modality_only(2, modality_type=VECTOR, modality_steps=1).shape == (2, 2)


def test_modality_alone_is_decoded_at_once():
    calls = []

    class Decoder(torch.nn.Module):
        def forward(self, x):
            calls.append(tuple(x.shape))
            return -x

    model = build(dim_latent=3, modality_num_dim=1, modality_decoder=Decoder())
    options = dict(fixed_modality_shape=(2,), modality_steps=1, init_modality_noise=noise())
    decoded = model.generate_modality_only(4, **options)
    assert calls == [(4, 2, 3)]
    torch.testing.assert_close(decoded, -model.generate_modality_only(4, return_unprocessed_modalities=True, **options))
    assert len(calls) == 1


def test_modality_alone_goes_through_a_unet():
    sizes = dict(dim_hidden=4, num_dim=2)
    model = build(
        dim_latent=3, modality_num_dim=2, pre_post_transformer_enc_dec=(UNetDown(3, 8, **sizes), UNetUp(3, 8, **sizes))
    )
    got = model.generate_modality_only(fixed_modality_shape=(3, 4), modality_steps=2, init_modality_noise=noise())
    expected = flow_alone(model, 0, (3, 4), 2, method="midpoint")
    torch.testing.assert_close(got.reshape(12, 3), expected, atol=1e-9, rtol=0)


# choosing a token


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("min_p", "kept"),
    [(0.0, {0, 1, 2, 3}), (0.09, {0, 1, 2, 3}), (0.11, {0, 1, 2}), (0.5, {0, 1}), (0.61, {0}), (1.0, {0})],
)
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(min_p, kept):
    logits = logits_of(0.5, 0.3, 0.15, 0.05)
    likeliest = logits.amax(dim=-1, keepdim=True)
    filtered = keep_min_p(logits - likeliest, torch.tensor([[min_p]]).log()) + likeliest
    assert set(filtered.isfinite().nonzero()[:, 1].tolist()) == kept
    torch.testing.assert_close(filtered[filtered.isfinite()], logits[filtered.isfinite()])
    tokens = choose(logits.expand(500, -1), torch.ones(1, 4, dtype=torch.bool), temperature=3.0, min_p=min_p)
    assert set(tokens.tolist()) == kept


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_the_temperature_says(temperature):
    count, probabilities = 40_000, torch.tensor([0.5, 0.3, 0.15, 0.05])
    allowed = torch.tensor([[True, True, False, True]])
    tokens = choose(logits_of(*probabilities).expand(count, -1), allowed, temperature=temperature, min_p=0.0)
    expected = probabilities ** (1 / temperature) * allowed[0]
    expected = expected / expected.sum()
    seen = torch.bincount(tokens, minlength=4)
    chi_square = ((seen - count * expected) ** 2 / (count * expected)).nan_to_num().sum()
    assert chi_square < 14, "beyond the 99.9th percentile of 2 degrees of freedom"
    assert seen[2] == 0


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-30])
def test_the_likeliest_is_taken_where_there_is_no_temperature(temperature):
    logits = 100 * torch.randn(50, 30, dtype=torch.float64)
    allowed = torch.rand(50, 30) < 0.5
    expected = logits.masked_fill(~allowed, float("-inf")).argmax(dim=-1)
    assert torch.equal(choose(logits, allowed, temperature=temperature, min_p=0.0), expected)


def test_min_p_judges_by_what_is_allowed():
    allowed = torch.tensor([[False, True, True, True]])
    tokens = choose(logits_of(0.98, 0.01, 0.009, 0.001).expand(300, -1), allowed, temperature=1.0, min_p=0.5)
    assert set(tokens.tolist()) == {1, 2}
