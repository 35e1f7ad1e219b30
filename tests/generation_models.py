"""Small models for the tests of sampling, and oracles that know nothing of the engine."""

from collections.abc import Callable
from math import cos, log1p, pi, prod, sin, sqrt

import torch
from torch import Tensor, nn
from torchdiffeq import odeint

from transfusion_pytorch import Transfusion
from transfusion_pytorch.sequence.grammar import Grammar
from transfusion_pytorch.sequence.samples import MAX_AXES, Modality, Piece, Text

VECTOR, LINE, IMAGE, VIDEO = range(4)  # the modalities of `build`, of 0 to 3 axes
CHANNELS = (2, 3, 1, 2)
GREEDY = dict(text_temperature=0.0, modality_steps=2, max_length=40, max_modality_tokens=6)
WRITES = dict(meta=-9.0, eos=-9.0)  # pushed so (`build`), a model writes text and nothing else


# options of `build`: everything that the transformer and its read-out can be
MODELS = {
    "plain": dict(),
    "kv_heads": dict(transformer=dict(kv_heads=1)),
    "laser": dict(transformer=dict(attn_laser=True)),
    "value residual": dict(transformer=dict(use_value_residual=True)),
    "hyper-connections": dict(transformer=dict(num_residual_streams=2)),
    "frac-connections": dict(transformer=dict(num_residual_fracs=2)),
    "softcap": dict(transformer=dict(attn_kwargs=dict(softcap_value=2.0))),
    "no gates": dict(transformer=dict(attn_kwargs=dict(gate_values=False))),
    "no skips": dict(transformer=dict(unet_skips=False)),
    "no norm of queries": dict(transformer=dict(qk_rmsnorm=False)),
    "swiglu": dict(transformer=dict(ff_kwargs=dict(activation="swiglu"))),
    "three layers": dict(transformer=dict(depth=3)),
    "clean": dict(model_output_clean=True),
    "no positions": dict(add_pos_emb=False),
}


