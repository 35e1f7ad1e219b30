"""From latents to tokens and back: linear, by a pair of any modules, by a U-Net; and where in its span a token is."""

import copy
from math import ceil, prod

import pytest
import torch
from network_streams import perturb
from torch import nn

from transfusion_pytorch.modalities.adapters import AxialPositions, LinearAdapter, PairAdapter
from transfusion_pytorch.modalities.unet import ResidualBlock, UNetDown, UNetUp
from transfusion_pytorch.sequence.positions import axial_coordinates

LATENT, DIM = 3, 8
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def patches(num_dim=2, size=2):
    """The plainest pair that changes the number of tokens: a patch is a token."""
    down = CONVOLUTIONS[num_dim](LATENT, DIM, size, stride=size)
    return pair(down, TRANSPOSED[num_dim](DIM, LATENT, size, stride=size))


def pair(down, up, *, channel_first=True):
    return PairAdapter(down, up, dim_latent=LATENT, dim=DIM, channel_first=channel_first)


def unet(num_dim=2, num_downsamples=1):
    options = dict(dim_hidden=4, num_dim=num_dim, num_downsamples=num_downsamples)
    down, up = UNetDown(LATENT, DIM, **options), UNetUp(LATENT, DIM, **options)
    return pair(down, up, channel_first=False)


def exact(adapter):
    """Without its zeros, and in double precision."""
    return perturb(adapter).double()


def latents_of(shapes):
    return torch.randn(sum(map(prod, shapes)), LATENT, dtype=torch.float64)


def conditions(number):
    return torch.randn(number, DIM, dtype=torch.float64)


def there_and_back(adapter, latents, shapes, condition):
    tokens, memory = adapter.embed(latents, shapes, condition)
    return tokens, adapter.read(tokens, shapes, condition, memory)


