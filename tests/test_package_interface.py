"""Calls that users of the `transfusion-pytorch` package on PyPI know: which are taken, and what comes back."""

import copy
import warnings

import pytest
import torch
from generation_models import (
    CHANNELS,
    IMAGE,
    LINE,
    VECTOR,
    assert_same,
    build,
    drawn,
    latents,
    options_over,
    shapes_of,
)
from generation_models import text as ids
from torch import nn, randint, randn, tensor

from transfusion_pytorch import Transfusion, print_modality_sample

DEFAULT_SHAPES = ((), (2,), (2, 2), (1, 1, 2))  # of the modalities of `build`
WITH_SOM = "a prompt that ends in som without a shape is not drawn yet"
BEYOND_LENGTH = "max_length is still an error for what is handed over or forced"


def tiny(**options):
    options = dict(num_text_tokens=8, dim_latent=4, modality_default_shape=(3,)) | options
    return Transfusion(transformer=dict(dim=8, depth=1, dim_head=4, heads=2), **options)


def text(*shape):
    return randint(0, 8, shape)


options_with = options_over(cfg_scale=1.0)


def sampler(**options):
    return build(seed=1, modality_default_shape=DEFAULT_SHAPES, **options)


def is_marked(model, sample):
    """Whether every modality has its markers on both sides."""
    for i, (modality, x) in enumerate(sample[1::2]):
        opening = model.vocabulary.opening(modality, tuple(x.shape[:-1])).tolist()
        if sample[2 * i].tolist()[-len(opening) :] != opening or sample[2 * i + 2][0] != model.eom_ids[modality]:
            return False
    return True


# training


@pytest.mark.parametrize("recon", [0.0, 0.1])
@pytest.mark.parametrize("clean", [False, True])
def test_samples_of_text_and_several_modalities_are_learned(recon, clean):
    model = tiny(
        dim_latent=(4, 6),
        modality_default_shape=((3,), (5,)),
        reconstruction_loss_weight=recon,
        model_output_clean=clean,
    )
    samples = [
        [text(5), (0, randn(2, 4)), text(3), (1, randn(6, 6))],
        [text(4), randn(7, 4), (1, randn(1, 6)), text(1)],
    ]
    loss, breakdown = model(samples, return_breakdown=True)
    loss.backward()
    assert loss == breakdown.total
    assert len(breakdown.flow) == 2
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_times_may_come_from_the_numbers_of_modalities():
    model, seen = tiny(prob_uncond=0.0), []

    def times_of(numbers):
        seen.append(numbers.tolist())
        return torch.ones(len(numbers), int(numbers.max()))

    samples = [[text(2), randn(2, 4), text(2), randn(3, 4)], [randn(1, 4), text(2)], [text(3)]]
    _, parts = model(samples, num_modalities_to_times_fn=times_of, return_breakdown=True)
    assert seen == [[2, 1, 0]]
    torch.testing.assert_close(parts.total, parts.text)  # at t = 1 modalities are read, and not learned


def test_a_deep_copy_is_a_teacher_for_velocities():
    halves = dict(modality_encoder=nn.Conv2d(3, 4, 3, padding=1), modality_decoder=nn.Conv2d(4, 3, 3, padding=1))
    model = tiny(channel_first_latent=True, modality_default_shape=(4, 4), **halves)
    teacher = copy.deepcopy(model)
    samples = [[text(4), randn(3, 8, 8), text(2), randn(3, 2, 5)]]
    loss, parts = model(samples, velocity_consistency_ema_model=teacher, return_breakdown=True)
    loss.backward()
    assert parts.velocity.isfinite().all()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_text_alone_and_one_modality_alone():
    model = tiny(dim_latent=(4, 6), modality_default_shape=((3,), (5, 2)))
    assert model(text(2, 16)).isfinite()
    assert model(text(2, 16), return_loss=False).shape == (2, 16, model.vocabulary.num_logits)
    model(randn(2, 4, 4, 6), modality_type=1).backward()
    assert model.generate_modality_only(modality_type=1).shape == (1, 5, 2, 6)
    assert model.generate_modality_only(3, modality_type=0, fixed_modality_shape=(2,)).shape == (3, 2, 4)
    first = tiny(channel_first_latent=True, modality_default_shape=(2, 2))
    first(randn(2, 4, 3, 5), modality_type=0).backward()
    assert first.generate_modality_only(2).shape == (2, 4, 2, 2)