class Lively(nn.Linear):
    """A read-out whose choices hang on the last digits of what it reads: greedy text is no loop, and any slip shows."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(40 * super().forward(x)) + self.push


def build(
    *,
    seed: int = 0,
    push: dict[str, float] | None = None,
    transformer: dict | None = None,
    dtype: torch.dtype = torch.float64,
    **options,
):
    """A tiny model whose every parameter is perturbed, so that nothing is zero by initialisation.

    `push` moves the logits of `meta`, `eos` and others, which lie between -1 and 1.
    """
    torch.manual_seed(seed)
    options = dict(num_text_tokens=4, dim_latent=CHANNELS, modality_num_dim=(0, 1, 2, 3)) | options
    model = Transfusion(transformer=dict(dim=8, depth=2, dim_head=4, heads=2) | (transformer or {}), **options)
    model.to_logits = Lively(8, model.vocabulary.num_logits, bias=False)
    model.to_logits.register_buffer("push", torch.zeros(model.vocabulary.num_logits))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        for name, value in (dict(meta=0.6, eos=-0.2) | (push or {})).items():
            ids = getattr(model.vocabulary, name)
            model.to_logits.push[list(ids) if isinstance(ids, tuple) else ids] = value
    return model.to(dtype).eval()


def noise(rows: int = 64, channels: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def options_over(**own) -> Callable[..., dict]:
    """The options that the tests of a module begin with, as a function of those that a test replaces."""
    return lambda **options: GREEDY | dict(init_modality_noise=noise()) | own | options


def latents(modality: int, *shape: int, seed: int = 2) -> tuple[int, Tensor]:
    """A modality of `build` as a part of a sample."""
    generator = torch.Generator().manual_seed(seed)
    return modality, torch.randn(*shape, CHANNELS[modality], generator=generator, dtype=torch.float64)


def text(*ids: int) -> Tensor:
    return torch.tensor(ids)


def assert_same(got: list, expected: list, tolerance: float = 1e-9) -> None:
    """Samples are the same: text to the id, modalities within `tolerance`."""
    assert shapes_of(got) == shapes_of(expected)
    for part, other in zip(got, expected, strict=True):
        if isinstance(part, tuple):
            torch.testing.assert_close(part[1], other[1], atol=tolerance, rtol=0)


def shapes_of(sample: list) -> list:
    """A sample as one can compare and read it: ids, and types with shapes."""
    return [(part[0], tuple(part[1].shape)) if isinstance(part, tuple) else part.tolist() for part in sample]


def drawn(sample: list) -> list[tuple[int, Tensor]]:
    return [part for part in sample if isinstance(part, tuple)]


def to_pieces(sample: list) -> list[Piece]:
    """A returned sample of latents, channels last, as the transformer reads it."""
    return [Modality(*part) if isinstance(part, tuple) else Text(part) for part in sample]


def slots_of(model, sample: list) -> list[int]:
    """The id in every slot of a sample, -1 where it is a latent."""
    slots = []
    for part in sample:
        if isinstance(part, tuple):
            slots += [-1] * prod(model.modalities[part[0]].token_shape(tuple(part[1].shape[:-1])))
        else:
            slots += part.tolist()
    return slots


def parts_of(prompt) -> list:
    """A prompt as a list of parts."""
    return [] if prompt is None else prompt if isinstance(prompt, list) else [prompt]


def num_given(model, prompt) -> int:
    """The slots that a prompt of latents takes up, with all its markers."""
    slots = 1  # sos
    for part in parts_of(prompt):
        if isinstance(part, tuple) or part.is_floating_point():
            modality, x = part if isinstance(part, tuple) else (0, part)
            slots += len(model.vocabulary.opening(modality, tuple(x.shape[:-1]))) + 1
            slots += len(slots_of(model, [(modality, x)]))
        else:
            slots += part.numel()
    return slots


def grammar_of(model, most: int = GREEDY["max_modality_tokens"]) -> Grammar:
    dims = [io.spec.num_dim for io in model.modalities]
    return Grammar(model.vocabulary, [range(MAX_AXES + 1) if dim is None else {dim} for dim in dims], most=most)


def assert_greedy(model, sample: list, given: int, most: int = GREEDY["max_modality_tokens"]) -> int:
    """One forward pass over the whole sample, as in training, would have written every id behind the `given` slots.
    Returns how many those are.
    """
    meta, eom, grammar = model.meta_id, model.eom_ids, grammar_of(model, most)
    if not isinstance(sample[-1], tuple) and meta in (ids := sample[-1].tolist()):
        sample = [*sample[:-1], sample[-1][: ids.index(meta)]]  # cut off before the latents came
    sample = [part for part in sample if isinstance(part, tuple) or len(part)]
    with torch.no_grad():
        [logits] = model([sample], return_loss=False)
    slots, opening, checked = slots_of(model, sample), None, 0
    assert len(logits) - len(slots) == (slots[-1] != model.eos_id)  # in training there is an eos
    for slot, token in enumerate(slots):
        if slot >= given and token >= 0 and token not in eom:
            best = logits[slot - 1].masked_fill(~grammar.allowed(opening), float("-inf")).argmax()
            assert best == token, f"slot {slot} of {slots}: {token} was written, {best} is the likeliest"
            checked += 1
        opening = grammar.advance(opening, token)
    return checked


def solve(
    model, before: list[Piece], modality: int, start: Tensor, shape: tuple, *, steps: int, scale: float, **solver
):
    """Draws a modality behind marked pieces: everything is read again each time, guidance by its formula."""
    nulled = [
        Text(torch.where(piece.ids < model.vocabulary.num_text, model.vocabulary.null, piece.ids))
        if isinstance(piece, Text)
        else piece
        for piece in before
    ]

    def velocity(t, x):
        conditional = velocity_behind(model, before, Modality(modality, x.reshape(*shape, x.shape[-1])), t)
        if scale == 1:
            return conditional
        unconditional = velocity_behind(model, nulled, Modality(modality, x.reshape(*shape, x.shape[-1])), t)
        return (1 - scale) * unconditional + scale * conditional

    with torch.no_grad():
        return odeint(velocity, start, torch.linspace(0, 1, steps + 1, dtype=start.dtype), **solver)[-1]


def straight_to(target):
    """A flow whose velocity is the same everywhere, and leads every span from `noise` to `target`."""

    def velocities(hidden, stream, x_t, t):
        way = target - noise()
        sizes = {modality: stream.placements[modality].sizes for modality in x_t}
        return {kind: torch.cat([way[:size, : x.shape[1]] for size in sizes[kind]]) for kind, x in x_t.items()}

    return velocities


def velocity_behind(model, before: list[Piece], span: Modality, t: Tensor) -> Tensor:
    stream, values = model.pack_stream([[*before, span]]), model.latents_by_type([[*before, span]])
    times = torch.ones(len(stream.spans), dtype=torch.float64)
    times[-1] = t
    velocities = model.velocities(model.forward_stream(stream, values, times), stream, values, times)
    return velocities[span.type][-prod(span.shape) :]


def assert_drawn(model, sample: list, given: int = 0, *, steps: int = 2, scale: float = 1.0, start=None, **solver):
    """The latents of a returned sample are what `solve` makes of the same noise; the first `given` are the prompt's."""
    start, pieces = noise() if start is None else start, to_pieces(sample)
    places = [i for i, piece in enumerate(pieces) if isinstance(piece, Modality)]
    for i in places[given:]:
        modality, x = sample[i]
        has_text = any((piece.ids < model.vocabulary.num_text).any() for piece in pieces[:i] if isinstance(piece, Text))
        rows, channels = prod(x.shape[:-1]), x.shape[-1]
        expected = solve(
            model,
            pieces[:i],
            modality,
            start[:rows, :channels],
            tuple(x.shape[:-1]),
            steps=steps,
            scale=scale if has_text else 1.0,
            **(solver or dict(method="midpoint")),
        )
        torch.testing.assert_close(x.reshape(rows, channels), expected, atol=1e-9, rtol=0)


