"""Paths, times, solvers and guidance, where the answers are known."""

from functools import partial
from itertools import product
from math import exp, log, pi, sin

import pytest
import torch
from checks import TYPECHECK
from hypothesis import given, settings
from hypothesis import strategies as st
from torchdiffeq import odeint
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver

from transfusion_pytorch.flow.guidance import guided, guided_twice, rescaled
from transfusion_pytorch.flow.path import MIN_REMAINING, estimate_clean, interpolate, slerp, velocity_towards
from transfusion_pytorch.flow.solver import (
    ADAPTIVE_METHODS,
    OTHER_METHODS,
    SINGLE_STEP_METHODS,
    check_method,
    integrate,
    is_single_step,
)
from transfusion_pytorch.flow.times import CLEAN, TimePolicy, shift_times

QUICK = settings(derandomize=True, deadline=None, database=None, max_examples=40)
DOUBLE = torch.float64
ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
EVALUATIONS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
PRECISE = [*sorted(ADAPTIVE_METHODS), "scipy_solver"]
HISTORY = ["explicit_adams", "implicit_adams", "fixed_adams"]


def latents(n=5, c=3):
    return torch.randn(n, c, dtype=DOUBLE), torch.randn(n, c, dtype=DOUBLE)


# path


def test_the_path_runs_from_noise_to_data():
    clean, noise = latents()
    at_noise, at_data = (interpolate(clean, noise, torch.full((5,), t, dtype=DOUBLE)) for t in (0, 1))
    assert torch.equal(at_noise.x_t, noise)
    assert torch.equal(at_data.x_t, clean)
    assert torch.equal(at_noise.velocity, clean - noise)
    half = interpolate(clean, noise, torch.full((5,), 0.5, dtype=DOUBLE))
    torch.testing.assert_close(half.x_t, (clean + noise) / 2)


def test_the_velocity_is_the_derivative_of_the_path_by_time():
    clean, noise = latents()
    t = torch.rand(5, dtype=DOUBLE)
    _, derivative = torch.autograd.functional.jvp(lambda t: interpolate(clean, noise, t).x_t, t, torch.ones_like(t))
    torch.testing.assert_close(derivative, interpolate(clean, noise, t).velocity)


def test_every_slot_stands_at_its_own_time():
    clean, noise = latents()
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=DOUBLE)
    together = interpolate(clean, noise, t)
    for i in range(5):
        alone = interpolate(clean[i : i + 1], noise[i : i + 1], t[i : i + 1])
        assert torch.equal(together.x_t[i], alone.x_t[0])
    assert torch.equal(together.t, t)


@QUICK
@given(t=st.floats(0, 1))
def test_the_clean_estimate_undoes_the_path(t):
    clean, noise = latents()
    sample = interpolate(clean, noise, torch.full((5,), t, dtype=DOUBLE))
    torch.testing.assert_close(estimate_clean(*sample), clean)


@QUICK
@given(t=st.floats(0, 1) | st.sampled_from([0.0, 0.95, 0.96, 0.999, 1.0]))
def test_velocity_and_damped_estimate_undo_each_other(t):
    clean, x_t = latents()
    t = torch.full((5,), t, dtype=DOUBLE)
    torch.testing.assert_close(estimate_clean(x_t, velocity_towards(clean, x_t, t), t, damped=True), clean)
    velocity = clean
    torch.testing.assert_close(velocity_towards(estimate_clean(x_t, velocity, t, damped=True), x_t, t), velocity)


def test_the_velocity_towards_the_truth_is_the_true_one_until_it_is_damped():
    clean, noise = latents()
    t = torch.tensor([0.0, 0.5, 0.95, 0.98, 1.0], dtype=DOUBLE)
    sample = interpolate(clean, noise, t)
    damping = torch.tensor([1.0, 1.0, 1.0, 0.02 / MIN_REMAINING, 0.0], dtype=DOUBLE)
    expected = damping[:, None] * sample.velocity
    torch.testing.assert_close(velocity_towards(clean, sample.x_t, t), expected, atol=1e-12, rtol=1e-12)


def test_at_the_end_of_the_path_the_estimate_stays_where_it_is():
    x_t, velocity = latents()
    assert torch.equal(estimate_clean(x_t, velocity, torch.ones(5, dtype=DOUBLE)), x_t)


# times


