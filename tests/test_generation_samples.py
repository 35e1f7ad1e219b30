"""What comes back, and that it can be handed in again."""

import pytest
import torch
from generation_models import (
    CHANNELS,
    IMAGE,
    LINE,
    VECTOR,
    VIDEO,
    assert_same,
    build,
    drawn,
    latents,
    noise,
    num_given,
    options_over,
    parts_of,
    shapes_of,
    slots_of,
    text,
)
from torch import nn

from transfusion_pytorch import EndReason, Sample
from transfusion_pytorch.sequence.samples import TypedModality

options_with = options_over(cfg_scale=2.0)


@pytest.mark.parametrize("seed", range(6))
def test_samples_alternate_between_text_and_modalities(seed):
    model = build(seed=seed)
    for sample in model.sample_many([None, text(1), latents(IMAGE, 1, 2)], **options_with()):
        is_text = [not isinstance(part, tuple) for part in sample]
        assert is_text == [i % 2 == 0 for i in range(len(sample))]
        slots = slots_of(model, sample)
        assert slots[0] == model.sos_id
        assert slots.count(model.sos_id) == 1
        assert model.eos_id not in slots[:-1]
        assert slots[-1] == model.eos_id or len(slots) == 40 or slots[-1] in model.som_ids
        for i, (modality, x) in enumerate(sample[1::2]):
            before, after = sample[2 * i].tolist(), sample[2 * i + 2].tolist()
            opening = model.vocabulary.opening(modality, tuple(x.shape[:-1])).tolist()
            assert before[-len(opening) :] == opening
            assert after[0] == model.eom_ids[modality]
        assert all(part.dtype == torch.long for part in sample[::2])


def cuts(model, sample):
    """A sample cut off behind each of its slots of text."""
    for i, part in enumerate(sample):
        if not isinstance(part, tuple):
            for end in range(1, len(part) + 1):
                yield [*sample[:i], part[:end]]
        else:
            yield sample[: i + 1]


@pytest.mark.parametrize("seed", [1, 4])
def test_sample_goes_on_from_wherever_it_is_cut_off(seed):
    model = build(seed=seed, push=dict(meta=1.0, eos=-0.6))
    whole = model.sample(**options_with(max_length=34))
    prompts = list(cuts(model, whole))
    assert any(model.meta_id in prompt[-1].tolist() for prompt in prompts if torch.is_tensor(prompt[-1]))
    *inside, end = model.sample_many(prompts, **options_with(max_length=34))
    for sample in inside:
        assert_same(sample, whole)
    assert whole.reason is EndReason.LENGTH
    assert whole[-1][-1] in model.som_ids  # there was no room for this one
    assert_same(end[: len(whole)], whole)  # but a prompt that opens it has asked for it
    assert len(drawn(end)) == len(drawn(whole)) + 1


def marked(model, modality, *shape):
    x = latents(modality, *shape)
    return model.vocabulary.opening(modality, shape), x, model.vocabulary.closing(modality)


def test_markers_around_a_prompt_are_added_where_they_are_missing():
    model = build(seed=2)
    opening, x, closing = marked(model, IMAGE, 2, 2)
    sos, eos, som = (text(i) for i in (model.sos_id, model.eos_id, model.som_ids[IMAGE]))
    prompts = [
        [text(1), x, text(2)],
        [sos, text(1), x, text(2)],
        [text(1), opening, x, closing, text(2)],
        [torch.cat([sos, text(1), opening]), x, torch.cat([closing, text(2)])],
        [text(1), opening, x, text(2)],
        [text(1), som, x, text(2)],
        [text(1), x, closing, text(2), eos],
        [sos, text(1).int(), x, torch.tensor(2, dtype=torch.uint8)],
    ]
    samples = model.sample_many(prompts, **options_with(max_length=30))
    for sample in samples[1:]:
        assert_same(sample, samples[0])
    assert slots_of(model, samples[0])[:13] == [4, 1, *opening.tolist(), *[-1] * 4, *closing.tolist(), 2]


def test_prompts_of_every_form_are_taken():
    model = build(dim_latent=(2, 3), modality_num_dim=None)
    x = torch.randn(3, 2, dtype=torch.float64)
    pairs = [(text(1), [text(1)]), (torch.tensor(1), [text(1)]), (x, [(0, x)]), (None, []), ((0, x), [x])]
    pairs += [([None, text(1)], text(1)), ([text(1), None, x], [text(1), x]), (TypedModality(0, x), x)]
    pairs += [(Sample([text(1), x], name="a"), [text(1), x]), (Sample(text(1)), text(1)), (Sample([None]), None)]
    for one, other in pairs:
        for sample in model.sample_many([one, other], **options_with(max_length=20)):
            assert_same(sample, model.sample(one, **options_with(max_length=20)))