class Recorded(nn.Module):
    """Passes everything on, and remembers the shapes it saw."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        return x


# linear


def test_linear_projects_each_latent_by_itself():
    adapter, latents = exact(LinearAdapter(LATENT, DIM)), latents_of([(5,), (2, 3)])
    tokens, out = there_and_back(adapter, latents, [(5,), (2, 3)], conditions(2))
    to_model, to_latent = adapter.to_model, adapter.to_latent
    torch.testing.assert_close(tokens, latents @ to_model.weight.T + to_model.bias, rtol=0, atol=1e-12)
    torch.testing.assert_close(out, tokens @ to_latent.weight.T + to_latent.bias, rtol=0, atol=1e-12)
    assert adapter.token_shape((4, 7)) == (4, 7)


@pytest.mark.parametrize("adapter", [LinearAdapter(LATENT, DIM), unet()], ids=["linear", "unet"])
def test_what_comes_out_starts_at_zero_and_learns(adapter):
    shapes = [(4, 4)]
    _, out = there_and_back(adapter, latents_of(shapes).float(), shapes, conditions(1).float())
    assert torch.equal(out, torch.zeros(16, LATENT))
    out.sum().backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())


# pairs of any modules


@pytest.mark.parametrize("num_dim", [1, 2, 3])
def test_a_pair_gets_each_span_as_a_picture(num_dim):
    """Channels first: against the convolutions called by hand."""
    adapter, shape = exact(patches(num_dim)), (4, 2, 6)[:num_dim]
    latents = latents_of([shape])
    tokens, out = there_and_back(adapter, latents, [shape], conditions(1))
    by_hand = adapter.down(latents.reshape(*shape, LATENT).movedim(-1, 0)[None])
    torch.testing.assert_close(tokens, by_hand[0].movedim(0, -1).reshape(-1, DIM), rtol=0, atol=1e-12)
    back = adapter.up(by_hand)[0].movedim(0, -1).reshape(-1, LATENT)
    torch.testing.assert_close(out, back, rtol=0, atol=1e-12)
    assert adapter.token_shape(shape) == tuple(size // 2 for size in shape)


def test_a_pair_with_channels_last_is_called_with_channels_last():
    down, up = Recorded(), Recorded()
    adapter = pair(
        nn.Sequential(down, nn.Linear(LATENT, DIM)), nn.Sequential(up, nn.Linear(DIM, LATENT)), channel_first=False
    )
    shapes = [(2, 5), (3,)]
    adapter = exact(adapter)
    latents = latents_of(shapes)
    tokens, out = there_and_back(adapter, latents, shapes, conditions(2))
    assert {(1, 2, 5, LATENT), (1, 3, LATENT)} == set(down.seen)
    assert {(1, 2, 5, DIM), (1, 3, DIM)} == set(up.seen)
    torch.testing.assert_close(tokens, adapter.down(latents), rtol=0, atol=1e-12)
    torch.testing.assert_close(out, adapter.up(tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize("channel_first", [True, False])
def test_a_single_vector_is_a_span_of_no_axes(channel_first):
    down, up = Recorded(), Recorded()
    adapter = pair(
        nn.Sequential(down, nn.Linear(LATENT, DIM)),
        nn.Sequential(up, nn.Linear(DIM, LATENT)),
        channel_first=channel_first,
    )
    adapter, latents = exact(adapter), latents_of([(), ()])
    tokens, out = there_and_back(adapter, latents, [(), ()], conditions(2))
    assert adapter.token_shape(()) == ()
    assert down.seen[-1] == (2, LATENT)
    assert up.seen[-1] == (2, DIM)
    torch.testing.assert_close(out, adapter.up(adapter.down(latents)), rtol=0, atol=1e-12)
    assert tokens.shape == (2, DIM)


def test_spans_of_one_shape_are_one_call():
    down = Recorded()
    adapter = pair(nn.Sequential(down, nn.Conv1d(LATENT, DIM, 1)), nn.Conv1d(DIM, LATENT, 1)).double()
    shapes = [(4,), (2,), (4,), (4,), (2,)]
    for shape in set(shapes):
        adapter.token_shape(shape)
    down.seen.clear()
    adapter.embed(latents_of(shapes), shapes, conditions(5))
    assert sorted(down.seen) == [(2, LATENT, 2), (3, LATENT, 4)]


MANY = [(4, 6), (2, 2), (4, 6), (6, 4), (2, 2), (8, 2)]


@pytest.mark.parametrize("make", [patches, unet])
def test_many_shapes_in_one_call_are_one_by_one(make):
    adapter, latents, condition = exact(make()), latents_of(MANY), conditions(len(MANY))
    tokens, out = there_and_back(adapter, latents, MANY, condition)
    alone = [
        there_and_back(adapter, part, [shape], row[None])
        for part, shape, row in zip(latents.split([prod(shape) for shape in MANY]), MANY, condition, strict=True)
    ]
    torch.testing.assert_close(tokens, torch.cat([each for each, _ in alone]), rtol=0, atol=1e-10)
    torch.testing.assert_close(out, torch.cat([each for _, each in alone]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("make", [patches, unet])
def test_no_span_knows_of_another(make):
    adapter, latents, condition = exact(make()), latents_of(MANY).requires_grad_(), conditions(len(MANY))
    tokens, out = there_and_back(adapter, latents, MANY, condition)
    token_sizes = [prod(adapter.token_shape(shape)) for shape in MANY]
    for each, sizes in ((tokens, token_sizes), (out, [prod(shape) for shape in MANY])):
        for i, part in enumerate(each.split(sizes)):
            (gradient,) = torch.autograd.grad(part.square().sum(), latents, retain_graph=True)
            reached = [g.abs().sum() > 0 for g in gradient.split([prod(shape) for shape in MANY])]
            assert reached == [i == j for j in range(len(MANY))]


# U-Nets


@pytest.mark.parametrize("num_downsamples", [0, 1, 2])
@pytest.mark.parametrize("shape", [(8,), (7,), (1,), (4, 4), (5, 3), (1, 6), (4, 2, 4), (3, 5, 2)])
def test_a_unet_halves_every_axis_and_brings_odd_sizes_back(shape, num_downsamples):
    adapter = exact(unet(len(shape), num_downsamples))
    latents, condition = latents_of([shape]), conditions(1)
    tokens, out = there_and_back(adapter, latents, [shape], condition)
    halved = tuple(ceil(size / 2**num_downsamples) for size in shape)
    assert adapter.token_shape(shape) == halved
    assert tokens.shape == (prod(halved), DIM)
    assert out.shape == latents.shape


def test_a_condition_changes_its_own_span_on_both_ways():
    adapter, shapes = exact(unet()), [(4, 4), (2, 3), (4, 4)]
    latents, condition = latents_of(shapes), conditions(3).requires_grad_()
    tokens, memory = adapter.embed(latents, shapes, condition)
    later = conditions(3).requires_grad_()
    out = adapter.read(tokens.detach(), shapes, later, [[skip.detach() for skip in kept] for kept in memory])
    token_sizes, sizes = ([prod(each) for each in way] for way in ([(2, 2), (1, 2), (2, 2)], shapes))
    for each, parts, given in ((tokens, token_sizes, condition), (out, sizes, later)):
        for i, part in enumerate(each.split(parts)):
            (gradient,) = torch.autograd.grad(part.square().sum(), given, retain_graph=True)
            assert (gradient.abs().sum(dim=1) > 0).tolist() == [i == j for j in range(3)]


def test_a_unet_reads_what_it_kept_on_the_way_down():
    adapter, latents = exact(unet(num_downsamples=2)), latents_of([(6, 6)])
    tokens, memory = adapter.embed(latents, [(6, 6)], conditions(1))
    assert [tuple(skip.shape) for skip in memory[0]] == [(1, 4, 6, 6), (1, 8, 3, 3)]
    condition, out = conditions(1), []
    for i in (None, 0, 1):
        kept = [torch.zeros_like(skip) if i == j else skip for j, skip in enumerate(memory[0])]
        out.append(adapter.read(tokens, [(6, 6)], condition, [kept]))
    assert not torch.allclose(out[0], out[1], atol=1e-3)
    assert not torch.allclose(out[0], out[2], atol=1e-3)


def test_a_residual_block_starts_as_its_shortcut_and_is_its_formula():
    x, condition = torch.randn(2, 4, 5, dtype=torch.float64), conditions(2)
    block = ResidualBlock(4, 4, dim_condition=DIM, num_dim=1).double()
    assert torch.equal(block(x, condition), x)
    perturb(block)
    silu = nn.functional.silu
    hidden = block.norm_out(block.conv_in(silu(block.norm_in(x))))
    scale, shift = (condition @ block.to_modulation.weight.T + block.to_modulation.bias)[..., None].chunk(2, dim=1)
    by_hand = x + block.conv_out(silu(hidden * (1 + scale) + shift))
    torch.testing.assert_close(block(x, condition), by_hand, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_dim", [1, 2, 3])
def test_every_parameter_of_a_unet_learns(num_dim):
    adapter, shapes = exact(unet(num_dim, 2)), [(5, 4, 6)[:num_dim]] * 2
    _, out = there_and_back(adapter, latents_of(shapes), shapes, conditions(2))
    out.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())


def test_a_unet_tells_single_latents_apart():
    """A norm over too few of them would leave nothing of what they are."""
    adapter, latents = exact(unet()), latents_of([(1, 1)] * 3)
    tokens, _ = adapter.embed(latents, [(1, 1)] * 3, conditions(1).expand(3, -1))
    assert torch.pdist(tokens).min() > 0.1


@pytest.mark.parametrize("num_dim", [0, 4])
def test_a_unet_has_one_to_three_axes(num_dim):
    with pytest.raises(ValueError, match=f"convolutions need 1, 2 or 3 axes, got {num_dim}"):
        UNetDown(LATENT, DIM, num_dim=num_dim)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_downsamples=-1), "num_downsamples must not be negative, got -1"),
        (dict(dim_hidden=0), "dim_hidden must be positive, got 0"),
        (dict(dim=2 * DIM), "UNet.* was built with dim_latent=3 and dim=16, and here .* the transformer has dim=8"),
        (dict(dim_latent=4), "UNet.* was built with dim_latent=4 and dim=8, and here latents have dim_latent=3"),
    ],
)
def test_halves_that_fit_nothing_are_refused(options, message):
    built = dict(dim_latent=LATENT, dim=DIM) | options
    for make in (
        lambda: pair(UNetDown(**built), UNetUp(LATENT, DIM)),
        lambda: pair(UNetDown(LATENT, DIM), UNetUp(**built)),
    ):
        with pytest.raises(ValueError, match=message):
            make()


# the dry run


@pytest.mark.parametrize("make", [patches, unet])
@pytest.mark.parametrize("shape", [(4, 4), (2, 6), (8, 2)])
def test_the_token_shape_is_that_of_the_tokens(make, shape):
    adapter = make().double()
    tokens, _ = adapter.embed(latents_of([shape]), [shape], conditions(1))
    assert len(tokens) == prod(adapter.token_shape(shape))


def test_a_dry_run_leaves_no_trace():
    frozen = nn.BatchNorm1d(LATENT).eval()
    down = nn.Sequential(frozen, nn.Dropout(0.5), nn.Conv1d(LATENT, DIM, 2, stride=2), nn.BatchNorm1d(DIM))
    adapter = pair(down, nn.Sequential(nn.ConvTranspose1d(DIM, LATENT, 2, stride=2), nn.Dropout(0.5)))
    modes = [module.training for module in adapter.modules()]
    state, random = copy.deepcopy(adapter.state_dict()), torch.get_rng_state()
    assert adapter.token_shape((6,)) == (3,)
    for shape, message in (((5,), "became"), ((4, 4), "do not take")):
        with pytest.raises(ValueError, match=message):
            adapter.token_shape(shape)  # nor does one that fails
    assert [module.training for module in adapter.modules()] == modes
    assert not frozen.training
    assert adapter.training
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in adapter.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(parameter.grad is None for parameter in adapter.parameters())


def test_a_dry_run_is_made_once_for_each_shape():
    down = Recorded()
    adapter = pair(nn.Sequential(down, nn.Conv1d(LATENT, DIM, 1)), nn.Conv1d(DIM, LATENT, 1))
    for shape in [(4,), (2,), (4,), (2,)]:
        adapter.token_shape(shape)
    assert down.seen == [(1, LATENT, 4), (1, LATENT, 2)]


@pytest.mark.parametrize(
    ("down", "up", "shape", "message"),
    [
        (nn.Conv1d(LATENT, DIM, 2, 2), nn.ConvTranspose1d(DIM, LATENT, 2, 2), (5,), r"\(5, 3\) became .*and \(4, 3\)"),
        (nn.Conv1d(LATENT, 6, 1), nn.Conv1d(6, LATENT, 1), (4,), "must lead from 3 to 8 channels and back"),
        (nn.Conv1d(LATENT, DIM, 1), nn.Conv1d(DIM, 5, 1), (4,), "must lead from 3 to 8 channels and back"),
        (nn.Conv1d(7, DIM, 1), nn.Conv1d(DIM, LATENT, 1), (4,), r"do not take latents of shape \(4,\)"),
        (nn.Conv1d(LATENT, DIM, 1), nn.Conv1d(DIM, LATENT, 1), (4, 4), r"do not take latents of shape \(4, 4\)"),
        (nn.BatchNorm2d(LATENT), nn.Identity(), (4,), r"do not take latents of shape \(4,\)"),
        (nn.Conv1d(LATENT, DIM, 3), nn.ConvTranspose1d(DIM, LATENT, 3), (2,), r"do not take latents of shape \(2,\)"),
        (nn.Flatten(), nn.Identity(), (4,), "must lead from 3 to 8 channels and back"),
    ],
)  # fmt: skip
def test_a_pair_that_does_not_fit_says_so(down, up, shape, message):
    with pytest.raises(ValueError, match=message):
        pair(down, up).token_shape(shape)


def test_unet_halves_of_different_arguments_do_not_fit():
    adapter = pair(UNetDown(LATENT, DIM, dim_hidden=4), UNetUp(LATENT, DIM, dim_hidden=8))
    with pytest.raises(ValueError, match=r"do not take latents of shape \(4, 4\)"):
        adapter.token_shape((4, 4))


@pytest.mark.parametrize("swap", [False, True])
def test_half_a_unet_is_refused(swap):
    halves = (UNetDown(LATENT, DIM), nn.Identity()) if swap else (nn.Identity(), UNetUp(LATENT, DIM))
    with pytest.raises(ValueError, match="UNetDown and UNetUp go together"):
        pair(*halves)


@pytest.mark.parametrize("make", [patches, unet, lambda: LinearAdapter(LATENT, DIM)], ids=["patches", "unet", "linear"])
def test_adapters_can_be_copied_and_saved(make):
    adapter = exact(make())
    latents, condition, shapes = latents_of([(4, 4)]), conditions(1), [(4, 4)]
    expected = there_and_back(adapter, latents, shapes, condition)
    loaded = make().double()
    loaded.load_state_dict(adapter.state_dict())
    for again in (copy.deepcopy(adapter), loaded):
        torch.testing.assert_close(there_and_back(again, latents, shapes, condition), expected, rtol=0, atol=0)


# positions


def test_distinct_coordinates_have_distinct_embeddings():
    for shape in [(300,), (24, 24), (6, 7, 8)]:
        positions = AxialPositions(16, len(shape))
        embedded = positions(axial_coordinates(shape))
        assert embedded.shape == (prod(shape), 16)
        apart = torch.cdist(embedded, embedded) + torch.eye(prod(shape))
        assert apart.min() > 1e-3


def test_a_coordinate_has_one_embedding_whatever_the_shape():
    positions = AxialPositions(16, 2).double()
    small, large = (positions(axial_coordinates(shape, dtype=torch.float64)) for shape in [(3, 5), (70, 9)])
    torch.testing.assert_close(large.view(70, 9, 16)[:3, :5].reshape(-1, 16), small, rtol=0, atol=1e-12)


def test_axes_are_told_apart_and_lie_between_coordinates():
    positions = AxialPositions(16, 2).double()
    corners = positions(torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]], dtype=torch.float64))
    assert torch.pdist(corners).min() > 1e-3
    step = torch.tensor([[3.0, 2.0], [3.0, 2.0 + 1e-6]], dtype=torch.float64)
    assert torch.pdist(positions(step)).item() < 1e-5  # continuous


def test_positions_are_not_rounded_with_the_parameters():
    """In bfloat16, coordinates above 256 would fall together."""
    positions, coordinates = AxialPositions(64, 1), torch.arange(300, 364.0)[:, None]
    exactly = positions(coordinates)
    rounded = copy.deepcopy(positions).bfloat16()(coordinates)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exactly, rtol=0, atol=0.02)


@pytest.mark.parametrize("size", [4, 32])
def test_no_feature_of_a_position_is_the_same_at_all_coordinates(size):
    seen = []
    positions = AxialPositions(8, 2)
    positions.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    positions(torch.cartesian_prod(torch.arange(size), torch.arange(size)).float())
    assert (seen[0].std(dim=0) > 1e-6).all()