# drawing with guidance and from what is there already


def without_modalities(model, before: list[Piece]) -> list[Piece]:
    """Null text where there is text, and the markers of the last modality, which is the one to be drawn."""
    ids = torch.cat([piece.ids for piece in before if isinstance(piece, Text)])
    opening = before[-1].ids[before[-1].ids.tolist().index(model.meta_id) :]
    nulls = torch.full((int((ids < model.vocabulary.num_text).sum()),), model.vocabulary.null)
    return [Text(torch.cat([text(model.sos_id), nulls, opening]))]


def guidance_at(
    model, before: list[Piece], span: Modality, t: Tensor, *, scale: float, modality_scale: float, rescale: float
) -> Tensor:
    """The velocity behind marked pieces, led away from what it is without text and without modalities."""
    vocabulary = model.vocabulary
    ids = torch.cat([piece.ids for piece in before if isinstance(piece, Text)])
    has_text, has_modality = bool((ids < vocabulary.num_text).any()), any(isinstance(it, Modality) for it in before)
    given = velocity_behind(model, before, span, t)
    scale, modality_scale = scale if has_text else 1.0, modality_scale if has_modality else 1.0
    if scale == modality_scale == 1:
        return given
    nulled = [
        Text(piece.ids.masked_fill(piece.ids < vocabulary.num_text, vocabulary.null))
        if isinstance(piece, Text)
        else piece
        for piece in before
    ]
    textless = velocity_behind(model, nulled, span, t)
    bare = velocity_behind(model, without_modalities(model, before), span, t) if modality_scale != 1 else textless
    velocity = bare + modality_scale * (textless - bare) + scale * (given - textless)
    spread, other = ((one - one.mean()).square().mean().sqrt() for one in (velocity, given))
    return (1 - rescale) * velocity + rescale * velocity * (other / spread if spread else 1)


def flow_behind(
    model,
    before: list[Piece],
    modality: int,
    shape: tuple,
    start: Tensor,
    *,
    steps: int = 2,
    shift: float = 1.0,
    scale: float = 1.0,
    modality_scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
    init: Tensor | None = None,
    strength: float = 1.0,
    anew: Tensor | None = None,
    **solver,
) -> Tensor:
    """Draws a modality behind marked pieces by the formulas, from the noise `start` or on the way to `init`, of which
    all that is not to be drawn `anew` is put back at every evaluation. Everything is read again each time.
    """
    init = start if init is None else init.reshape(start.shape)
    stays = torch.zeros_like(start).bool() if anew is None else ~anew.reshape(-1, 1).expand_as(start)
    grid = torch.linspace(0, 1, steps + 1, dtype=start.dtype)
    grid = (1 - strength) + strength * grid / (grid + shift * (1 - grid))
    off = dict(scale=1.0, modality_scale=1.0, rescale=0.0)
    on = dict(scale=scale, modality_scale=modality_scale, rescale=rescale)

    def velocity(t, x):
        x = torch.where(stays, (1 - t) * start + t * init, x)
        span = Modality(modality, x.reshape(*shape, x.shape[-1]))
        guidance = on if interval[0] <= t <= interval[1] else off
        return torch.where(stays, 0, guidance_at(model, before, span, t, **guidance))

    with torch.no_grad():
        begin = (1 - grid[0]) * start + grid[0] * init
        return torch.where(stays, init, odeint(velocity, begin, grid, **(solver or dict(method="midpoint")))[-1])


