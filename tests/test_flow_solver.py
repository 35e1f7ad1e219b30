"""Single-step solvers beside those of torchdiffeq: the same steps, without waits for the device."""

from functools import partial
from math import factorial

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint

from transfusion_pytorch.flow.solver import OTHER_METHODS, TABLEAUS, integrate, is_single_step, single_step

METHODS = sorted(TABLEAUS)
ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
GRIDS = {
    "one interval": [0.0, 1.0],
    "even": [i / 7 for i in range(8)],
    "shifted": [t / (t + 3 * (1 - t)) for t in (0.0, 0.2, 0.5, 0.9, 1.0)],
    "uneven, from within": [0.1, 0.11, 0.5, 0.93],
}


def double(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def curve(t, x):
    """No polynomial in t or x, so that every coefficient of a tableau matters."""
    return torch.sin(3 * x + t) + torch.exp(-t) * x.flip(-1) ** 2


class Watched:
    """A velocity that remembers when it was asked."""

    def __init__(self, velocity=curve):
        self.velocity, self.times = velocity, []

    def __call__(self, t, x):
        self.times.append(float(t))
        return self.velocity(t, x)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("method", METHODS)
def test_steps_times_and_gradients_are_those_of_torchdiffeq(method, grid):
    times, ours, theirs = double(grid), Watched(), Watched()
    start, same = (torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3).requires_grad_() for _ in range(2))
    got, expected = integrate(ours, start, times, {"method": method}), odeint(theirs, same, times, method=method)[-1]
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
    assert ours.times == pytest.approx(theirs.times, rel=1e-15)
    got.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(start.grad, same.grad, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_low_precision_rounds_no_worse_than_torchdiffeq(method, dtype):
    times, start = torch.tensor(GRIDS["even"]), torch.linspace(-1, 1, 600).view(200, 3).to(dtype)
    exact = odeint(curve, start.double(), times.double(), method=method)[-1]
    got, other = integrate(curve, start, times, {"method": method}), odeint(curve, start, times, method=method)[-1]
    assert got.dtype == dtype
    error, others = ((x.double() - exact).square().mean().sqrt() for x in (got, other))
    assert error < 1.1 * others
    assert error < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("method", METHODS)
def test_a_step_goes_backwards_as_well(method):
    times, start = double([1.0, 0.7, 0.1]), double([0.3, -0.4])
    expected = odeint(curve, start, times, method=method)[-1]
    torch.testing.assert_close(integrate(curve, start, times, {"method": method}), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_growth_is_multiplied_by_the_polynomial_of_the_method(method):
    """One step of `dx/ds = z x` is the Taylor polynomial of exp(z): all of them have as many stages as their order."""
    order, z = ORDERS[method], double([-1.5, -0.3, 0.0, 0.7, 2.0])
    got = single_step(method, lambda s, x: z * x, torch.ones_like(z))
    expected = sum(z**power / factorial(power) for power in range(order + 1))
    torch.testing.assert_close(got, expected, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("method", METHODS)
def test_quadrature_is_exact_up_to_the_order_and_not_beyond(method):
    def error(degree):
        end = single_step(method, lambda s, x: degree * double(s) ** (degree - 1), double(0.0))
        return abs(end.item() - 1)

    order = ORDERS[method]
    assert [error(degree) < 1e-15 for degree in range(1, order + 2)] == [True] * order + [False]


@pytest.mark.parametrize("method", METHODS)
def test_a_step_evaluates_once_a_stage_at_python_floats(method):
    seen = []
    single_step(method, lambda s, x: seen.append((s, type(s))) or x, double([1.0]))
    assert seen == [(fraction, float) for fraction in TABLEAUS[method].fractions]
    assert len(seen) == ORDERS[method]
    for fraction, moves in zip(TABLEAUS[method].fractions, TABLEAUS[method].moves, strict=True):
        assert sum(moves) == pytest.approx(fraction, abs=1e-15)


@pytest.mark.parametrize("method", METHODS)
def test_members_at_different_times_step_together_as_they_do_alone(method):
    begin, end = double([0.0, 0.3, 0.95, 0.5]), double([0.1, 0.9, 1.0, 0.75])
    start = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)

    def velocity(t, x):
        return curve(t[:, None], x)

    got = single_step(method, lambda s, x: (end - begin)[:, None] * velocity(torch.lerp(begin, end, s), x), start)
    for i in range(len(start)):
        alone = odeint(curve, start[i], torch.stack([begin[i], end[i]]), method=method)[-1]
        torch.testing.assert_close(got[i], alone, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_read_back_from_the_device(method):
    """The meta device holds no data: whatever asks for a number raises."""
    start, times = torch.ones(2, 3, device="meta"), torch.linspace(0, 1, 5, device="meta")
    end = integrate(curve, start, times, {"method": method})
    assert (end.shape, end.device.type) == (start.shape, "meta")
    assert single_step(method, lambda s, x: x, start).device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        odeint(curve, start, times, method=method)


def test_a_start_is_not_changed():
    start = double([1.0, 2.0])
    for method in METHODS:
        single_step(method, lambda s, x: torch.ones_like(x), start)
    assert start.tolist() == [1.0, 2.0]


def test_a_method_that_needs_more_than_its_start_is_refused():
    for method in [*OTHER_METHODS, "rk5"]:
        with pytest.raises(ValueError, match=f"'{method}' is no single-step method, choose one of euler, heun2, "):
            single_step(method, lambda s, x: x, double([1.0]))


# options that torchdiffeq has for these methods


@pytest.mark.parametrize("interp", ["linear", "cubic"])
def test_interpolation_changes_nothing_where_every_time_ends_a_step(interp):
    options, watched = {"method": "midpoint", "options": {"interp": interp}}, Watched()
    start, times = double([0.3, -0.4]), double(GRIDS["even"])
    assert is_single_step(options)
    got = integrate(watched, start, times, options)
    torch.testing.assert_close(got, odeint(curve, start, times, **options)[-1], rtol=1e-14, atol=1e-14)
    assert len(watched.times) == 14


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "refining", [dict(perturb=True), dict(step_size=0.05), dict(grid_constructor=lambda velocity, x, t: t**2)]
)
def test_what_refines_or_moves_the_grid_is_left_to_torchdiffeq(method, refining):
    options, ours, theirs, plain = {"method": method, "options": refining}, Watched(), Watched(), Watched()
    start, times = double([0.3, -0.4]), double(GRIDS["even"])
    assert not is_single_step(options)
    assert torch.equal(integrate(ours, start, times, options), odeint(theirs, start, times, **options)[-1])
    integrate(plain, start, times, {"method": method})
    assert ours.times == theirs.times != plain.times


@pytest.mark.parametrize("off", [dict(perturb=False), dict(step_size=None), dict(grid_constructor=None), {}, None])
def test_an_option_that_is_off_refines_nothing(off):
    assert is_single_step({"method": "rk4", "options": off})


def test_options_that_torchdiffeq_refuses_are_refused():
    start, solve = double([1.0]), partial(integrate, curve, times=double([0.0, 1.0]))
    with pytest.raises(ValueError, match="Unknown interpolation method quintic"):
        solve(start, options={"method": "euler", "options": {"interp": "quintic"}})
    with pytest.warns(UserWarning, match="Euler: Unexpected arguments {'speed': 3}"):
        solve(start, options={"method": "euler", "options": {"speed": 3}})
