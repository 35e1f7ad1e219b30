"""Prefill in pieces, after failures and of shared prefixes: whatever is read and when, a row holds what it says."""

from contextlib import suppress

import pytest
import torch
from generation_models import (
    IMAGE,
    LINE,
    VECTOR,
    WRITES,
    assert_no_row_is_lost,
    assert_same,
    build,
    generators,
    latents,
    num_given,
    options_over,
    text,
)

from transfusion_pytorch.generation import runner as runner_module
from transfusion_pytorch.generation.batch_state import Branch, as_items
from transfusion_pytorch.generation.runner import CachedRunner, UncachedRunner, create_runner
from transfusion_pytorch.sequence.samples import Modality, Text

LONG = [text(0, 1, 2, 3), latents(LINE, 3), text(1, 2), latents(IMAGE, 2, 2), text(3, 0, 0, 1, 2, 3)]
FREE = dict(text_temperature=1.0, text_min_p=0.0)


options_with = options_over(max_length=60)


def alone(model, prompt, **options):
    return model.sample(prompt, cache_kv=False, **options)


def branch_of(*pieces) -> Branch:
    return Branch(as_items(Modality(*piece) if isinstance(piece, tuple) else Text(piece) for piece in pieces))


def rows_of(runner, branch):
    return [tensor[branch.row.index, :, : branch.row.length] for tensor in branch.row.block.tensors()]


# prefill in pieces


PIECES = [text(0, 1, 2), latents(LINE, 3), text(1), latents(VECTOR), latents(IMAGE, 2, 2), text(3, 0)]


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5, 7, 13, 14, 99])
@torch.no_grad()
def test_reading_in_pieces_is_reading_at_once(most):
    model = build()
    whole, parts = branch_of(*PIECES), branch_of(*PIECES)
    runner, other = CachedRunner(model), CachedRunner(model)
    runner.prefill([whole])
    sizes = []
    while parts.needs_prefill:
        before = parts.past.length
        other.prefill([parts], most)
        sizes.append(parts.past.length - before)
    assert parts.past == whole.past
    assert parts.past.position == 3 + 1 + 1 + 1 + 1 + 2
    for mine, theirs in zip(rows_of(other, parts), rows_of(runner, whole), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=0)
    assert max(sizes) <= max(most, 4), "a span is never split"
    assert len(sizes) <= 14 // min(most, 14) + 3
    assert runner.tokens_read == other.tokens_read == 14


@torch.no_grad()
def test_the_bound_is_for_all_branches_together():
    model, branches = build(), [branch_of(text(*ids)) for ids in ((0, 1, 2), (1, 2, 3), (2, 3, 1, 0), (3,))]
    runner = CachedRunner(model)
    runner.prefill(branches, 5)
    assert [branch.past.length for branch in branches] == [3, 2, 0, 0]
    runner.prefill(branches[1:], 5)
    assert [branch.past.length for branch in branches] == [3, 3, 4, 0]


def test_long_prompts_are_read_between_the_steps_of_others():
    """A request that writes goes on in every step, and both become what they are alone."""
    model = build(push=WRITES)
    engine = model.create_engine(max_prefill_tokens=4)
    writer = engine.submit(text(1), **options_with(max_length=40))
    engine.step()
    prompt, before = text(*[i % 4 for i in range(30)]), engine.stats
    long = engine.submit(prompt, **options_with(max_length=40))
    written = 0
    for step in range(1, 9):
        engine.step()
        written += len(writer.new_events())
        assert written >= step
        assert engine.stats.tokens_read - before.tokens_read - (engine.stats.steps - before.steps) <= 4 * step
    engine.run()
    assert_same(writer.result(), alone(model, text(1), **options_with(max_length=40)))
    assert_same(long.result(), alone(model, prompt, **options_with(max_length=40)))


@pytest.mark.parametrize("most", range(1, 9))
@pytest.mark.parametrize("guided", [1.0, 2.0])
def test_pieces_of_any_size_change_nothing(most, guided):
    """With shared prefixes, guidance and drawings behind them; a prompt may end one token behind a piece."""
    model = build(seed=3)
    engine = model.create_engine(max_prefill_tokens=most)
    plan = [("text", 2), (LINE, (2,)), ("text", 2), (IMAGE, (1, 2)), ("text", 2)]
    options = options_with(plan=plan, cfg_scale=guided, **FREE)
    prompts = [text(1), LONG, LONG, text(*[2] * 11), LONG, text(*[2] * 11)]
    requests = []
    for i, prompt in enumerate(prompts):
        requests.append(engine.submit(prompt, generator=generators(i), **options))
        for _ in range(1 + i):
            engine.step()
    late = engine.submit(LONG, generator=generators(7), **options)
    engine.run()
    for i, (request, prompt) in enumerate(zip([*requests, late], [*prompts, LONG], strict=True)):
        seed = 7 if request is late else i
        assert_same(request.result(), alone(model, prompt, generator=generators(seed), **options))
    assert_no_row_is_lost(engine)


@pytest.mark.parametrize("most", [6, 7, 8])
def test_a_prefix_whose_last_token_is_decoded_is_not_taken_for_more(most):
    """A prompt of one token more than a piece ends in a decode step; what its request writes then is its own."""
    model = build(seed=3)
    engine = model.create_engine(max_prefill_tokens=most)
    prompt, options = text(*[i % 4 for i in range(7)]), options_with(plan=["text", (LINE, (2,)), ("text", 3)], **FREE)
    engine.submit(text(1), **options_with(plan=[("text", 40)], max_length=90))
    engine.step()
    first = engine.submit(prompt, generator=generators(1), **options | dict(plan=[("text", 3), (LINE, (2,)), "text"]))
    while not first.is_done and engine.stats.drawings == 0:
        engine.step()
    second = engine.submit(prompt, generator=generators(2), **options)
    engine.run()
    assert_same(second.result(), alone(model, prompt, generator=generators(2), **options))