def test_two_convolutions_are_adapters():
    pair = (nn.Conv2d(4, 8, 3, 2, 1), nn.ConvTranspose2d(8, 4, 3, 2, 1, output_padding=1))
    model = tiny(
        modality_default_shape=(6, 6),
        modality_num_dim=2,
        channel_first_latent=True,
        add_pos_emb=True,
        pre_post_transformer_enc_dec=pair,
    )
    model(randn(1, 4, 6, 6)).backward()
    model([[text(3), (0, randn(4, 6, 6)), text(2), (0, randn(4, 8, 4))]]).backward()
    assert pair[0].weight.grad.any()
    assert model.generate_modality_only().shape == (1, 4, 6, 6)


def test_vectors_are_modalities_without_axes():
    model = tiny(modality_default_shape=())
    model([[text(5), randn(4), text(2), randn(4)], [randn(4), text(3)]]).backward()
    sample = model.eval().sample(randn(4), max_length=8)
    assert shapes_of(sample)[:2] == [[model.sos_id, model.meta_id, model.som_ids[0]], (0, (4,))]


def test_text_with_a_batch_axis_of_one_is_text():
    model = tiny()
    flat, latent = text(6), randn(3, 4)
    for sample, same in [([flat[None], latent], [flat, latent]), ([latent, flat[None]], [latent, flat])]:
        assert torch.equal(model([sample], return_loss=False), model([same], return_loss=False))


# sampling