@pytest.mark.parametrize("opened", ["", "2", "2,", "2,1", "1,3,2"])
def test_prompts_may_end_inside_an_opened_modality(opened):
    model = build(seed=3)
    prompt = torch.cat([text(1, model.meta_id), model.char_tokenizer(opened)])
    sample = model.sample(prompt, **options_with())
    assert model.decode_chars(sample[0][3:-1]).startswith(opened)
    assert drawn(sample)


@pytest.mark.parametrize("shape", [(), (4,), (2, 1), (1, 3, 2)])
def test_prompts_may_end_with_a_modality_about_to_be_drawn(shape):
    model, modality = build(seed=3), len(shape)
    opening = model.vocabulary.opening(modality, shape)
    sample = model.sample([text(1), opening[:1], opening[1:]], **options_with())
    assert shapes_of(sample[:2]) == [[4, 1, *opening.tolist()], (modality, (*shape, CHANNELS[modality]))]
    assert_same(sample, model.sample(text(1), **options_with(force_modality_at_start=(modality, shape))))


# an autoencoder around the latents


class Lossy(nn.Module):
    """Keeps the first channels, doubled; `calls` are the shapes of its batches."""

    def __init__(self, channels: int, factor: float):
        super().__init__()
        self.channels, self.factor, self.calls = channels, factor, []

    def forward(self, x):
        self.calls.append(tuple(x.shape))
        kept = self.factor * x[..., : self.channels]
        return nn.functional.pad(kept, (0, self.channels - kept.shape[-1]))


def encoded_model(**options):
    """Data of 5 channels, latents of 3."""
    coder = dict(modality_encoder=Lossy(3, 2.0), modality_decoder=Lossy(5, 0.5))
    return build(dim_latent=3, modality_num_dim=1, push=dict(meta=1.0, eos=-9.0), **coder | options)


def test_modalities_of_the_prompt_come_back_as_they_were_given():
    model, data = encoded_model(), torch.randn(4, 5)  # of a dtype that is not the model's
    for prompt in (data, [text(1), data], [text(1), (0, data), text(2), data[:2]]):
        sample = model.sample(prompt, **options_with(max_length=40))
        given = [part[1] if isinstance(part, tuple) else part for part in parts_of(prompt)]
        given = [part for part in given if part.is_floating_point()]
        got = [x for _, x in drawn(sample)]
        assert len(got) > len(given)
        assert all(x.dtype == torch.float32 and torch.equal(x, y) for x, y in zip(got, given, strict=False))
        assert all(x.shape[-1] == 5 and x.dtype == torch.float64 for x in got[len(given) :])
        again = model.sample(sample, **options_with(max_length=40))
        assert_same(again[: len(sample)], sample, tolerance=1e-6)


def test_only_what_was_drawn_is_decoded_and_all_of_a_shape_at_once():
    model, options = encoded_model(), options_with(fixed_modality_shape=(2,), max_length=30)
    prompts = [torch.randn(4, 5), text(1), [text(2), torch.randn(2, 5)]]
    samples = model.sample_many(prompts, **options)
    count = sum(len(drawn(sample)) for sample in samples) - 2
    assert count > 2
    assert model.modalities[0].decoder.calls == [(count, 2, 3)]
    assert sorted(model.modalities[0].encoder.calls) == [(1, 2, 5), (1, 4, 5)]


def test_latents_are_returned_unprocessed_if_asked_for():
    model, data = encoded_model(), torch.randn(4, 5)
    decoded, raw = (
        model.sample([text(1), data], **options_with(return_unprocessed_modalities=raw)) for raw in (False, True)
    )
    assert model.modalities[0].decoder.calls
    (_, given), *made = drawn(raw)
    torch.testing.assert_close(given, 2 * data[:, :3].double())
    for (_, x), (_, y) in zip(made, drawn(decoded)[1:], strict=True):
        assert x.shape[-1] == 3
        torch.testing.assert_close(y, nn.functional.pad(0.5 * x, (0, 2)))


def test_channels_stand_where_the_user_has_them():
    last, first = (build(channel_first_latent=first) for first in (False, True))
    x = latents(IMAGE, 2, 1)[1]
    for raw in (False, True):
        options = options_with(return_unprocessed_modalities=raw, force_modality_at_start=(VIDEO, (1, 2, 3)))
        one = last.sample([text(1), (IMAGE, x)], **options)
        other = first.sample([text(1), (IMAGE, x.movedim(-1, 0))], **options)
        assert other[1][1].shape == (1, 2, 1)
        assert other[3][1].shape == (2, 1, 2, 3)
        assert_same([(part[0], part[1].movedim(0, -1)) if isinstance(part, tuple) else part for part in other], one)
        *again, _ = first.sample(other, **options_with(max_length=60))
        *expected, _ = first.sample(other[:4], **options_with(max_length=60))
        assert_same(again[: len(expected)], expected)