# failures


@pytest.mark.parametrize("error", [MemoryError("too much"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", [2, 3])
def test_groups_that_were_read_before_a_failure_stay_read(monkeypatch, failing, error):
    """Of prompts too long to be read at once, the first are there when the next one fails."""
    model, options = build(seed=3), options_with(plan=[("text", 2), (LINE, (2,)), ("text", 2)], **FREE)
    monkeypatch.setattr(runner_module, "READ_AT_ONCE", 6)
    prompts = [text(1, 2), text(*[1] * 5), text(*[2] * 8), text(1, 2)]
    expected = [alone(model, prompt, generator=generators(i), **options) for i, prompt in enumerate(prompts)]
    engine, run, calls = model.create_engine(), model.forward_stream, []

    def stumble(*args, **given):
        calls.append(0)
        if len(calls) == failing:
            raise error
        return run(*args, **given)

    monkeypatch.setattr(model, "forward_stream", stumble)
    requests = [engine.submit(prompt, generator=generators(i), **options) for i, prompt in enumerate(prompts)]
    for _ in range(3):
        with suppress(KeyboardInterrupt):
            engine.step()
    late = [engine.submit(prompt, generator=generators(i), **options) for i, prompt in enumerate(prompts)]
    while not engine.is_idle:
        engine.step()
        late.append(engine.submit(prompts[0], generator=generators(0), **options)) if len(late) < 9 else None
    for request, sample in zip([*requests, *late[:4]], expected * 2, strict=True):
        assert_same(request.result(), sample)
    for request in late[4:]:
        assert_same(request.result(), expected[0])
    assert_no_row_is_lost(engine)


# what branches begin with


@torch.no_grad()
def test_a_branch_remembers_what_was_read_and_can_begin_again():
    model, branch = build(), branch_of(*PIECES)
    runner = CachedRunner(model)
    runner.prefill([branch])
    read = [kept.clone() for kept in rows_of(runner, branch)]
    branch.rewind()
    runner.close(branch)
    assert branch.past.length == 0
    assert branch.needs_prefill
    runner.prefill([branch])
    for again, before in zip(rows_of(runner, branch), read, strict=True):
        assert torch.equal(again, before)


@torch.no_grad()
def test_a_prefix_is_forgotten_with_the_last_row_that_has_it():
    model, runner = build(), None
    runner = CachedRunner(model)
    first, second, third = (branch_of(text(1, 2, 3)) for _ in range(3))
    runner.prefill([first])
    runner.prefill([second])
    assert runner.tokens_read == 3
    runner.close(first)
    runner.prefill([third])
    assert runner.tokens_read == 3
    runner.close(second)
    third.rewind()
    runner.close(third)
    fourth = branch_of(text(1, 2, 3))
    runner.prefill([fourth])
    assert runner.tokens_read == 6, "what is read again serves nobody"
    for branch in (third, fourth):
        runner.close(branch)
    assert runner.cache.rows == []


def test_a_trunk_without_a_cache_is_run_by_reading_again():
    model = build()
    assert isinstance(create_runner(model), CachedRunner)
    assert isinstance(create_runner(model, cache_kv=False), UncachedRunner)


@pytest.mark.parametrize("prompt", [text(1), LONG])
def test_what_is_read_is_counted_once(prompt):
    model = build(push=WRITES)
    for most in (3, 512):
        engine = model.create_engine(max_prefill_tokens=most)
        engine.sample_many([prompt], **options_with(plan=[("text", 4)]))
        assert engine.stats.tokens_read == num_given(model, prompt) + 3


@pytest.mark.parametrize("push", [None, WRITES])
def test_latents_of_a_prompt_are_not_read_back_from_the_device(monkeypatch, push):
    """Prompts that are equal are found by keys that were made before they went there."""
    model, options = build(seed=3, push=push), options_with(plan=[("text", 2)])
    expected = alone(model, LONG, **options)
    engine = model.create_engine()
    requests = [engine.submit(LONG, **options) for _ in range(3)]
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: pytest.fail("something was read back"))
    engine.step()
    monkeypatch.undo()
    assert engine.stats.tokens_read == num_given(model, LONG) - 1 + 3, "each decodes the last id"
    engine.run()
    for request in requests:
        assert_same(request.result(), expected)


def test_prompts_whose_latents_differ_by_a_bit_are_not_shared():
    model, options = build(seed=3), options_with(plan=[("text", 2)])
    (kind, x), engine = latents(LINE, 3), model.create_engine()
    other = x.clone()
    other[1, 1] = torch.nextafter(other[1, 1], torch.tensor(9.0, dtype=x.dtype))
    engine.sample_many([(kind, x), (kind, other), (kind, x.clone())], **options)
    assert engine.stats.tokens_read == 2 * (num_given(model, (kind, x)) - 1) + 3 * 2


class Dithered(torch.nn.Module):
    """An encoder that makes other latents each time."""

    def forward(self, data):
        return data + torch.rand_like(data)


def test_latents_that_an_encoder_makes_anew_are_not_shared():
    model, options = build(seed=3, modality_encoder=(None, Dithered(), None, None)), options_with(plan=[("text", 2)])
    engine, prompt = model.create_engine(), latents(LINE, 3)
    engine.sample_many([prompt, prompt], **options)
    assert engine.stats.tokens_read == 2 * num_given(model, prompt) + 2