def assert_flows(model, sample: list, given: int = 0, *, start: Tensor | None = None, **flow) -> None:
    """Every modality of a returned sample but the `given` of its prompt is what `flow_behind` makes of the same noise;
    the first of them alone is made of an `init`.
    """
    start, pieces = noise() if start is None else start, to_pieces(sample)
    places = [i for i, piece in enumerate(pieces) if isinstance(piece, Modality)]
    for count, i in enumerate(places[given:]):
        modality, x = sample[i]
        options = {k: v for k, v in flow.items() if not count or k not in ("init", "strength", "anew")}
        rows, channels = prod(x.shape[:-1]), x.shape[-1]
        shape, begin = tuple(x.shape[:-1]), start[:rows, :channels]
        expected = flow_behind(model, pieces[:i], modality, shape, begin, **options)
        torch.testing.assert_close(x.reshape(rows, channels), expected, atol=1e-9, rtol=0)


def watch_evaluations(monkeypatch, model) -> list[tuple[int, float]]:
    """For every evaluation of the flow from now on: how many sequences it runs, and the time of the first of them."""
    seen, evaluate = [], model.velocities

    def velocities(hidden, stream, x_t, t):
        seen.append((len(stream.lengths), float(t[0])))
        return evaluate(hidden, stream, x_t, t)

    monkeypatch.setattr(model, "velocities", velocities)
    return seen


# requests, and what an engine keeps for them


def generators(*seeds: int) -> list[torch.Generator]:
    """A source of random numbers for each of several prompts."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


GOLDEN, WORD = 0x9E3779B97F4A7C15, 2**64 - 1


def scramble(z: int) -> int:
    """The output function of SplitMix64, in integers of any length."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def number_of(seed: int, counter: int) -> float:
    """The random number in [0, 1) that a request of this seed uses for the id that it chooses at `counter`."""
    start = scramble((seed + GOLDEN) & WORD)
    return (scramble((start + (counter + 1) * GOLDEN) & WORD) >> 11) * 2.0**-53


def noise_of(generator: torch.Generator, rows: int, channels: int, number: int = 0) -> Tensor:
    """What modality `number` of a request starts from whose seed comes from this generator: Box and Muller."""
    seed, count = seed_of(generator), rows * channels
    half = (count + 1) // 2
    first, second = ([number_of(seed, ((number + 1) << 40) + i) for i in range(at, at + half)] for at in (0, half))
    radii = [sqrt(-2 * log1p(-u)) for u in first]
    made = [r * cos(2 * pi * u) for r, u in zip(radii, second, strict=True)]
    made += [r * sin(2 * pi * u) for r, u in zip(radii, second, strict=True)]
    return torch.tensor(made[:count], dtype=torch.float64).view(rows, channels)


def seed_of(generator: torch.Generator) -> int:
    """The one number that a request takes from its generator."""
    return int(torch.randint(2**62, (1,), generator=generator))


def script(*ids: int, given: int):
    """A logits processor that has these ids written behind the first `given`, and then lets the model choose."""

    def insist(so_far: Tensor, logits: Tensor) -> Tensor:
        at = len(so_far) - given
        if at >= len(ids):
            return logits
        return torch.full_like(logits, -9.0).index_fill(0, torch.tensor(ids[at]), 9.0)

    return insist


def fail(error: BaseException, *, at: int):
    """A logits processor that raises `error` once there are `at` ids."""

    def raise_it(so_far: Tensor, logits: Tensor) -> Tensor:
        if len(so_far) >= at:
            raise error
        return logits

    return raise_it


def cache_of(engine):
    return engine.scheduler.runner.cache


def assert_no_row_is_lost(engine) -> None:
    """Nothing waits, and no row of the cache is in use."""
    assert engine.is_idle
    assert cache_of(engine).rows == []
    assert cache_of(engine).reserved_tokens == 0


def turns_of(lengths: list[int], most: int) -> int:
    """How long it takes if `most` of these requests run at once, and the next enters right after one has left."""
    ends = [0] * most
    for length in lengths:
        ends[ends.index(min(ends))] += length
    return max(ends)