MANY = 20_000
FREE, CAPTIONED = torch.zeros(MANY, dtype=torch.bool), torch.ones(MANY, dtype=torch.bool)
POLICIES = [
    TimePolicy(),
    TimePolicy(noise_limit=0.5),
    TimePolicy("logit_normal", mean=0.5, std=1.5),
    TimePolicy("logit_normal", shift=3.0, noise_limit=0.2),
    TimePolicy(0.25, shift=2.0, noise_limit=0.5),
]


def drawn(policy, is_captioned, seed=0):
    torch.manual_seed(seed)
    return policy.draw(is_captioned)


@pytest.mark.parametrize("policy", POLICIES)
def test_times_are_between_noise_and_data_and_captioned_ones_above_the_limit(policy):
    assert ((drawn(policy, FREE) >= 0) & (drawn(policy, FREE) <= 1)).all()
    captioned = drawn(policy, CAPTIONED)
    assert ((captioned >= policy.noise_limit) & (captioned <= 1)).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_limit_squeezes_what_is_captioned_and_nothing_else(policy):
    is_captioned = torch.arange(MANY) % 3 == 0
    free, mixed = drawn(policy, FREE), drawn(policy, is_captioned)
    assert torch.equal(mixed[~is_captioned], free[~is_captioned])
    squeezed = policy.noise_limit + (1 - policy.noise_limit) * free[is_captioned]
    torch.testing.assert_close(mixed[is_captioned], squeezed)


def test_without_a_limit_all_are_alike():
    policy = TimePolicy()
    assert torch.equal(drawn(policy, CAPTIONED), drawn(policy, FREE))


def test_with_the_highest_limit_what_is_captioned_is_clean():
    assert (drawn(TimePolicy(noise_limit=1), CAPTIONED) == CLEAN).all()


@pytest.mark.parametrize("constant", [0, 0.5, 1])
def test_a_constant_is_the_time_of_all_that_is_free(constant):
    assert (drawn(TimePolicy(constant), FREE) == constant).all()
    assert (drawn(TimePolicy(constant, noise_limit=0.5), CAPTIONED) == 0.5 + constant / 2).all()
    assert (drawn(TimePolicy(constant), CAPTIONED) == constant).all()


def assert_moments(x, mean, std):
    assert abs(x.mean() - mean) < 4 * std / MANY**0.5
    assert abs(x.std() - std) < 4 * std / MANY**0.5


def test_uniform_times_have_uniform_moments():
    t = drawn(TimePolicy(), FREE)
    assert_moments(t, 0.5, 12**-0.5)
    assert (t < 0.1).float().mean() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (-0.8, 0.5, 1.0), (0.3, 1.2, 3.0)])
def test_logits_of_logit_normal_times_are_normal_and_a_shift_moves_their_mean(mean, std, shift):
    t = drawn(TimePolicy("logit_normal", mean=mean, std=std, shift=shift), FREE)
    assert_moments(t.double().logit(), mean - log(shift), std)


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0, 50.0])
def test_a_shift_is_monotone_keeps_the_ends_and_goes_towards_noise(shift):
    t = torch.linspace(0, 1, 101, dtype=DOUBLE)
    shifted = shift_times(t, shift)
    assert (shifted.diff() > 0).all()
    assert shifted[[0, -1]].tolist() == [0, 1]
    inner = slice(1, -1)
    assert torch.equal(shifted[inner] < t[inner], torch.full((99,), shift > 1))
    assert torch.equal(shifted[inner] > t[inner], torch.full((99,), shift < 1))


def test_shifts_divide_the_odds_so_they_multiply_and_invert():
    t = torch.rand(50, dtype=DOUBLE)
    shifted = shift_times(t, 3.0)
    torch.testing.assert_close(shifted / (1 - shifted), t / (1 - t) / 3)
    torch.testing.assert_close(shift_times(shifted, 2.0), shift_times(t, 6.0))
    torch.testing.assert_close(shift_times(shifted, 1 / 3), t)
    assert torch.equal(shift_times(t, 1.0), t)


@pytest.mark.parametrize("policy", POLICIES[:3])
def test_a_seed_decides_all_times(policy):
    assert torch.equal(drawn(policy, FREE, seed=1), drawn(policy, FREE, seed=1))
    assert not torch.equal(drawn(policy, FREE, seed=1), drawn(policy, FREE, seed=2))


