"""Whatever the model, the prompts and the options: each way to compute a sample gives the same one."""

from dataclasses import dataclass, field

import torch
from generation_models import (
    GREEDY,
    IMAGE,
    LINE,
    MODELS,
    VECTOR,
    VIDEO,
    assert_no_row_is_lost,
    assert_same,
    build,
    drawn,
    generators,
    latents,
    noise,
    num_given,
    slots_of,
    text,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

MOST = GREEDY["max_modality_tokens"]
DERANDOMIZED = dict(deadline=None, derandomize=True, database=None)
TOLERANT = dict(method="dopri5", atol=1.0, rtol=1.0)  # the flow of a model that learnt nothing is rough
SHAPES = {VECTOR: (), LINE: (2,), IMAGE: (1, 2), VIDEO: (1, 2, 1)}


@dataclass
class Case:
    """Requests of one batch, and how they are to be computed."""

    name: str
    seed: int
    prompts: list
    room: int
    options: dict
    most: int
    seeds: list = field(default_factory=list)

    @property
    def model(self):
        """Eager to draw."""
        return build(seed=self.seed, push=dict(meta=0.8), **MODELS[self.name])

    def arguments(self, model):
        """The options, with room behind the longest prompt."""
        longest = max(num_given(model, prompt) for prompt in self.prompts)
        return dict(max_length=longest + self.room, max_modality_tokens=MOST) | self.options

    def sources(self):
        return generators(*range(self.seed, self.seed + len(self.prompts)))


parts = st.one_of(
    st.lists(st.integers(0, 3), min_size=1, max_size=3).map(torch.tensor),
    st.builds(lambda seed: latents(VECTOR, seed=seed), st.integers(0, 9)),
    st.builds(lambda size, seed: latents(LINE, size, seed=seed), st.integers(1, 3), st.integers(0, 9)),
    st.builds(lambda a, b: latents(IMAGE, a, b), st.integers(1, 2), st.integers(1, 2)),
    st.builds(lambda a: latents(VIDEO, a, 1, 2), st.integers(1, 2)),
)
prompts = st.one_of(st.none(), parts, st.lists(parts, max_size=2))

text_options = st.one_of(
    st.just(dict(text_temperature=0.0)),
    st.fixed_dictionaries(
        dict(text_temperature=st.sampled_from([0.3, 1.0, 3.0])),
        optional=dict(
            text_top_k=st.integers(1, 5),
            text_top_p=st.sampled_from([0.5, 0.9]),
            text_min_p=st.sampled_from([0.0, 0.4]),
            text_repetition_penalty=st.sampled_from([0.7, 1.5]),
        ),
    ),
)
drawing_options = st.fixed_dictionaries(
    dict(modality_steps=st.integers(1, 3), cfg_scale=st.sampled_from([None, 1.0, 2.0, -0.5])),
    optional=dict(
        modality_cfg_scale=st.sampled_from([0.0, 1.5]),
        cfg_interval=st.sampled_from([(0.0, 0.4), (0.3, 0.8), (1.0, 1.0)]),
        cfg_rescale=st.sampled_from([0.5, 1.0]),
        time_shift=st.sampled_from([0.5, 3.0]),
        odeint_kwargs=st.sampled_from([dict(method="euler"), dict(method="heun3"), dict(method="rk4"), TOLERANT]),
        init_modality_noise=st.just(noise()),
    ),
)
planned = st.sampled_from(
    [
        dict(plan=["text", (LINE, (2,)), ("text", 3)]),
        dict(plan=[(IMAGE, (1, 2)), (VECTOR, ()), "text"]),
        dict(plan=[("text", 2), (VIDEO, (1, 2, 1))]),
        dict(force_modality_at_start=(LINE, (2,))),
        dict(init_modality=latents(IMAGE, 2, 1), strength=0.6),
        dict(init_modality=latents(LINE, 2), modality_mask=torch.tensor([True, False])),
    ]
)
free = st.sampled_from(
    [
        dict(),
        dict(allowed_modalities=()),
        dict(allowed_modalities=(IMAGE, VECTOR)),
        dict(stop_ids=(1,)),
        dict(stop_ids=(0, 2), fixed_modality_shape=(2,)),
        dict(fixed_modality_shape=(1, 2)),
    ]
)
options = st.builds(
    lambda *given: {k: v for part in given for k, v in part.items()},
    text_options,
    drawing_options,
    st.one_of(planned, free, free),
)
cases = st.builds(
    Case,
    name=st.sampled_from(sorted(MODELS)),
    seed=st.integers(0, 99),
    prompts=st.lists(prompts, min_size=2, max_size=4),
    room=st.integers(13, 22),
    options=options,
    most=st.integers(1, 3),
)


def assert_is_a_sample(model, sample, prompt, most: int) -> None:
    """Text and modalities in turn, from sos on, the prompt first, and no longer than it may be."""
    assert [isinstance(part, tuple) for part in sample] == [i % 2 == 1 for i in range(len(sample))]
    assert sample[0][0] == model.sos_id
    slots = slots_of(model, sample)
    assert num_given(model, prompt) <= len(slots) <= most
    assert slots.count(model.sos_id) == 1
    assert model.eos_id not in slots[:-1]
    for before, (modality, x), after in zip(sample[::2], sample[1::2], sample[2::2], strict=False):
        opening = model.vocabulary.opening(modality, tuple(x.shape[:-1])).tolist()
        assert before[-len(opening) :].tolist() == opening
        assert after[0] == model.eom_ids[modality]
        assert x.isfinite().all()


def assert_same_samples(got, expected) -> None:
    for sample, wanted in zip(got, expected, strict=True):
        assert_same(sample, wanted)


@settings(max_examples=8, **DERANDOMIZED)
@given(cases)
@example(Case("plain", 1, [text(1), text(1), None], 20, dict(text_temperature=1.0, cfg_scale=2.0), 2))
def test_every_way_to_compute_a_sample_gives_the_same(case):
    model = case.model
    arguments = case.arguments(model)
    engine = model.create_engine(max_batch=case.most)
    samples = engine.sample_many(case.prompts, generator=case.sources(), **arguments)
    again = model.sample_many(case.prompts, cache_kv=False, generator=case.sources(), **arguments)
    assert_same_samples(samples, again)
    alone = [
        model.sample(prompt, generator=source, **arguments)
        for prompt, source in zip(case.prompts, case.sources(), strict=True)
    ]
    assert_same_samples(samples, alone)
    for sample, prompt in zip(samples, case.prompts, strict=True):
        assert_is_a_sample(model, sample, prompt, arguments["max_length"])
    assert_no_row_is_lost(engine)


@settings(max_examples=6, **DERANDOMIZED)
@given(cases)
def test_every_sample_is_a_prompt(case):
    """It comes back as it is where there is no room for more, and goes on where there is."""
    model = case.model
    samples = model.sample_many(case.prompts, generator=case.sources(), **case.arguments(model))
    for sample in samples:
        if slots_of(model, sample)[-1] in model.som_ids:  # what did not fit, and is drawn where the caller asks for it
            continue
        length = len(slots_of(model, sample))
        is_whole = slots_of(model, sample)[-1] == model.eos_id
        [same] = model.sample_many([sample], **GREEDY | dict(max_length=length - is_whole))
        [longer] = model.sample_many([sample], **GREEDY | dict(max_length=length + 8, modality_steps=1))
        assert_same(same, sample, tolerance=0)
        assert slots_of(model, longer)[: length - is_whole] == slots_of(model, same)[: length - is_whole]
        assert_same(drawn(longer)[: len(drawn(sample))], drawn(sample), tolerance=0)


@settings(max_examples=2, **DERANDOMIZED)
@given(cases)
def test_flex_attention_gives_the_same(case):
    transformer = MODELS[case.name].get("transformer", {}) | dict(use_flex_attn=True)
    model, flexible = (
        case.model,
        build(seed=case.seed, push=dict(meta=0.8), **MODELS[case.name] | dict(transformer=transformer)),
    )
    for weight, other in zip(model.parameters(), flexible.parameters(), strict=True):
        assert torch.equal(weight, other)
    arguments = case.arguments(model) | dict(max_length=max(num_given(model, it) for it in case.prompts[:2]) + 13)
    expected = model.sample_many(case.prompts[:2], generator=case.sources()[:2], **arguments)
    for cached in (True, False):
        samples = flexible.sample_many(case.prompts[:2], cache_kv=cached, generator=case.sources()[:2], **arguments)
        assert_same_samples(samples, expected)


arrivals = st.lists(st.tuples(prompts, options, st.integers(0, 6), st.integers(0, 9)), min_size=2, max_size=4)


@settings(max_examples=5, **DERANDOMIZED)
@given(seed=st.integers(0, 99), most=st.integers(1, 3), arrivals=arrivals, cancelled=st.integers(0, 3))
def test_requests_of_any_kind_come_and_go_and_become_what_they_are_alone(seed, most, arrivals, cancelled):
    """Each with options of its own, at any time; one of them is cancelled on the way."""
    model = build(seed=seed, push=dict(meta=0.8))
    engine, requests = model.create_engine(max_batch=most), []

    def arguments(i):
        prompt, given, _, room = arrivals[i]
        limit = num_given(model, prompt) + 13 + room
        return dict(max_length=limit, max_modality_tokens=MOST, generator=generators(i)) | given

    for i, (prompt, _, turns, _) in enumerate(arrivals):
        requests.append(engine.submit(prompt, **arguments(i)))
        for _ in range(turns):
            engine.step()
    if cancelled < len(requests):
        requests[cancelled].cancel()
    engine.run()
    for i, (request, (prompt, *_)) in enumerate(zip(requests, arrivals, strict=True)):
        expected = model.sample_many([prompt], cache_kv=False, **arguments(i))[0]
        if i == cancelled:
            assert (
                slots_of(model, request.result()) == slots_of(model, expected)[: len(slots_of(model, request.result()))]
            )
        else:
            assert_same(request.result(), expected)
    assert_no_row_is_lost(engine)
