"""Choosing tokens: filters by their definitions, mixed rows by their exact frequencies, options through a model."""

from dataclasses import replace
from math import exp, inf, log

import pytest
import torch
from generation_models import (
    GREEDY,
    IMAGE,
    LINE,
    WRITES,
    assert_same,
    build,
    drawn,
    grammar_of,
    latents,
    noise,
    num_given,
    shapes_of,
    slots_of,
    text,
)

from transfusion_pytorch.generation import sampler
from transfusion_pytorch.generation.events import Ended, EndReason
from transfusion_pytorch.generation.options import SamplingOptions
from transfusion_pytorch.generation.sampler import NO_CHOICE, SamplingTensors, log_probabilities, penalize
from transfusion_pytorch.sequence.hashing import uniform as hashed

NAN = float("nan")
DTYPES = [torch.float32, torch.float64]
EVERYTHING = SamplingOptions(text_min_p=0.0)
FREE = dict(GREEDY, max_length=20, modality_steps=1, text_temperature=1.0, text_min_p=0.0)


def sample_tokens(logits, allowed, rows, uniform, seen=None) -> list[int]:
    """An id for each row of logits, as `sampler.sample_tokens` chooses it from the options of each."""
    sampling = SamplingTensors.of(rows, device=logits.device, dtype=torch.promote_types(logits.dtype, torch.float32))
    numbers = torch.tensor(uniform, dtype=torch.float64).clamp(max=1 - 1e-7)  # as those of a `BatchState`
    return sampler.sample_tokens(logits, ~allowed, sampling, numbers, seen).tolist()


def keep_top_k(logits, k):
    return sampler.keep_top_k(logits, k, int(k.max()))


def keep_top_p(logits, p):
    return sampler.keep_top_p(logits, p)


def keep_min_p(logits, min_p):
    likeliest = logits.amax(dim=-1, keepdim=True)
    kept = sampler.keep_min_p(logits - likeliest, min_p.log())
    return logits.masked_fill(kept == -inf, -inf)


# the definitions, one row of floats at a time


def probabilities(row: list[float]) -> list[float]:
    weights = [exp(x - max(row)) for x in row]
    return [weight / sum(weights) for weight in weights]


def only(row: list[float], kept) -> list[float]:
    return [x if i in kept else -inf for i, x in enumerate(row)]


def naive_top_k(row: list[float], k: int) -> list[float]:
    last = sorted(row, reverse=True)[: int(k)][-1]
    return only(row, {i for i, x in enumerate(row) if x >= last})


def naive_top_p(row: list[float], p: float) -> list[float]:
    kept, total, shares = set(), 0.0, probabilities(row)
    for i in sorted(range(len(row)), key=lambda i: -shares[i]):
        if total >= p and p < 1:
            break
        kept.add(i)
        total += shares[i]
    return only(row, kept)


def naive_min_p(row: list[float], min_p: float) -> list[float]:
    shares = probabilities(row)
    return only(row, {i for i, share in enumerate(shares) if share >= min_p * max(shares) * (1 - 1e-6)})


def naive_penalty(row: list[float], seen, penalty: float) -> list[float]:
    return [(x / penalty if x > 0 else x * penalty) if i in seen else x for i, x in enumerate(row)]


def naive_distribution(row: list[float], allowed, options: SamplingOptions, seen=()) -> list[float]:
    """What `SamplingOptions` says, in its order."""
    row = only(naive_penalty(row, seen, options.text_repetition_penalty), allowed)
    if options.text_top_k is not None:
        row = naive_top_k(row, options.text_top_k)
    row = naive_min_p(naive_top_p(row, options.text_top_p), options.text_min_p)
    if options.text_temperature == 0:
        return [float(i == row.index(max(row))) for i in range(len(row))]
    return probabilities([x / options.text_temperature for x in row])


