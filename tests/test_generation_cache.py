"""The cached sampler against reading everything again, and both against one forward pass over what they made."""

from typing import NamedTuple

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
    script,
    slots_of,
    text,
    to_pieces,
)
from torch import Tensor, nn

from transfusion_pytorch import UNetDown, UNetUp
from transfusion_pytorch.generation.batch_state import Branch, as_items, as_pieces, fingerprint
from transfusion_pytorch.generation.events import EndReason
from transfusion_pytorch.generation.runner import CachedRunner
from transfusion_pytorch.sequence.prompts import without_text
from transfusion_pytorch.sequence.samples import Piece, Text

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


@pytest.mark.parametrize("name", ["plain", "kv_heads", "softcap"])
def test_cache_changes_nothing_where_attention_takes_chunks(name):
    """Spans and prompts of more than 512 tokens, behind which text is written."""
    model = build(**dict(push=dict(eos=-9.0)) | MODELS[name])
    prompts = [text(1), [text(*[i % 4 for i in range(530)]), latents(LINE, 540), text(2)]]
    plan = [(LINE, (600,)), ("text", 3)]
    options = dict(max_length=2000, plan=plan, init_modality_noise=noise(600), modality_steps=1, cfg_scale=2.0)
    cached, again = both_ways(model, prompts, **options)
    for sample, other in zip(cached, again, strict=True):
        assert drawn(sample)[-1][1].shape == (600, 3)
        assert_same(sample, other)


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


class Kept(NamedTuple):
    """What a row of the cache held when it was given back: the pieces that were read, keys and values of each layer."""

    pieces: list[Piece]
    length: int
    tensors: list[Tensor]


def kept_by(branch: Branch) -> Kept:
    tensors = [tensor[branch.row.index, :, : branch.row.length].clone() for tensor in branch.row.block.tensors()]
    return Kept(as_pieces(branch.items[: branch.num_read]), branch.row.length, tensors)


def spied_rows(monkeypatch) -> list[Kept]:
    """Every row that is given back from now on."""
    kept, close = [], CachedRunner.close

    def spy(self, branch):
        if branch.row is not None:
            kept.append(kept_by(branch))
        close(self, branch)

    monkeypatch.setattr(CachedRunner, "close", spy)
    return kept


def read_fresh(model, pieces) -> Kept:
    runner, branch = CachedRunner(model), Branch(as_items(pieces))
    with torch.no_grad():
        runner.prefill([branch])
    return kept_by(branch)


def up_to(pieces, length, model):
    """Pieces cut to `length` slots, which lie behind a modality or in text."""
    kept = []
    for piece in pieces:
        size = len(slots_of(model, [piece.ids if isinstance(piece, Text) else (piece.type, piece.tensor)]))
        kept += [Text(piece.ids[:length])] if isinstance(piece, Text) and length else [piece] if length else []
        length -= min(size, length)
    return kept


def test_cache_holds_clean_latents_after_drawing(monkeypatch):
    model, rows = build(push=dict(eos=-9.0)), spied_rows(monkeypatch)
    samples = model.sample_many([text(1), text(2, 3)], cfg_scale=2.0, init_modality_noise=noise(), **GREEDY)
    assert len(rows) == 4
    for sample in samples:
        assert len(drawn(sample)) > 1
        pieces = to_pieces(sample)
        for read in (pieces, without_text(pieces, model.vocabulary)):
            [row] = [
                it
                for it in rows
                if fingerprint(as_items(it.pieces)) == fingerprint(as_items(up_to(read, it.length, model)))
            ]
            assert row.length >= len(slots_of(model, sample[:2])), "a drawing is in there"
            fresh = read_fresh(model, row.pieces)
            assert fresh.length == row.length
            for got, expected in zip(row.tensors, fresh.tensors, strict=True):
                torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("scale", "count"), [(1.0, 3), (2.0, 6)])
def test_cache_has_rows_for_guidance_where_there_is_any(monkeypatch, scale, count):
    rows = spied_rows(monkeypatch)
    options = GREEDY | dict(cfg_scale=scale, max_length=9, force_modality_at_start=(LINE, (2,)))
    build().sample_many([text(i) for i in range(3)], **options)
    assert len(rows) == count
    assert all(row.length > 0 for row in rows)


def test_cache_would_notice_latents_that_are_not_clean():
    model = build()
    sample = [text(model.sos_id, 1, model.meta_id, model.som_ids[0]), latents(VECTOR), text(model.eom_ids[0])]
    noisy = [sample[0], (VECTOR, noise()[0, :2]), sample[2]]
    clean, dirty = (read_fresh(model, to_pieces(part)) for part in (sample, noisy))
    assert (clean.tensors[1] - dirty.tensors[1])[:, 4:].abs().max() > 1e-3


# single precision, and the types of autocast


@pytest.mark.parametrize("name", MODELS)
def test_cache_changes_nothing_in_single_precision(name):
    """The same ids, and latents to rounding: a read-out that is smooth, so that rounding changes no id."""
    model = build(**dict(push=dict(eos=-9.0)) | MODELS[name]).float()
    prompts, start = [text(1), [text(3), latents(VIDEO, 1, 2, 2)]], noise().float()
    model.to_logits.forward = nn.Linear.forward.__get__(model.to_logits)
    options = dict(max_length=36, cfg_scale=2.5, init_modality_noise=start, plan=["text", (IMAGE, (2, 2)), ("text", 9)])
    cached, again = both_ways(model, prompts, **options)
    for sample, other in zip(cached, again, strict=True):
        assert_same(sample, other, tolerance=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_cache_is_in_the_type_of_autocast(monkeypatch, name):
    model, rows = build(**dict(push=dict(eos=-9.0)) | MODELS[name]).float(), spied_rows(monkeypatch)
    plan = [("text", 6), (LINE, (2,)), ("text", 3)]
    for prompts in ([text(1), text(2, 3, 1)], [None]):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            samples = model.sample_many(prompts, plan=plan, **GREEDY)
        assert all(sample.reason is EndReason.PLAN for sample in samples)
    assert {tensor.dtype for row in rows for tensor in row.tensors} == {torch.bfloat16}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("name", MODELS)
def test_decode_steps_are_near_one_forward_pass_in_low_precision(name, dtype, tolerance):
    """Teacher-forced: the same ids read one by one, and at once."""
    model, ids = build(**MODELS[name]).to(dtype), text(*(i * i % 4 for i in range(12)))
    forced, seen = script(*ids[4:].tolist(), given=5), []

    def watch(so_far, logits):
        seen.append(logits.clone())
        return forced(so_far, logits)

    model.to_logits.forward = nn.Linear.forward.__get__(model.to_logits)
    sample = model.sample(ids[:4], logits_processors=[watch], plan=[("text", 8)], **GREEDY)
    assert sample[0].tolist() == [model.sos_id, *ids.tolist(), model.eos_id]
    with torch.no_grad():
        [expected] = model([[ids]], return_loss=False)
    spread = expected.float().std()
    got = torch.stack(seen)
    assert ((got - expected[4:12]).float().abs().max() / spread) < tolerance
