"""The cached sampler against reading everything again, and both against one forward pass over what they made."""

import pytest
import torch
from generation_models import (
    GREEDY,
    IMAGE,
    LINE,
    MODELS,
    VECTOR,
    VIDEO,
    assert_drawn,
    assert_greedy,
    assert_same,
    build,
    drawn,
    latents,
    noise,
    num_given,
    parts_of,
    slots_of,
    text,
    to_pieces,
)

from transfusion_pytorch import UNetDown, UNetUp
from transfusion_pytorch.generation.context import CachedContext, Lane
from transfusion_pytorch.sequence.prompts import without_text
from transfusion_pytorch.sequence.samples import Text

PROMPTS = {
    "nothing": None,
    "text": text(1, 2),
    "a vector": latents(VECTOR),
    "a line": latents(LINE, 3),
    "an image": [latents(IMAGE, 2, 2), text(0)],
    "a video": [text(3), latents(VIDEO, 1, 2, 2), text(0, 1)],
    "several of a kind": [latents(LINE, 2), latents(LINE, 1, seed=3)],
    "several kinds": [text(2), latents(VECTOR), latents(IMAGE, 1, 2), text(2), latents(VECTOR, seed=3)],
}


def count_given(prompt) -> int:
    """The modalities of a prompt."""
    return sum(isinstance(part, tuple) for part in parts_of(prompt))


def both_ways(model, prompts, **options):
    """Samples with the cache, and the same by reading everything again."""
    options = GREEDY | dict(init_modality_noise=noise()) | options
    return (model.sample_many(prompts, cache_kv=cached, **options) for cached in (True, False))


@pytest.mark.parametrize("name", MODELS)
def test_cache_changes_nothing_in_any_model(name):
    model = build(**dict(push=dict(eos=-9.0)) | MODELS[name])
    prompts = [PROMPTS["nothing"], PROMPTS["a video"]]
    cached, again = both_ways(model, prompts, max_length=36, cfg_scale=2.5)
    for sample, other, prompt in zip(cached, again, prompts, strict=True):
        assert_same(sample, other)
        assert assert_greedy(model, sample, num_given(model, prompt)) > 3
        assert_drawn(model, sample, count_given(prompt), scale=2.5)
    assert sum(len(drawn(sample)) for sample in cached) > 1


@pytest.mark.parametrize(
    ("name", "scale"), [*((name, 3.0) for name in PROMPTS), ("nothing", 1.0), ("several kinds", 1.0)]
)
def test_cache_changes_nothing_behind_any_prompt(name, scale):
    model, prompt = build(seed=3), PROMPTS[name]
    [cached], [again] = both_ways(model, [prompt], max_length=32, cfg_scale=scale)
    assert_same(cached, again)
    assert_greedy(model, cached, num_given(model, prompt))
    assert_drawn(model, cached, count_given(prompt), scale=scale)


def test_cache_changes_nothing_beside_flex_attention():
    model = build(transformer=dict(use_flex_attn=True), push=dict(eos=-9.0))
    [cached], [again] = both_ways(model, [latents(LINE, 2)], max_length=20, modality_steps=1)
    assert_same(cached, again)
    assert assert_greedy(model, cached, 7) > 3


def test_cache_changes_nothing_in_text_alone():
    model = build(push=dict(meta=-9.0, eos=-9.0))
    [cached], [again] = both_ways(model, [text(1)], max_length=60)
    assert_same(cached, again)
    assert assert_greedy(model, cached, 2) == 58