def rows_with_ties(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Random logits: the even rows with many ties, and some tokens that may not come, but never all of them."""
    logits = torch.randn(rows, width, dtype=dtype)
    logits[::2] = (2 * logits[::2]).round() / 2
    masked = torch.rand(rows, width) < 0.2
    masked[:, 3] = False
    return logits.masked_fill(masked, -inf)


FILTERS = {
    "top k": (keep_top_k, naive_top_k, [1, 2, 3, 7, 8, 9, 1000]),
    "top p": (keep_top_p, naive_top_p, [1e-6, 0.137, 0.351, 0.5003, 0.7891, 0.9511, 0.99991, 1.0]),
    "min p": (keep_min_p, naive_min_p, [0.0, 1e-6, 0.137, 0.351, 0.5003, 0.9511, 1.0]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_keeps_in_every_row_what_its_definition_keeps(name, dtype):
    keep, naive, values = FILTERS[name]
    logits = rows_with_ties(40 * len(values), 8, dtype)
    column = torch.tensor(values * 40, dtype=None if name == "top k" else dtype)[:, None]
    if name == "top k":
        column = column.long()
    expected = [naive(row, value) for row, value in zip(logits.tolist(), values * 40, strict=True)]
    got = keep(logits, column)
    assert got.dtype == dtype
    assert got.tolist() == expected
    assert len({sum(x > -inf for x in row) for row in expected}) > 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_penalty_is_that_of_ctrl_in_every_row(dtype):
    penalties = [0.5, 1.0, 1.25, 2.0, 8.0]  # a power of two or thereabouts: equal to the last digit
    logits, seen = rows_with_ties(40, 8, dtype), torch.rand(40, 8) < 0.5
    got = penalize(logits, seen, torch.tensor(penalties * 8, dtype=dtype)[:, None])
    expected = [
        naive_penalty(row, mask.nonzero().flatten().tolist(), penalty)
        for row, mask, penalty in zip(logits.tolist(), seen, penalties * 8, strict=True)
    ]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=dtype), rtol=1e-6, atol=0)
    assert (got != logits).any(dim=1).sum() > 20


def test_examples_of_ties():
    row = torch.tensor([[0.1, 0.2, 0.2, 0.2, 0.3]], dtype=torch.float64).log()

    def kept(filtered) -> list[int]:
        return filtered.isfinite().nonzero()[:, 1].tolist()

    assert kept(keep_top_k(row, torch.tensor([[2]]))) == [1, 2, 3, 4], "what ties with the last stays"
    assert kept(keep_top_p(row, torch.tensor([[0.45]]))) == [1, 4], "the first of equals comes first"
    assert kept(keep_top_p(row, torch.tensor([[0.55]]))) == [1, 2, 4]
    assert kept(keep_min_p(row, torch.tensor([[0.66]]))) == [1, 2, 3, 4]
    assert kept(keep_min_p(row, torch.tensor([[0.67]]))) == [4]


# the choice


OPTIONS = [
    EVERYTHING,
    replace(EVERYTHING, text_temperature=0.0),
    replace(EVERYTHING, text_temperature=0.4),
    replace(EVERYTHING, text_temperature=2.5, text_top_k=3),
    replace(EVERYTHING, text_top_k=100, text_top_p=0.61),
    replace(EVERYTHING, text_temperature=3.0, text_min_p=0.21),
    replace(EVERYTHING, text_top_k=4, text_top_p=0.81, text_min_p=0.31, text_temperature=5.0),
    replace(EVERYTHING, text_repetition_penalty=1.7, text_top_k=3),
    replace(EVERYTHING, text_repetition_penalty=0.6, text_top_p=0.71, text_temperature=0.0),
    replace(EVERYTHING, text_repetition_penalty=2.0, text_min_p=0.11, text_top_p=0.91),
]


def mixed_rows(repeats: int, dtype=torch.float64):
    """Logits, what is allowed, and what came before, of a row for each of `OPTIONS`, in many rows each."""
    logits = torch.randn(len(OPTIONS), 6, dtype=dtype)
    allowed, seen = torch.rand(len(OPTIONS), 6) < 0.8, torch.rand(len(OPTIONS), 6) < 0.4
    allowed[:, 2] = True
    allowed[2] = torch.arange(6) == 4
    seen &= torch.tensor([[options.text_repetition_penalty != 1] for options in OPTIONS])
    return [table.repeat_interleave(repeats, dim=0) for table in (logits, allowed, seen)]


def ids_of(mask: torch.Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_evenly_spaced_numbers_give_every_token_its_share(dtype):
    """The inverse of the cumulative distribution: in `n` even steps a token of probability p comes n p times, +- 1."""
    count = 1000
    logits, allowed, seen = mixed_rows(count, dtype)
    uniform = [(i + 0.5) / count for i in range(count)] * len(OPTIONS)
    options = [row for row in OPTIONS for _ in range(count)]
    tokens = torch.tensor(sample_tokens(logits, allowed, options, uniform, seen)).view(len(OPTIONS), count)
    for i, row in enumerate(OPTIONS):
        at = i * count
        expected = naive_distribution(logits[at].tolist(), ids_of(allowed[at]), row, ids_of(seen[at]))
        shares = torch.bincount(tokens[i], minlength=6) / count
        assert (shares - torch.tensor(expected)).abs().max() <= 1 / count, row
        assert [share > 0 for share in shares] == [share > 1 / count for share in expected], row
        assert (tokens[i].diff() >= 0).all()


def test_tokens_of_a_mixed_batch_come_as_often_as_each_temperature_says():
    count, temperatures = 20_000, [0.0, 0.5, 1.0, 1.7, 4.0]
    row = [0.3, -0.4, 1.1, 0.0]
    options = [replace(EVERYTHING, text_temperature=temperature) for temperature in temperatures] * count
    tokens = sample_tokens(
        torch.tensor([row]).expand(len(options), -1),
        torch.ones(1, 4, dtype=torch.bool),
        options,
        torch.rand(len(options), dtype=torch.float64).tolist(),
    )
    tokens = torch.tensor(tokens).view(count, -1)
    for column, temperature in zip(tokens.T[1:], temperatures[1:], strict=True):
        expected = count * torch.tensor(probabilities([x / temperature for x in row]))
        chi_square = ((torch.bincount(column, minlength=4) - expected) ** 2 / expected).sum()
        assert chi_square < 16.3, "beyond the 99.9th percentile of 3 degrees of freedom"
    assert set(tokens[:, 0].tolist()) == {2}


def one_by_one(logits, allowed, options, uniform, seen) -> list[int]:
    return [
        sample_tokens(logits[i : i + 1], allowed[i : i + 1], [row], [uniform[i]], seen[i : i + 1])[0]
        for i, row in enumerate(options)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *DTYPES])
def test_a_row_does_not_depend_on_the_others(dtype):
    logits, allowed, seen = mixed_rows(30, dtype)
    options = [row for row in OPTIONS for _ in range(30)]
    uniform = torch.rand(len(options), dtype=torch.float64).tolist()
    alone = one_by_one(logits, allowed, options, uniform, seen)
    assert sample_tokens(logits, allowed, options, uniform, seen) == alone
    order = torch.randperm(len(options))
    shuffled = [[values[i] for i in order] for values in (options, uniform)]
    assert sample_tokens(logits[order], allowed[order], *shuffled, seen[order]) == [alone[i] for i in order]
    assert all(allowed[i, token] for i, token in enumerate(alone))


@pytest.mark.parametrize("other", OPTIONS)
@pytest.mark.parametrize("gap", [10.0, 16.0, 18.0, 20.0])
def test_a_rare_token_is_not_lost_beside_a_row_of_other_options(gap, other):
    """Sums of single precision come to 1 before the last token does."""
    logits, allowed = torch.tensor([[gap, *[0.0] * 40]]), torch.ones(2, 41, dtype=torch.bool)
    for uniform in (0.5, 1 - 1e-7, 1 - 1e-9):
        [alone] = sample_tokens(logits, allowed[:1], [EVERYTHING], [uniform])
        both = sample_tokens(logits.expand(2, -1), allowed, [EVERYTHING, other], [uniform, 0.5])
        assert both[0] == alone


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("uniform", [0.0, 0.5, 0.999999999, 1 - 2**-53])
def test_no_number_chooses_a_token_that_cannot_come(uniform, dtype):
    logits = torch.randn(300, 9, dtype=dtype)
    logits[:, [0, 4, 8]] = -inf
    logits[:, [1, 7]] = -1e4  # the probability is 0 to the last digit
    allowed = torch.rand(300, 9) < 0.6
    allowed[:, 3] = True
    logits[:100, 3] = 0.0
    for options in OPTIONS:
        tokens = sample_tokens(logits, allowed, [options] * 300, [uniform] * 300)
        assert set(tokens) <= {2, 3, 5, 6}
        assert all(allowed[i, token] for i, token in enumerate(tokens))


def test_the_ends_of_the_interval_are_the_ends_of_the_distribution():
    logits = torch.tensor([[-inf, 1.0, 0.0, 1.0, -inf]])
    allowed = torch.ones(1, 5, dtype=torch.bool)
    assert sample_tokens(logits, allowed, [EVERYTHING], [0.0]) == [1]
    assert sample_tokens(logits, allowed, [EVERYTHING], [0.999999999]) == [3]
    only_last = torch.tensor([[False] * 4 + [True]])
    assert sample_tokens(torch.zeros(1, 5), only_last, [EVERYTHING], [0.0]) == [4]
    assert sample_tokens(torch.zeros(1, 5), only_last, [EVERYTHING], [0.999999999]) == [4]


@pytest.mark.parametrize(
    ("bad", "allowed"),
    [
        ([NAN, 0.0, 0.0], [True] * 3),
        ([NAN] * 3, [True] * 3),
        ([-inf] * 3, [True] * 3),
        ([inf, 0.0, 0.0], [True] * 3),
        ([0.0, 1.0, -inf], [False, False, True]),
        ([0.0] * 3, [False] * 3),
    ],
)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_row_without_a_choice_says_so_and_disturbs_no_other(bad, allowed, options):
    logits = torch.randn(9, 3)
    logits[4] = torch.tensor(bad)
    mask = torch.ones(9, 3, dtype=torch.bool)
    mask[4] = torch.tensor(allowed)
    uniform = torch.rand(9).tolist()
    others = [i for i in range(9) if i != 4]
    tokens = sample_tokens(logits, mask, [options] * 9, uniform)
    assert tokens[4] == NO_CHOICE
    assert [tokens[i] for i in others] == sample_tokens(
        logits[others], mask[others], [options] * 8, [uniform[i] for i in others]
    )


def test_what_is_not_allowed_may_be_anything():
    logits, allowed = torch.tensor([[NAN, 0.0, 5.0, inf]]), torch.tensor([[False, True, True, False]])
    for options in OPTIONS:
        assert sample_tokens(logits, allowed, [options], [0.9999]) == [2]


def support(shares: list[float], **options) -> set[int]:
    """The tokens of these probabilities that come at all."""
    row = replace(EVERYTHING, **options)
    uniform = [(i + 0.5) / 400 for i in range(400)]
    logits = torch.tensor([shares], dtype=torch.float64).log().expand(400, -1)
    allowed = torch.ones(1, len(shares), dtype=torch.bool)
    seen = torch.zeros(400, len(shares), dtype=torch.bool)
    seen[:, 0] = True
    return set(sample_tokens(logits, allowed, [row] * 400, uniform, seen))


def test_filters_act_in_their_order():
    shares = [0.4, 0.3, 0.2, 0.1]
    assert support(shares, text_top_k=2, text_top_p=0.5) == {0}, "top k first: 0.4 is 0.57 of what it leaves"
    assert support(shares, text_top_p=0.5) == {0, 1}
    assert support([0.05, 0.4, 0.3, 0.25], text_min_p=0.7, text_top_p=0.42) == {1, 2}, "top p first, then min p"
    assert support([0.05, 0.4, 0.3, 0.25], text_min_p=0.7, text_top_p=0.96) == {1, 2}
    assert support(shares, text_repetition_penalty=3.0, text_top_k=2) == {1, 2}, "the penalty before everything"
    assert support(shares, text_repetition_penalty=3.0, text_min_p=0.6) == {1, 2}
    assert support(shares, text_temperature=50.0, text_min_p=0.6) == {0, 1}, "the temperature after everything"
    assert support(shares, text_temperature=50.0, text_top_p=0.6) == {0, 1}
    assert support(shares, text_temperature=0.01, text_top_p=0.6) == {0}
    assert support(shares) == {0, 1, 2, 3}


# numbers at the edge of what a float is


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [1e-9, 1e-30, 1e-44, 1e-50, 1e-300])
def test_the_likeliest_stays_however_small_top_p(p, dtype):
    logits, allowed = torch.randn(50, 7, dtype=dtype), torch.ones(1, 7, dtype=torch.bool)
    tokens = sample_tokens(logits, allowed, [replace(EVERYTHING, text_top_p=p)] * 50, torch.rand(50).tolist())
    assert tokens == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1e6, 1e38, 1e39, 1e300])
def test_any_temperature_leaves_a_choice_of_what_is_allowed(temperature, dtype):
    logits, allowed = torch.randn(60, 4, dtype=dtype), torch.tensor([[True, False, True, True]])
    options = [replace(EVERYTHING, text_temperature=temperature)] * 60
    tokens = sample_tokens(logits, allowed, options, [(i + 0.5) / 60 for i in range(60)])
    assert tokens == [0] * 20 + [2] * 20 + [3] * 20


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("penalty", [1e39, 1e300, 10**30])
def test_any_penalty_leaves_a_choice(penalty, dtype):
    logits, allowed = torch.tensor([[0.0, 1.0, -1.0]], dtype=dtype), torch.ones(1, 3, dtype=torch.bool)
    options = [replace(EVERYTHING, text_repetition_penalty=penalty, text_temperature=0.0)]
    assert sample_tokens(logits, allowed, options, [0.5], torch.tensor([[True, False, False]])) == [1]


def test_a_top_k_beyond_any_vocabulary_keeps_everything():
    logits, allowed = torch.zeros(4, 4), torch.ones(1, 4, dtype=torch.bool)
    uniform = [0.1, 0.3, 0.6, 0.8]
    for k in (4, 5, 2**40, 2**63):
        assert sample_tokens(logits, allowed, [replace(EVERYTHING, text_top_k=k)] * 4, uniform) == [0, 1, 2, 3]


def test_options_are_as_precise_as_the_logits():
    assert support([0.5, 0.3, 0.2], text_top_p=0.8 - 1e-9) == {0, 1}
    assert support([0.5, 0.15, 0.35], text_min_p=0.3 - 1e-9) == {0, 1, 2}
    logits = torch.tensor([[1.2, 1.0 - 1e-8]], dtype=torch.float64)
    penalised = replace(EVERYTHING, text_temperature=0.0, text_repetition_penalty=1.2)
    assert sample_tokens(logits, torch.ones(1, 2).bool(), [penalised], [0.5], torch.tensor([[True, False]])) == [0]


# through a model


@pytest.mark.parametrize(
    "likeliest", [dict(text_top_k=1), dict(text_top_p=1e-6), dict(text_min_p=1.0), dict(text_temperature=1e-20)]
)
def test_what_leaves_the_likeliest_alone_is_greedy(likeliest):
    model, prompts = build(), [None, text(1), [text(2), latents(LINE, 2)]]
    shorter = GREEDY | dict(max_length=26, modality_steps=1)
    greedy = model.sample_many(prompts, init_modality_noise=noise(), **shorter)
    options = shorter | dict(text_temperature=2.0, text_min_p=0.0, init_modality_noise=noise()) | likeliest
    for sample, expected in zip(model.sample_many(prompts, **options), greedy, strict=True):
        assert_same(sample, expected)
    ids = torch.tensor([[1], [2], [3]])
    names = {name.removeprefix("text_"): value for name, value in likeliest.items()}
    written = model.generate_text_only(ids, 20, **dict(temperature=2.0, min_p=0.0) | names)
    assert torch.equal(written, model.generate_text_only(ids, 20, temperature=0.0))


def allowed_after(model, slots: list[int]) -> torch.Tensor:
    """What the grammar lets follow."""
    opening, grammar = None, grammar_of(model)
    for token in slots:
        opening = grammar.advance(opening, token)
    return grammar.allowed(opening)


def penalised_choices(model, sample: list, given: int, penalty: float, *, markers: bool = False) -> list[bool]:
    """Whether each id behind the `given` slots is the likeliest by one forward pass and the formula of CTRL."""
    with torch.no_grad():
        [logits] = model([sample], return_loss=False)
    slots, right = slots_of(model, sample), []
    for slot in range(given, len(slots)):
        if slots[slot] < 0 or slots[slot] in model.eom_ids:
            continue
        seen = {token for token in slots[:slot] if token >= 0 and (markers or token < model.vocabulary.num_text)}
        row = torch.tensor(naive_penalty(logits[slot - 1].tolist(), seen, penalty), dtype=logits.dtype)
        right.append(int(row.masked_fill(~allowed_after(model, slots[:slot]), -inf).argmax()) == slots[slot])
    return right


@pytest.mark.parametrize(("penalty", "cache_kv"), [(0.5, True), (1.6, True), (4.0, False)])
def test_repetition_penalty_is_that_of_one_forward_pass(penalty, cache_kv):
    model = build(num_text_tokens=7, push=dict(meta=0.9, eos=-2.0))
    prompts = [None, text(1, 2, 5), [text(6), latents(IMAGE, 1, 2), text(3)]]
    options = GREEDY | dict(init_modality_noise=noise(), text_repetition_penalty=penalty)
    samples = model.sample_many(prompts, cache_kv=cache_kv, **options)
    right, with_markers, without = [], [], []
    for sample, prompt in zip(samples, prompts, strict=True):
        ids = sample[-1].tolist()
        if model.meta_id in ids:
            sample = [*sample[:-1], sample[-1][: ids.index(model.meta_id)]]  # cut off before the latents came
        if not len(sample[-1]):
            sample = sample[:-1]
        given = num_given(model, prompt)
        right += penalised_choices(model, sample, given, penalty)
        with_markers += penalised_choices(model, sample, given, penalty, markers=True)
        without += penalised_choices(model, sample, given, 1.0)
    assert all(right)
    assert len(right) > 30
    assert not all(with_markers), "markers are never penalised"
    assert not all(without)


def test_what_a_shape_is_spelled_with_is_not_penalised():
    """Also where the same ids may follow every character, so that a step begins where the last one ended."""
    model = build(dim_latent=3, modality_num_dim=1, push=dict(eos=-99.0))
    model.to_logits.push[model.char_tokenizer("12")] = torch.tensor([10.0, 6.0], dtype=torch.float64)
    model.to_logits.push[model.meta_id] = 20.0
    options = GREEDY | dict(max_length=400, max_modality_tokens=200, modality_steps=1, text_repetition_penalty=4.0)
    sample = model.sample(text(1), **options)
    assert [tuple(x.shape) for _, x in drawn(sample)] == [(111, 3)] * 3


def naive_penalised(model, ids: list[int], seq_len: int, penalty: float) -> list[int]:
    """Greedy text, one whole forward pass for each token."""
    while len(ids) < seq_len:
        with torch.no_grad():
            logits = model(torch.tensor([ids]), return_loss=False)[0, -1, : model.vocabulary.num_text]
        row = naive_penalty(logits.tolist(), set(ids), penalty)
        ids = [*ids, row.index(max(row))]
    return ids


@pytest.mark.parametrize("penalty", [0.7, 1.2, 3.0])
def test_repetition_penalty_of_text_alone_is_that_of_the_naive_loop(penalty):
    model, prompt = build(num_text_tokens=9), torch.randint(0, 9, (3, 4))
    written = model.generate_text_only(prompt, 20, temperature=0.0, repetition_penalty=penalty)
    expected = [naive_penalised(model, ids, 20, penalty)[4:] for ids in prompt.tolist()]
    assert written.tolist() == expected
    assert expected != model.generate_text_only(prompt, 20, temperature=0.0).tolist()


def test_text_of_the_prompt_counts_as_said():
    model = build(num_text_tokens=5, push=dict(meta=-9.0, eos=-9.0))
    model.to_logits.push[:5] = torch.tensor([60.0, 50.0, 40.0, 30.0, 20.0])
    options = GREEDY | dict(text_repetition_penalty=1e3)
    said = [slots_of(model, model.sample(prompt, **options | dict(max_length=8))) for prompt in (None, text(1, 3))]
    assert said[0][1:6] == [0, 1, 2, 3, 4]
    assert said[1][1:6] == [1, 3, 0, 2, 4]


def submit(model, prompt, **options) -> tuple[list, EndReason | None]:
    request = (engine := model.create_engine()).submit(prompt, **options)
    engine.run()
    return request.result(), request.reason


def test_stop_ids_end_a_sample_once_written():
    model, prompt = build(push=dict(eos=-9.0, meta=-0.2)), text(0, 1, 2, 3)
    options = GREEDY | dict(init_modality_noise=noise())
    whole, reason = submit(model, prompt, **options)
    assert reason is EndReason.LENGTH
    slots = slots_of(model, whole)
    for stop, kind in zip(range(4), (list, tuple, set, frozenset), strict=True):
        end = 5 + slots[5:].index(stop) + 1
        stopped, reason = submit(model, prompt, stop_ids=kind([stop]), **options)
        assert reason is EndReason.STOP
        assert slots_of(model, stopped) == slots[:end], "those of the prompt stop nothing"
    first = min(5 + slots[5:].index(token) for token in (2, 1))
    assert slots_of(model, model.sample(prompt, stop_ids=[2, 1], **options)) == slots[: first + 1]


def test_a_stop_id_that_never_comes_changes_nothing():
    model = build(push={"eos": 0.5})
    model.to_logits.push[2] = -50.0
    options = GREEDY | dict(init_modality_noise=noise())
    assert_same(model.sample(text(2), stop_ids=[2], **options), model.sample(text(2), **options), tolerance=0)


# logits processors


class Watch:
    """Notes what it is given and changes nothing but the logits, which are a copy."""

    def __init__(self):
        self.calls, self.ids = [], []

    def __call__(self, ids, logits):
        self.calls.append((ids.tolist(), tuple(logits.shape), logits.is_floating_point()))
        self.ids.append(ids)
        made = logits.clone()
        logits.fill_(NAN)
        return made


def test_processors_see_all_ids_and_one_row_of_logits():
    model, watch = build(seed=1), Watch()
    options = GREEDY | dict(init_modality_noise=noise())
    prompt = [text(1), latents(IMAGE, 1, 2), text(2)]
    sample = model.sample(prompt, logits_processors=[watch], **options)
    assert_same(sample, model.sample(prompt, **options))
    ids = [token for token in slots_of(model, sample) if token >= 0]
    given = [4, 1, *model.vocabulary.opening(IMAGE, (1, 2)).tolist(), model.eom_ids[IMAGE], 2]
    assert ids[: len(given)] == given
    written = [i for i, token in enumerate(ids) if i >= len(given) and token not in model.eom_ids]
    assert [call[0] for call in watch.calls] == [ids[:i] for i in written]
    assert {call[1:] for call in watch.calls} == {((model.vocabulary.num_logits,), True)}
    assert [kept.tolist() for kept in watch.ids] == [call[0] for call in watch.calls], "they may be kept"


def test_ids_for_processors_are_not_copied_for_every_token():
    """Constant time per token: they are views of one buffer, which doubles."""
    watch = Watch()
    build(push=dict(meta=-9.0, eos=-9.0)).sample(logits_processors=[watch], **GREEDY | dict(max_length=300))
    assert len(watch.ids) == 299
    assert len({ids.data_ptr() for ids in watch.ids}) == 4  # for 64, 130, 262 and 526


def test_processors_of_text_alone_see_the_text():
    model, watch = build(num_text_tokens=9), Watch()
    prompt = torch.tensor([[1, 2], [3, 4]])
    written = model.generate_text_only(prompt, 6, temperature=0.0, logits_processors=[watch])
    assert torch.equal(written, model.generate_text_only(prompt, 6, temperature=0.0))
    rows = torch.cat([prompt, written], dim=1).tolist()
    assert sorted(call[0] for call in watch.calls) == sorted(row[:n] for row in rows for n in range(2, 6))


class Force:
    """Wants these tokens, one after the other, whatever the logits."""

    def __init__(self, *tokens: int):
        self.tokens = list(tokens)

    def __call__(self, ids, logits):
        return torch.full_like(logits, -inf).index_fill(0, torch.tensor(self.tokens.pop(0)), 0.0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_processor_can_write_whatever_is_allowed(temperature):
    model = build()
    opening = model.vocabulary.opening(IMAGE, (2, 3)).tolist()
    force = Force(3, 0, 0, *opening, 2, model.eos_id)
    sample = model.sample(logits_processors=[force], **GREEDY | dict(text_temperature=temperature))
    assert shapes_of(sample) == [[4, 3, 0, 0, *opening], (IMAGE, (2, 3, 1)), [model.eom_ids[IMAGE], 2, model.eos_id]]
    assert force.tokens == []


def test_processors_act_in_turn_and_before_everything_else():
    model = build()

    def times_two(ids, logits):
        return 2 * logits

    def favour(token):
        return lambda ids, logits: logits.index_fill(0, torch.tensor(token), 5.0)

    options = GREEDY | dict(max_length=6, plan=["text"], stop_ids=())
    first = slots_of(model, model.sample(logits_processors=[favour(1), times_two, favour(2)], **options))
    assert first[1:] == [1] * 5, "10 and 5"
    options |= dict(text_repetition_penalty=4.0)
    penalised = slots_of(model, model.sample(logits_processors=[favour(1), times_two, favour(2)], **options))
    assert penalised[1:3] == [1, 2], "the penalty comes behind them: 10 / 4 and 5"


@pytest.mark.parametrize("token", ["sos", "eom", "char", "som", "null-most"])
def test_a_processor_cannot_write_what_is_not_allowed(token):
    model = build()
    vocabulary = model.vocabulary
    ids = {
        "sos": [vocabulary.sos],
        "eom": vocabulary.eom,
        "som": vocabulary.som,
        "char": [vocabulary.first_char, vocabulary.first_char + 3, vocabulary.first_char + 10],
        "null-most": [vocabulary.num_logits - 1],
    }[token]

    def wish(seen, logits):
        return logits.index_fill(0, torch.tensor(ids), 1e4)

    sample = model.sample(text(1), logits_processors=[wish], init_modality_noise=noise(), **GREEDY)
    slots, grammar, opening = slots_of(model, sample), grammar_of(model), None
    for i, slot in enumerate(slots):
        if i >= 2 and slot >= 0 and slot not in vocabulary.eom:
            assert grammar.allowed(opening)[slot]
        opening = grammar.advance(opening, slot)
    with pytest.raises(ValueError, match="prompt 0: the logits of the next token are not finite"):
        model.sample(text(1), logits_processors=[Force(ids[0])], **GREEDY)


def fail(ids, logits):
    if len(ids) > 2:
        raise LookupError("no idea")
    return logits


BAD = {
    "raises": (fail, LookupError, "no idea"),
    "returns nothing": (lambda ids, logits: None, ValueError, r"must return logits of shape \(26,\), got NoneType"),
    "returns a list": (lambda ids, logits: logits.tolist(), ValueError, r"shape \(26,\), got list"),
    "returns complex numbers": (lambda ids, logits: logits * 1j, ValueError, r"got complex ones of \(26,\)"),
    "returns a batch": (lambda ids, logits: logits[None], ValueError, r"shape \(26,\), got \(1, 26\)"),
    "returns fewer": (lambda ids, logits: logits[:4], ValueError, r"shape \(26,\), got \(4,\)"),
    "returns NaN": (lambda ids, logits: logits * NAN, ValueError, "prompt 0: the logits of the next token are not"),
    "returns nothing likely": (lambda ids, logits: logits - inf, ValueError, "the logits of the next token are not"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_error_of_a_processor_reaches_the_caller(name):
    processor, error, message = BAD[name]
    model = build(push=dict(eos=-9.0))
    with pytest.raises(error, match=message):
        model.sample(text(1), logits_processors=[processor], **GREEDY)
    with pytest.raises(error, match=message):
        model.sample_many([text(1), None], logits_processors=[processor], **GREEDY)
    with pytest.raises(error, match=message):
        list(model.sample_stream(text(1), logits_processors=[processor], **GREEDY))
    with pytest.raises(error, match=message.replace("prompt 0", "text 0")):
        model.generate_text_only(torch.tensor([[1, 2, 3]]), 8, logits_processors=[processor])


SEEDED = [None, text(1), [text(2), latents(LINE, 2)], text(3, 1)]


def seeded(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.fixture(scope="module")
def undisturbed():
    model = build(push=dict(eos=-0.5))
    return model, model.sample_many(SEEDED, generator=seeded(4), **FREE)


@pytest.mark.parametrize("name", BAD)
def test_an_error_of_a_processor_ends_its_own_request_only(undisturbed, name):
    (model, expected), (processor, error, message) = undisturbed, BAD[name]
    engine, requests = model.create_engine(max_batch=3), []
    for i, (prompt, generator) in enumerate(zip(SEEDED, seeded(4), strict=True)):
        requests.append(engine.submit(prompt, generator=[generator], **FREE))
        if i == 1:
            bad = engine.submit(text(1), logits_processors=[processor], generator=[torch.Generator()], **FREE)
    engine.run()
    for request, sample in zip(requests, expected, strict=True):
        assert_same(request.result(), sample)
        assert request.reason is not EndReason.ERROR
    assert bad.reason is EndReason.ERROR
    with pytest.raises(error, match=message):
        bad.result()
    ended = bad.new_events()[-1]
    assert isinstance(ended, Ended)
    assert isinstance(ended.error, error)
    assert slots_of(model, ended.sample)[:2] == [4, 1]


def test_logits_keep_their_precision_beside_a_request_with_processors(monkeypatch):
    """The gap is below what single precision tells from nothing."""
    model = build(push=dict(eos=-9.0, meta=-9.0))
    row = torch.zeros(model.vocabulary.num_logits, dtype=torch.float64)
    row[1], row[2] = 1.0, 1.0 + 1e-10
    monkeypatch.setattr(model, "logits", lambda features: row.expand(len(features), -1))
    options = GREEDY | dict(max_length=5)
    engine = model.create_engine()
    plain = engine.submit(None, **options)
    processed = engine.submit(None, logits_processors=[Watch()], **options)
    engine.run()
    assert shapes_of(plain.result()) == shapes_of(model.sample(**options)) == [[4, 2, 2, 2, 2]]
    assert shapes_of(processed.result()) == [[4, 2, 2, 2, 2]]


# text alone, with all its options


def naive_written(model, ids: list[int], seq_len: int, options: SamplingOptions, generator) -> list[int]:
    """One whole forward pass for each token, and one random number: that of the seed of the request and of how many
    were written.
    """
    seed, given = torch.randint(2**62, (1,), generator=generator), len(ids)
    while len(ids) < seq_len:
        with torch.no_grad():
            logits = model(torch.tensor([ids]), return_loss=False)[0, -1].tolist()
        shares = naive_distribution(logits, range(model.vocabulary.num_text), options, set(ids))
        uniform, token = float(hashed(seed, torch.tensor(len(ids) - given), torch.device("cpu"))), 0
        while sum(shares[: token + 1]) <= uniform:
            token += 1
        ids = [*ids, token]
    return ids


@pytest.mark.parametrize("options", [OPTIONS[i] for i in (3, 4, 6, 8, 9)])
def test_text_alone_is_that_of_a_naive_sampler(options):
    model, prompt = build(num_text_tokens=9), torch.randint(0, 9, (3, 2))
    names = ("temperature", "min_p", "top_k", "top_p", "repetition_penalty")
    chosen = {name: getattr(options, f"text_{name}") for name in names}
    written = model.generate_text_only(prompt, 12, generator=seeded(3), max_batch=2, **chosen)
    expected = [
        naive_written(model, ids, 12, options, generator)[2:]
        for ids, generator in zip(prompt.tolist(), seeded(3), strict=True)
    ]
    assert written.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, *DTYPES])
def test_log_probabilities_are_those_of_all_that_the_model_can_write(dtype):
    """A row without a choice has any, and every other its own."""
    logits, tokens = torch.randn(5, 6, dtype=dtype), torch.tensor([0, 5, 2, NO_CHOICE, 3])
    got = log_probabilities(logits, tokens)
    for i in (0, 1, 2, 4):
        expected = log(probabilities(logits[i].tolist())[int(tokens[i])])
        assert float(got[i]) == pytest.approx(expected, abs=1e-5)


def test_random_numbers_do_not_run_out():
    """They are made for many steps at once; a request that stays for longer, and one that enters beside it, go on."""
    model, options = build(num_text_tokens=9), replace(EVERYTHING, text_temperature=3.0)
    written = model.generate_text_only(torch.tensor([[3]]), 140, temperature=3.0, min_p=0.0, generator=seeded(1))
    assert written[0].tolist() == naive_written(model, [3], 140, options, seeded(1)[0])[1:]
    engine, free = build(push=dict(meta=-9.0, eos=-9.0)).create_engine(), FREE | dict(text_temperature=3.0)
    long = engine.submit(text(1), generator=seeded(1)[0], **free | dict(max_length=150))
    for _ in range(60):
        engine.step()
    short = engine.submit(text(2), generator=seeded(2)[1], **free | dict(max_length=80))
    engine.run()
    for request, prompt, seed, length in ((long, text(1), 0, 150), (short, text(2), 1, 80)):
        alone = engine.sample_many([prompt], generator=seeded(2)[seed], **free | dict(max_length=length))
        assert_same(request.result(), alone[0], tolerance=0)


def test_log_of_a_share_is_a_logit():
    """The oracle itself, where the answer is known."""
    row = [log(share) for share in (0.5, 0.25, 0.125, 0.125)]
    assert naive_distribution(row, {0, 1, 3}, replace(EVERYTHING, text_top_k=2)) == pytest.approx([2 / 3, 1 / 3, 0, 0])
    squared = replace(EVERYTHING, text_temperature=0.5)
    assert naive_distribution(row, range(4), squared) == pytest.approx([16 / 22, 4 / 22, 1 / 22, 1 / 22])


def test_new_tokens_are_counted_behind_each_prompt():
    """The same as a length of its own for each prompt, and no more than `max_length`."""
    model, prompts = build(push=WRITES), [text(1), text(*[2] * 9), [text(3), latents(LINE, 2)]]
    for most in (7, 200):
        options = dict(text_temperature=0.0, max_new_tokens=most, max_length=40, allowed_modalities=())
        samples = model.sample_many(prompts, **options)
        for sample, prompt in zip(samples, prompts, strict=True):
            with pytest.warns(UserWarning, match="more than max_length"):
                given = len(slots_of(model, model.sample(prompt, max_length=1)))
            expected = model.sample(prompt, **options | dict(max_new_tokens=None, max_length=min(40, given + most)))
            assert_same(sample, expected)
            assert len(slots_of(model, sample)) == min(40, given + most)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        model.sample(text(1), max_new_tokens=0)