@pytest.mark.parametrize("prob_uncond", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("cache_kv", [False, True])
def test_models_with_and_without_dropped_text_are_sampled_with_and_without_guidance(prob_uncond, cache_kv):
    model = tiny(prob_uncond=prob_uncond)
    model([[text(5), randn(3, 4), text(3)]]).backward()
    for scale in (1.0, 3.0):
        sample = model.sample([text(4)], max_length=12, cfg_scale=scale, cache_kv=cache_kv)
        assert sample[0][0] == model.sos_id
    assert model.training


@pytest.mark.parametrize("cache_kv", [False, True])
def test_plain_text_is_continued_to_a_length(cache_kv):
    model, prompt = sampler(), randint(0, 4, (3, 5))
    written = model.generate_text_only(prompt, 12, temperature=0.0, cache_kv=cache_kv)
    assert written.shape == (3, 7)
    assert torch.equal(written, model.generate_text_only(prompt, 12, temperature=0.0, cache_kv=not cache_kv))
    assert model.generate_text_only(prompt, 4).shape == (3, 0)


def test_a_prompt_may_be_text_with_a_batch_axis_of_one():
    model, prompt = sampler(), ids(1, 2, 3)
    expected = model.sample(prompt, **options_with())
    for same in (prompt[None], [prompt[None]], [prompt[None, :2], prompt[2]]):
        assert_same(model.sample_one(same, **options_with()), expected)


def test_nothing_is_a_prompt_in_every_form():
    model = sampler()
    expected = model.sample(**options_with())
    for sample in model.sample_many([None, [], [None]], **options_with()):
        assert_same(sample, expected)


def test_prompts_of_every_kind_are_sampled_together_as_one_by_one():
    model = sampler()
    prompts = [None, ids(1), [ids(1, 2)], latents(IMAGE, 2, 2), [ids(3), latents(LINE, 2), ids(1)]]
    for sample, prompt in zip(model.sample_many(prompts, **options_with()), prompts, strict=True):
        assert_same(sample, model.sample_one(prompt, **options_with()))
        assert is_marked(model, sample)
        print_modality_sample(sample)


def test_a_prompt_may_have_the_markers_that_it_would_get():
    model, image, line = sampler(), latents(IMAGE, 3, 1), latents(LINE, 4)
    meta, of_image, of_line = tensor([model.meta_id]), model.get_modality_info(IMAGE), model.get_modality_info(LINE)
    marked_image = [meta, model.char_tokenizer("3,1"), tensor([of_image.som_id]), image, tensor([of_image.eom_id])]
    marked_line = [meta, model.char_tokenizer("4"), tensor(of_line.som_id), line, tensor(of_line.eom_id)]
    expected = model.sample([ids(1), image, ids(2), line, ids(1)], **options_with())
    assert_same(model.sample([ids(1), *marked_image, ids(2), *marked_line, ids(1)], **options_with()), expected)


def test_a_modality_is_forced_in_its_default_shape_or_another():
    model = sampler()
    prompts = [[ids(1), latents(IMAGE, 1, 2)], latents(VECTOR), ids(2)]
    for forced, modality, shape in [(LINE, LINE, (2,)), ((LINE, (5,)), LINE, (5,)), (VECTOR, VECTOR, ())]:
        samples = model.sample_many(prompts, **options_with(force_modality_at_start=forced, max_length=24))
        for sample, num_given in zip(samples, (1, 1, 0), strict=True):
            made, x = drawn(sample)[num_given]
            assert (made, x.shape) == (modality, (*shape, CHANNELS[modality]))
            assert is_marked(model, sample)


@pytest.mark.parametrize("length", range(3, 16))
def test_a_sample_that_was_cut_off_anywhere_is_continued_and_learned(length):
    model = sampler(push=dict(meta=2.0, eos=-9.0))
    cut = model.sample(ids(1), **options_with(max_length=length))
    turn = [*cut, ids(2, 3)[None]]
    bare = [part for part in cut if isinstance(part, tuple)]
    sample = model.sample(turn, **options_with(max_length=24))
    assert is_marked(model, sample[: 2 * len(bare) + 1])
    assert [x.shape for _, x in drawn(sample)[: len(bare)]] == [x.shape for _, x in bare]
    loss = model([turn])
    assert loss.isfinite()
    labels = model.packer()([turn]).stream.label.tolist()
    assert sum(label in model.som_ids for label in labels) == len(bare)
    assert labels.count(model.meta_id) == len(bare)


def test_a_cut_off_sample_may_end_in_any_part_of_an_opening():
    """That the lengths above meet every kind."""
    model = sampler(push=dict(meta=2.0, eos=-9.0))
    ends = {model.sample(ids(1), **options_with(max_length=length))[-1][-1].item() for length in range(3, 16)}
    assert model.meta_id in ends
    assert ends & set(model.som_ids)
    assert any(model.vocabulary.is_char(end) for end in ends)


# what still needs the engine


@pytest.mark.parametrize("modality", range(4))
def test_a_bare_som_opens_its_modality_in_the_default_shape(modality):
    """It is as if that modality were forced behind what stands before."""
    model = sampler()
    som, meta = model.som_ids[modality], tensor(model.meta_id)
    for before in ([], [ids(1, 2)], [ids(1), latents(IMAGE, 1, 2)]):
        forced = model.sample(before, **options_with(force_modality_at_start=modality))
        for end in ([tensor(som)], [tensor([som])], [tensor([[som]])], [meta, tensor(som)]):
            sample = model.sample([*before, *end], **options_with())
            assert_same(sample, forced)
            assert is_marked(model, sample)


def test_a_bare_som_opens_its_modality_in_the_fixed_shape():
    model = sampler()
    sample = model.sample([ids(1), tensor(model.som_ids[LINE])], **options_with(fixed_modality_shape=(3,)))
    assert shapes_of(sample)[1] == (LINE, (3, CHANNELS[LINE]))


def test_a_bare_som_without_any_shape_is_refused():
    with pytest.raises(ValueError, match=r"prompt 0.*modality 1 has no default shape"):
        build().sample([tensor(7 + LINE)], **options_with())


def test_openings_and_texts_are_sampled_together_as_one_by_one():
    model = sampler()
    prompts = [[tensor([model.som_ids[modality]])] for modality in range(4)] + [[ids(1, 2)], [None]]
    for sample, prompt in zip(model.sample_many(prompts, **options_with()), prompts, strict=True):
        assert_same(sample, model.sample(prompt, **options_with()))


@pytest.mark.parametrize("opening", ["som", "meta", "shape"])
def test_a_forced_modality_replaces_an_opening_at_the_end(opening):
    model = sampler()
    som, meta, shape = tensor([model.som_ids[LINE]]), tensor([model.meta_id]), model.char_tokenizer("2")
    end = dict(som=[som], meta=[meta], shape=[meta, shape, som])[opening]
    for forced in (VECTOR, (IMAGE, (2, 1)), (LINE, (3,))):
        for option in (dict(force_modality_at_start=forced), dict(plan=[forced]), dict(plan=[("text", 2), forced])):
            sample = model.sample([ids(1), *end], **options_with(**option))
            assert_same(sample, model.sample([ids(1)], **options_with(**option)))


def test_a_prompt_beyond_max_length_comes_back_with_one_warning():
    model = sampler()
    long, short = [ids(1), latents(IMAGE, 3, 4), ids(2)], ids(1)
    expected = model.sample(short, **options_with(max_length=10))
    with pytest.warns(UserWarning, match="max_length=10") as caught:
        samples = model.sample_many([long, short, long], **options_with(max_length=10))
    assert len(caught) == 1
    assert_same(samples[1], expected)
    for sample in samples[::2]:
        assert [part[0] if isinstance(part, tuple) else "text" for part in sample] == ["text", IMAGE, "text"]
        assert torch.equal(sample[1][1], long[1][1])
        assert sample[2].tolist() == [model.eom_ids[IMAGE], 2]
        assert is_marked(model, sample)


@pytest.mark.parametrize("length", [1, 4, 9])
def test_what_is_forced_is_drawn_even_beyond_max_length(length):
    model = sampler()
    after = [ids(1, 2, 3)]
    asked = [
        (after, dict(force_modality_at_start=(LINE, (5,)))),
        (after, dict(plan=[(LINE, (5,))])),
        ([*after, model.vocabulary.opening(LINE, (5,))], dict()),
        ([*after, tensor(model.som_ids[LINE])], dict(fixed_modality_shape=(5,))),
    ]
    for prompt, option in asked:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            sample = model.sample(prompt, **options_with(max_length=length, **option))
        opening = model.vocabulary.opening(LINE, (5,)).tolist()
        closing = sample[2].tolist()
        assert shapes_of(sample)[:2] == [[model.sos_id, 1, 2, 3, *opening], (LINE, (5, CHANNELS[LINE]))]
        assert closing[0] == model.eom_ids[LINE]
        assert len(sample) == 3
        assert set(closing[1:]) <= {model.eos_id}  # nothing that it would write by itself


def test_planned_text_beyond_max_length_is_empty():
    model = sampler()
    plan = [("text", 5), (LINE, (4,)), ("text", 5), (VECTOR, ())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        sample = model.sample(ids(1, 2), **options_with(max_length=3, plan=plan))
    assert [part[0] for part in drawn(sample)] == [LINE, VECTOR]
    written = [token for part in sample[::2] for token in part.tolist() if token < model.vocabulary.num_text]
    assert written == [1, 2]
    assert is_marked(model, sample)


def test_a_sample_is_a_list_that_says_why_it_ended():
    model = sampler()
    ended = model.sample(ids(1), **options_with(stop_ids=[0, 1, 2, 3], allowed_modalities=[]))
    cut = model.sample_many([ids(1)] * 2, **options_with(max_length=2))
    planned = model.sample(plan=[VECTOR], **options_with())
    assert isinstance(ended, list)
    assert ended.reason.name in ("STOP", "EOS")
    assert [sample.reason.name for sample in cut] == ["LENGTH", "LENGTH"]
    assert planned.reason.name == "PLAN"
    again, expected = (model.sample(prompt, **options_with()) for prompt in (planned, list(planned)))
    assert_same(again, expected)


def test_a_shape_that_is_written_by_default_fits_into_max_length():
    """A model that always writes the largest shape it may."""
    model = sampler(push=dict(meta=9.0, eos=-9.0))
    nine = int(model.char_tokenizer("9"))

    def prefers_nines(seen, logits):
        return logits.index_add(0, tensor([nine]), tensor([50.0], dtype=logits.dtype))

    options = options_with(max_length=100, logits_processors=[prefers_nines], init_modality_noise=None)
    options.pop("max_modality_tokens")
    sample = model.sample(**options)
    (modality, x), *_ = drawn(sample)
    assert modality != VECTOR
    assert x.shape[:-1].numel() >= 9