@pytest.mark.parametrize("forced", [VECTOR, (VECTOR, ()), (LINE, (4,)), (IMAGE, (2, 1)), (VIDEO, (1, 3, 1))])
def test_cache_changes_nothing_behind_a_forced_modality(forced):
    model = build(modality_default_shape=((), (2,), (2, 2), (1, 2, 1)), push=dict(eos=-9.0))
    modality, shape = forced if isinstance(forced, tuple) else (forced, ())
    [cached], [again] = both_ways(model, [text(1, 2)], force_modality_at_start=forced, cfg_scale=2.0)
    assert_same(cached, again)
    assert drawn(cached)[0][0] == modality
    assert drawn(cached)[0][1].shape[:-1] == shape
    assert assert_greedy(model, cached, 3 + len(model.vocabulary.opening(modality, shape))) > 3
    assert_drawn(model, cached, scale=2.0)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_cache_changes_nothing_between_the_halves_of_a_unet(scale):
    sizes = dict(dim_hidden=4, num_dim=2)
    unet = (UNetDown(3, 8, **sizes), UNetUp(3, 8, **sizes))
    model = build(
        seed=1, dim_latent=3, modality_num_dim=2, pre_post_transformer_enc_dec=unet, push=dict(meta=1.5, eos=-9.0)
    )
    prompts = [text(1), [text(2), torch.randn(3, 5, 3)]]
    cached, again = both_ways(model, prompts, max_length=40, cfg_scale=scale, max_modality_tokens=12)
    for sample, other, given, prompt in zip(cached, again, (0, 1), prompts, strict=True):
        assert_same(sample, other)
        assert assert_greedy(model, sample, num_given(model, prompt), most=12) > 5
        assert_drawn(model, sample, given, scale=scale)
    assert max(x[..., 0].numel() for _, x in drawn(cached[0])) > 4, "more latents than tokens"


def spied_contexts(monkeypatch) -> list[CachedContext]:
    """Every context that is made from now on; rows that are given back keep what they had."""
    made, create = [], CachedContext.__init__
    monkeypatch.setattr(CachedContext, "__init__", lambda self, *args: made.append(self) or create(self, *args))
    return made


def read_fresh(model, pieces) -> CachedContext:
    context, lane = CachedContext(model), Lane()
    for piece in pieces:
        lane.append(piece)
    context.open(lane)
    with torch.no_grad():
        context.advance([lane])
    return context


def up_to(pieces, length, model):
    """Pieces cut to `length` slots, which lie behind a modality or in text."""
    kept = []
    for piece in pieces:
        size = len(slots_of(model, [piece.ids if isinstance(piece, Text) else (piece.type, piece.tensor)]))
        kept += [Text(piece.ids[:length])] if isinstance(piece, Text) and length else [piece] if length else []
        length -= min(size, length)
    return kept


def test_cache_holds_clean_latents_after_drawing(monkeypatch):
    model = build(push=dict(eos=-9.0))
    contexts = spied_contexts(monkeypatch)
    samples = model.sample_many([text(1), text(2, 3)], cfg_scale=2.0, init_modality_noise=noise(), **GREEDY)
    context = contexts[0]
    for row, sample in enumerate(samples):
        assert len(drawn(sample)) > 1
        pieces = to_pieces(sample)
        for at, read in ((row, pieces), (2 + row, without_text(pieces, model.vocabulary))):
            length = context.cache.lengths[at]
            assert length >= len(slots_of(model, sample[:2])), "a drawing is in there"
            fresh = read_fresh(model, up_to(read, length, model)).cache
            assert fresh.lengths == [length]
            for got, expected in zip(context.cache.keys + context.cache.values, fresh.keys + fresh.values, strict=True):
                torch.testing.assert_close(got[at, :, :length], expected[0, :, :length], atol=1e-9, rtol=0)


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 3), (2.0, 6)])
def test_cache_has_rows_for_guidance_where_there_is_any(monkeypatch, scale, rows):
    contexts = spied_contexts(monkeypatch)
    options = GREEDY | dict(cfg_scale=scale, max_length=9, force_modality_at_start=(LINE, (2,)))
    build().sample_many([text(i) for i in range(3)], **options)
    assert [sum(length > 0 for length in context.cache.lengths) for context in contexts] == [rows]


def test_cache_would_notice_latents_that_are_not_clean():
    model = build()
    sample = [text(model.sos_id, 1, model.meta_id, model.som_ids[0]), latents(VECTOR), text(model.eom_ids[0])]
    noisy = [sample[0], (VECTOR, noise()[0, :2]), sample[2]]
    clean, dirty = (read_fresh(model, to_pieces(part)) for part in (sample, noisy))
    assert (clean.cache.keys[1] - dirty.cache.keys[1])[0, :, 4:].abs().max() > 1e-3