def test_no_spans_have_no_times():
    for policy in POLICIES:
        assert policy.draw(torch.zeros(0, dtype=torch.bool)).shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(distribution=1.5), r"a constant time must be between 0 \(noise\) and 1 \(data\), got 1.5"),
        (dict(distribution=float("nan")), "a constant time must be between 0 .* got nan"),
        (dict(std=0.0), "mean must be finite, std and shift positive, got 0.0, 0.0 and 1.0"),
        (dict(std=float("nan")), "mean must be finite, std and shift positive, got 0.0, nan and 1.0"),
        (dict(mean=float("nan")), "mean must be finite, std and shift positive, got nan"),
        (dict(shift=-1.0), "mean must be finite, std and shift positive, got 0.0, 1.0 and -1.0"),
        (dict(shift=float("inf")), "mean must be finite, std and shift positive, got 0.0, 1.0 and inf"),
        (dict(noise_limit=1.1), "noise_limit must be between 0 and 1, got 1.1"),
        (dict(noise_limit=-0.1), "noise_limit must be between 0 and 1, got -0.1"),
        (dict(prob_clean_captioned=1.5), "prob_clean_captioned must be between 0 and 1, got 1.5"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TimePolicy(**options)


@pytest.mark.skipif(TYPECHECK, reason="the type checker is faster")
def test_a_policy_of_unknown_distribution_is_refused():
    with pytest.raises(ValueError, match="must be 'uniform', 'logit_normal', 'beta' or a constant, got 'normal'"):
        TimePolicy("normal")


# solvers


def solve(velocity, x, method, *, steps=8, start=0.0, atol=1e-7, rtol=1e-7, **options):
    times = torch.linspace(start, 1, steps + 1, dtype=torch.promote_types(x.dtype, torch.float32))
    return integrate(velocity, x, times, dict(method=method, atol=atol, rtol=rtol, **options))


def growth(t, x):
    """Takes x to `exp(sin 1)` times itself."""
    return torch.cos(t) * x


GROWN = exp(sin(1))


class Watched:
    """A velocity that remembers when it was asked."""

    def __init__(self, velocity):
        self.velocity, self.times = velocity, []

    def __call__(self, t, x):
        self.times.append(float(t))
        return self.velocity(t, x)


def test_every_method_of_torchdiffeq_is_known_and_no_other():
    assert SINGLE_STEP_METHODS.isdisjoint(OTHER_METHODS)
    assert set(SOLVERS) == SINGLE_STEP_METHODS | OTHER_METHODS
    assert set(ORDERS) == SINGLE_STEP_METHODS


def test_the_adaptive_methods_are_those_that_can_be_told_where_to_step():
    assert {
        name for name, solver in SOLVERS.items() if issubclass(solver, RKAdaptiveStepsizeODESolver)
    } == ADAPTIVE_METHODS


def test_an_unknown_method_is_refused_with_those_that_exist():
    for method in SOLVERS:
        check_method({"method": method})
    check_method({})
    with pytest.raises(ValueError, match=r"unknown ODE method 'dopri6', choose one of adaptive_heun, .*, scipy_solver"):
        check_method({"method": "dopri6"})


@pytest.mark.parametrize("method", sorted(SINGLE_STEP_METHODS))
def test_fixed_steps_converge_with_their_order(method):
    x = torch.tensor([1.0, -2.0], dtype=DOUBLE)
    errors = [(solve(growth, x, method, steps=steps) - x * GROWN).norm() for steps in (32, 64)]
    assert torch.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[method], abs=0.1)


@pytest.mark.parametrize("method", sorted(SINGLE_STEP_METHODS))
def test_a_method_of_order_p_is_exact_where_the_path_is_a_polynomial_of_degree_p(method):
    order = ORDERS[method]
    end = solve(
        lambda t, x: order * t ** (order - 1) * torch.ones_like(x), torch.zeros(3, dtype=DOUBLE), method, steps=3
    )
    torch.testing.assert_close(end, torch.ones(3, dtype=DOUBLE))