# what is asked for


@pytest.mark.parametrize(("forced", "shape"), [(VECTOR, ()), (IMAGE, (2, 2)), ((LINE, (3,)), (3,))])
def test_a_modality_is_forced_right_behind_the_prompt(forced, shape):
    model, modality = build(modality_default_shape=((), (2,), (2, 2), (1, 1, 2))), len(shape)
    opening = model.vocabulary.opening(modality, shape).tolist()
    for prompt, at, before in [
        (None, 1, [4]),
        (text(1, 2), 1, [4, 1, 2]),
        (latents(VECTOR), 3, [model.eom_ids[VECTOR]]),
    ]:
        sample = model.sample(prompt, **options_with(force_modality_at_start=forced))
        assert shapes_of(sample[at - 1 : at + 1]) == [before + opening, (modality, (*shape, CHANNELS[modality]))]


def test_a_forced_type_takes_the_fixed_shape():
    model = build(modality_default_shape=((), (2,), (2, 2), (1, 1, 2)))
    one, other = (
        model.sample(**options_with(fixed_modality_shape=(3, 1), force_modality_at_start=forced))
        for forced in (IMAGE, (IMAGE, [3, 1]))
    )
    assert shapes_of(one)[1] == (IMAGE, (3, 1, 1))
    assert_same(one, other)


def test_a_prompt_of_full_length_comes_back():
    model = build()
    assert shapes_of(model.sample(text(1, 2, 3), **options_with(max_length=4))) == [[4, 1, 2, 3]]
    longer = model.sample_many([text(1, 2, 3), text(1)], **options_with(max_length=4))
    assert [len(slots_of(model, sample)) <= 4 for sample in longer] == [True, True]


@pytest.mark.parametrize("prompt", [None, text(1, 2), [text(1), latents(LINE, 2)], [latents(LINE, 2), text(3)]])
def test_a_sample_without_its_prompt_is_the_rest_of_it(prompt):
    model = build(seed=3)
    options = dict(plan=[("text", 3), (LINE, (2,)), ("text", 2)], text_temperature=0.0, log_probabilities=True)
    options |= dict(modality_steps=1, init_modality_noise=noise())
    whole, rest = (model.sample(prompt, **options, return_without_prompt=it) for it in (False, True))
    given = num_given(model, prompt)
    assert slots_of(model, rest) == slots_of(model, whole)[given:]
    torch.testing.assert_close(drawn(rest)[-1], drawn(whole)[-1], atol=0, rtol=0)
    assert len(drawn(rest)) == 1
    assert rest.reason is whole.reason
    for part, logarithms in zip(rest, rest.log_probabilities, strict=True):
        assert logarithms is None if isinstance(part, tuple) else len(logarithms) == len(part)
    every, last = (torch.cat([it for it in made.log_probabilities if it is not None]) for made in (whole, rest))
    torch.testing.assert_close(last, every[len(every) - len(last) :], equal_nan=True)


@pytest.mark.parametrize("channel_first", [False, True])
def test_latents_that_come_back_are_not_encoded_again(channel_first):
    """As a prompt and as a training sample; they are tuples with names."""
    encoder, decoder = nn.Linear(2, 3, dtype=torch.float64), nn.Linear(3, 2, dtype=torch.float64)
    if channel_first:
        encoder, decoder = (nn.Conv1d(*sizes, 1, dtype=torch.float64) for sizes in ((2, 3), (3, 2)))
    model = build(
        modality_encoder=(None, encoder, None, None),
        modality_decoder=(None, decoder, None, None),
        channel_first_latent=(False, channel_first, False, False),
    )
    options = dict(plan=[(LINE, (2,))], modality_steps=1, return_unprocessed_modalities=True)
    first = model.sample(text(1), **options)
    again = model.sample(first, **options)
    assert (first[1].modality_type, first[1].tensor.shape) == (LINE, (3, 2) if channel_first else (2, 3))
    assert isinstance(first[1], tuple)
    torch.testing.assert_close(again[1].tensor, first[1].tensor)
    assert torch.isfinite(model([first]))
    shown = model.sample(first, plan=[("text", 1)])[1].tensor
    torch.testing.assert_close(shown, decoder(first[1].tensor[None])[0].detach())
