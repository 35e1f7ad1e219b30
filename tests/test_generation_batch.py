"""Many prompts at once against each alone: what stands beside a sample must not matter to it."""

import torch
from generation_models import (
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
    num_given,
    options_over,
    parts_of,
    script,
    shapes_of,
    slots_of,
    text,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from transfusion_pytorch.generation.batch_state import BatchState
from transfusion_pytorch.generation.scheduler import Scheduler

PROMPTS = [
    None,
    text(1, 2),
    torch.tensor(3),
    torch.randn(2, dtype=torch.float64, generator=torch.Generator().manual_seed(5)),
    latents(IMAGE, 2, 2),
    [text(0), latents(LINE, 3), text(1)],
    [latents(VIDEO, 1, 2, 1), latents(VECTOR), text(2)],
    [],
    [text(2), text(3), latents(LINE, 1)],
]


def alone(model, prompts, **options):
    return [model.sample(prompt, **options) for prompt in prompts]


options_with = options_over()


def test_many_prompts_at_once_are_as_one_by_one(monkeypatch):
    together, decode = set(), Scheduler._decode
    monkeypatch.setattr(
        Scheduler, "_decode", lambda self: together.add(frozenset(it.is_decoding for it in self.active)) or decode(self)
    )
    model, options = build(seed=4), options_with(max_length=32, cfg_scale=2.0)
    batch = model.sample_many(PROMPTS, **options)
    assert {True, False} in together, "some write while others denoise"
    for sample, single in zip(batch, alone(model, PROMPTS, **options), strict=True):
        assert_same(sample, single)
    assert {part[0] for sample in batch for part in drawn(sample)} == {VECTOR, LINE, IMAGE, VIDEO}
    assert len({len(slots_of(model, sample)) for sample in batch}) > 2


def test_the_spelling_of_a_shape_changes_no_state(monkeypatch):
    """Only the mask of its row; others that write meanwhile go on with theirs."""
    model = build(push=dict(eos=-9.0))
    ids = [model.meta_id, *model.char_tokenizer("2,1").tolist(), model.som_ids[IMAGE]]
    spells = options_with(logits_processors=[script(0, *ids, given=2)], max_length=30)
    writes = options_with(plan=[("text", 5)])
    expected = [model.sample(text(1), **spells), model.sample(text(2), **writes)]
    made, init = [], BatchState.__init__
    monkeypatch.setattr(
        BatchState, "__init__", lambda self, *args, **options: made.append(self) or init(self, *args, **options)
    )
    engine = model.create_engine()
    requests = [engine.submit(text(1), **spells), engine.submit(text(2), **writes)]
    for _ in range(5):
        engine.step()
    assert len(made) == 1
    engine.run()
    for request, sample in zip(requests, expected, strict=True):
        assert_same(request.result(), sample)
    assert (IMAGE, (2, 1, 1)) in shapes_of(requests[0].result())


def test_order_of_prompts_does_not_matter():
    model, options = build(seed=5), options_with(max_length=28, cfg_scale=3.0)
    forwards, backwards = (model.sample_many(prompts, **options) for prompts in (PROMPTS, PROMPTS[::-1]))
    for sample, other in zip(forwards, backwards[::-1], strict=True):
        assert_same(sample, other)


def test_prompts_are_not_changed():
    prompts = [[text(1), latents(LINE, 2)], [text(3)]]
    build().sample_many(prompts, **options_with(max_length=20))
    assert [len(prompt) for prompt in prompts] == [2, 1]
    assert shapes_of(prompts[0]) == [[1], (LINE, (2, 3))]


parts = st.one_of(
    st.lists(st.integers(0, 3), min_size=1, max_size=3).map(torch.tensor),
    st.integers(0, 3).map(torch.tensor),
    st.builds(lambda seed: latents(VECTOR, seed=seed), st.integers(0, 9)),
    st.builds(lambda size, seed: latents(LINE, size, seed=seed), st.integers(1, 3), st.integers(0, 9)),
    st.builds(lambda a, b: latents(IMAGE, a, b), st.integers(1, 2), st.integers(1, 2)),
    st.builds(lambda a, b: latents(VIDEO, a, 1, b), st.integers(1, 2), st.integers(1, 2)),
)
prompts = st.one_of(st.none(), parts, st.lists(parts, max_size=3))


@settings(max_examples=5, deadline=None, derandomize=True, database=None)
@given(
    name=st.sampled_from(sorted(MODELS)),
    seed=st.integers(0, 99),
    batch=st.lists(prompts, min_size=2, max_size=3),
    scale=st.sampled_from([1.0, 2.0, -0.5]),
    steps=st.integers(1, 3),
    method=st.sampled_from(["euler", "midpoint", "rk4"]),
    max_length=st.integers(48, 56),
)
def test_any_sample_of_any_model_holds_together(name, seed, batch, scale, steps, method, max_length):
    model, solver = build(seed=seed, push=dict(meta=0.9), **MODELS[name]), dict(method=method)
    options = options_with(cfg_scale=scale, modality_steps=steps, odeint_kwargs=solver, max_length=max_length)
    samples = model.sample_many(batch, **options)
    for sample, single in zip(samples, alone(model, batch, cache_kv=False, **options), strict=True):
        assert_same(sample, single)
        assert len(slots_of(model, sample)) <= max_length
    for sample, prompt in zip(samples, batch, strict=True):
        num_modalities = sum(isinstance(part, tuple) for part in parts_of(prompt))
        assert_drawn(model, sample, num_modalities, steps=steps, scale=scale, **solver)
        assert_greedy(model, sample, num_given(model, prompt))