@pytest.mark.parametrize("method", PRECISE + HISTORY)
def test_other_methods_reach_the_closed_form(method):
    x = torch.tensor([1.0, -2.0], dtype=DOUBLE)
    end = solve(growth, x, method, steps=20, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(end, x * GROWN, rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", sorted(SINGLE_STEP_METHODS) + PRECISE + HISTORY)
def test_a_straight_path_lands_on_its_target(method):
    target, noise = latents()
    torch.testing.assert_close(solve(lambda t, x: target - noise, noise, method), target, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["euler", "midpoint"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_velocity_towards_a_target_reaches_it_in_any_number_of_steps(method, steps):
    target, noise = latents()
    end = solve(lambda t, x: (target - x) / (1 - t), noise, method, steps=steps)
    torch.testing.assert_close(end, target)


@pytest.mark.parametrize("method", sorted(SINGLE_STEP_METHODS))
@pytest.mark.parametrize("steps", [1, 5])
def test_steps_are_intervals(method, steps):
    watched = Watched(growth)
    solve(watched, torch.ones(2, dtype=DOUBLE), method, steps=steps)
    assert len(watched.times) == EVALUATIONS[method] * steps
    starts = watched.times[:: EVALUATIONS[method]]
    assert starts == pytest.approx([i / steps for i in range(steps)])
    with pytest.raises(ValueError, match="steps are intervals between times, at least 1, got 1 times"):
        solve(growth, torch.ones(2), method, steps=0)


@pytest.mark.parametrize("method", sorted(SINGLE_STEP_METHODS) + PRECISE + HISTORY)
@pytest.mark.parametrize("speed", [0.0, 1e-3, 1.0])
def test_no_method_asks_for_a_velocity_beyond_the_ends(method, speed):
    watched = Watched(lambda t, x: speed * torch.ones_like(x))
    end = solve(watched, torch.ones(3), method, atol=1e-5, rtol=1e-5)
    assert 0 <= min(watched.times) <= max(watched.times) <= 1
    torch.testing.assert_close(end, torch.full((3,), 1 + speed))


def test_a_later_start_takes_the_rest_of_the_way():
    x = torch.tensor([2.0], dtype=DOUBLE)
    watched = Watched(lambda t, x: 2 * t * torch.ones_like(x))
    end = solve(watched, x, "midpoint", steps=4, start=0.6)
    torch.testing.assert_close(end, x + 1 - 0.36)
    assert watched.times[0] == pytest.approx(0.6)
    assert len(watched.times) == 8


def unit_growth(i, steps, s, x):
    """`growth` in the i-th of `steps` intervals, in a time s that runs from 0 to 1 there."""
    return growth((i + s) / steps, x) / steps


@pytest.mark.parametrize("method", sorted(SINGLE_STEP_METHODS))
def test_steps_taken_one_by_one_are_the_steps_of_the_whole_grid(method):
    x, steps = torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE), 5
    whole = solve(growth, x, method, steps=steps)
    alone, unit = x, x
    for i in range(steps):
        grid = torch.tensor([i / steps, (i + 1) / steps], dtype=DOUBLE)
        alone = odeint(growth, alone, grid, method=method)[-1]
        unit = odeint(partial(unit_growth, i, steps), unit, torch.tensor([0.0, 1.0], dtype=DOUBLE), method=method)[-1]
    torch.testing.assert_close(alone, whole)
    torch.testing.assert_close(unit, whole)


def test_rows_step_together_only_where_an_interval_is_a_step():
    assert all(is_single_step({"method": method}) for method in SINGLE_STEP_METHODS)
    assert not any(is_single_step({"method": method}) for method in OTHER_METHODS)
    assert not is_single_step({})
    assert not is_single_step({"method": "euler", "options": {"step_size": 0.1}})
    assert is_single_step({"method": "euler", "options": None})
    assert is_single_step({"method": "euler", "options": {"interp": "cubic"}})


@pytest.mark.parametrize("options", [{}, {"method": "dopri5"}, {"method": "dopri5", "options": {"max_num_steps": 100}}])
def test_the_default_is_dopri5_and_options_stay_the_callers(options):
    given, before = Watched(growth), dict(options)
    x = torch.ones(2, dtype=DOUBLE)
    end = integrate(given, x, torch.linspace(0, 1, 5, dtype=DOUBLE), options)
    assert options == before
    torch.testing.assert_close(end, x * GROWN, rtol=1e-5, atol=0)


def test_options_reach_the_solver():
    watched = Watched(growth)
    solve(watched, torch.ones(2, dtype=DOUBLE), "euler", steps=2, options={"step_size": 0.125})
    assert len(watched.times) == 8
    for options, first_step in (({}, 1 / 8), ({"first_step": 0.01}, 0.01)):
        watched = Watched(growth)
        solve(watched, torch.ones(2, dtype=DOUBLE), "dopri5", options=options)
        assert watched.times[1] == pytest.approx(first_step / 5)  # the second stage of the method


def test_many_steps_of_low_precision_stay_apart():
    watched = Watched(lambda t, x: torch.zeros_like(x))
    end = solve(watched, torch.ones(2, dtype=torch.bfloat16), "euler", steps=300)
    assert end.dtype == torch.bfloat16
    assert len(watched.times) == 300


# guidance


def test_guidance_walks_from_one_prediction_through_the_other():
    conditional, unconditional = latents()
    assert torch.equal(guided(conditional, unconditional, 1.0), conditional)
    assert torch.equal(guided(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(guided(conditional, unconditional, 0.5), (conditional + unconditional) / 2)
    torch.testing.assert_close(guided(conditional, unconditional, 3), 3 * conditional - 2 * unconditional)
    torch.testing.assert_close(guided(conditional, conditional, 7.5), conditional)


def test_guidance_is_linear_and_turns_around_with_its_arguments():
    (a, b), (c, d), scale = latents(), latents(), 2.5
    torch.testing.assert_close(guided(a + 2 * c, b + 2 * d, scale), guided(a, b, scale) + 2 * guided(c, d, scale))
    torch.testing.assert_close(guided(a, b, scale), guided(b, a, 1 - scale))


def test_guidance_by_two_scales_is_the_formula():
    conditional, without_text, without_all = (torch.full((1, 1), x, dtype=DOUBLE) for x in (4.0, 2.0, 1.0))
    assert guided_twice(conditional, without_text, without_all, 5.0, 3.0).item() == 1 + 3 * (2 - 1) + 5 * (4 - 2)


def three_predictions():
    return *latents(), latents()[0]


def test_guidance_by_two_scales_ends_in_the_three_predictions():
    conditional, without_text, without_all = three_predictions()
    predictions = conditional, without_text, without_all
    torch.testing.assert_close(guided_twice(*predictions, 1.0, 1.0), conditional)
    torch.testing.assert_close(guided_twice(*predictions, 0.0, 1.0), without_text)
    torch.testing.assert_close(guided_twice(*predictions, 0.0, 0.0), without_all)


@QUICK
@given(scale=st.floats(-3, 9), other=st.floats(-3, 9))
def test_guidance_by_two_scales_is_that_by_one_where_only_one_has_something_to_say(scale, other):
    a, b, c = three_predictions()
    torch.testing.assert_close(guided_twice(a, b, c, scale, 1.0), guided(a, b, scale))
    torch.testing.assert_close(guided_twice(a, b, c, 0.0, other), guided(b, c, other))
    torch.testing.assert_close(guided_twice(a, b, c, scale, scale), guided(a, c, scale))
    torch.testing.assert_close(guided_twice(a, b, b, scale, other), guided(a, b, scale))
    torch.testing.assert_close(guided_twice(b, b, c, scale, other), guided(b, c, other))
    torch.testing.assert_close(guided_twice(a, a, a, scale, other), a)
    along = guided_twice(a + 2, b + 2, c + 2, scale, other)
    torch.testing.assert_close(along, guided_twice(a, b, c, scale, other) + 2)


def spread(x):
    return ((x - x.mean()) ** 2).mean().sqrt()


def test_no_rescaling_changes_nothing_and_full_rescaling_restores_the_spread():
    walked, conditional = latents()
    walked = 7 * walked + 1
    assert torch.equal(rescaled(walked, conditional, 0.0), walked)
    whole = rescaled(walked, conditional, 1.0)
    torch.testing.assert_close(spread(whole), spread(conditional))
    torch.testing.assert_close(whole / whole.norm(), walked / walked.norm())
    torch.testing.assert_close(rescaled(3 * walked, conditional, 1.0), whole)


@QUICK
@given(amount=st.floats(0, 1))
def test_rescaling_is_linear_in_its_amount(amount):
    walked, conditional = latents()
    mixed = (1 - amount) * walked + amount * rescaled(walked, conditional, 1.0)
    torch.testing.assert_close(rescaled(walked, conditional, amount), mixed)
    torch.testing.assert_close(rescaled(walked, walked, amount), walked)


@pytest.mark.parametrize("amount", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_what_has_no_spread_is_rescaled_to_something_finite(dtype, amount):
    none, same, some = (x.to(dtype) for x in (torch.zeros(5, 3), torch.full((5, 3), 2.0), 100 * torch.randn(5, 3)))
    for pair in product((none, same, some), repeat=2):
        assert rescaled(*pair, amount).isfinite().all()


@pytest.mark.parametrize("amount", [0.5, 1.0])
def test_a_single_number_has_no_spread_to_restore(amount):
    walked, conditional = latents(1, 1)
    assert torch.equal(rescaled(walked, conditional, amount), walked)


# between two noises


def angle_between(a, b):
    return torch.dot(a.flatten() / a.norm(), b.flatten() / b.norm()).clamp(-1, 1).acos()


def on_one_sphere(n=5, c=3):
    a, b = latents(n, c)
    return a, b * a.norm() / b.norm()


def test_the_great_circle_begins_and_ends_at_its_two_noises():
    a, b = latents()
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)


def test_a_quarter_turn_is_a_sine_and_a_cosine():
    a, b = torch.tensor([[1.0, 0.0]], dtype=DOUBLE), torch.tensor([[0.0, 1.0]], dtype=DOUBLE)
    for weight in (0.0, 0.25, 0.3, 1.0):
        turned = torch.tensor(weight * pi / 2, dtype=DOUBLE)
        torch.testing.assert_close(slerp(a, b, weight), torch.stack([turned.cos(), turned.sin()])[None])


def test_the_angle_is_that_between_directions_however_long_they_are():
    a, b = torch.tensor([[1.0, 0.0]], dtype=DOUBLE), torch.tensor([[1.0, 3**0.5]], dtype=DOUBLE)  # 60 degrees apart
    torch.testing.assert_close(slerp(a, b, 0.5), (a + b) / 3**0.5)


@QUICK
@given(weight=st.floats(0, 1), other=st.floats(0, 1), within=st.floats(0, 1))
def test_a_great_circle_keeps_the_norm_and_adds_up(weight, other, within):
    a, b = on_one_sphere()
    one, two = slerp(a, b, weight), slerp(a, b, other)
    torch.testing.assert_close(one.norm(), a.norm())
    torch.testing.assert_close(one, slerp(b, a, 1 - weight))
    torch.testing.assert_close(angle_between(a, one), weight * angle_between(a, b), atol=1e-7, rtol=0)
    between = slerp(one, two, within)  # a part of the same way
    torch.testing.assert_close(between, slerp(a, b, weight + within * (other - weight)), atol=1e-7, rtol=0)


def test_all_coordinates_of_a_noise_are_one_point():
    a, b = latents()
    turn = torch.linalg.qr(torch.randn(15, 15, dtype=DOUBLE)).Q
    turned = [(x.flatten() @ turn).view(5, 3) for x in (a, b, slerp(a, b, 0.3))]
    torch.testing.assert_close(slerp(turned[0], turned[1], 0.3), turned[2])


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_noises_in_one_direction_are_joined_by_a_line(dtype, factor):
    a = latents()[0].to(dtype)
    torch.testing.assert_close(slerp(a, factor * a, 0.25), a * (1 + 0.25 * (factor - 1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, DOUBLE])
def test_between_opposite_or_absent_noises_there_is_something_finite(dtype):
    a = latents()[0].to(dtype)
    for one, other in ((a, -a), (a, -2 * a), (a, 0 * a), (0 * a, a), (0 * a, 0 * a)):
        ends = [slerp(one, other, weight) for weight in (0.0, 0.3, 0.5, 1.0)]
        assert all(end.isfinite().all() and end.dtype == dtype for end in ends)
        torch.testing.assert_close(ends[0], one)
        torch.testing.assert_close(ends[-1], other)


@pytest.mark.parametrize("tilt", [1e-6, 0.9e-4, 1.1e-4, 1e-3])
def test_the_line_takes_over_from_the_circle_without_a_jump(tilt):
    a = torch.tensor([[1.0, 0.0]], dtype=DOUBLE)
    b = torch.tensor([[1.0, tilt]], dtype=DOUBLE)
    torch.testing.assert_close(slerp(a, b, 0.3), torch.lerp(a, b, 0.3), atol=tilt**2, rtol=0)


def test_low_precision_is_only_that_of_the_result():
    a, b = (x.bfloat16() for x in latents())
    got = slerp(a, b, 0.3)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, slerp(a.float(), b.float(), 0.3).bfloat16(), atol=0, rtol=0)


@pytest.mark.skipif(TYPECHECK, reason="the type checker is faster")
def test_noises_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match=r"two tensors of one shape, got \(5, 3\) and \(4, 3\)"):
        slerp(torch.randn(5, 3), torch.randn(4, 3), 0.5)
