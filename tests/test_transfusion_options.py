"""The options of `Transfusion` and of its transformer, what they change, and what may not be combined."""

import copy
import io
from collections.abc import Sequence
from types import SimpleNamespace

import numpy
import pytest
import torch
from checks import no_typecheck
from tiny import CHANNELS, NUM_TEXT, Spy, awake, latents_of, layout, noise_of, ragged_batch, tiny
from torch import nn, tensor

from transfusion_pytorch import TimePolicy, Transformer, Transfusion, UNetDown, UNetUp
from transfusion_pytorch.network import attend

EXACT = dict(rtol=1e-10, atol=1e-10)

TRUNKS = {
    "one layer": dict(depth=1),
    "three layers": dict(depth=3),
    "shared keys and values": dict(kv_heads=1),
    "no long skips": dict(unet_skips=False),
    "value residual": dict(use_value_residual=True),
    "laser": dict(attn_laser=True),
    "no norm of queries and keys": dict(qk_rmsnorm=False),
    "no gates": dict(attn_kwargs=dict(gate_values=False)),
    "soft cap": dict(attn_kwargs=dict(softcap_value=1.0)),
    "swiglu": dict(ff_kwargs=dict(activation="swiglu")),
    "wide feedforward": dict(ff_expansion_factor=8),
    "rotary base": dict(rotary_theta=100.0),
    "residual streams": dict(num_residual_streams=2),
    "residual fractions": dict(num_residual_fracs=2),
    "checkpoints": dict(use_checkpoint=True),
}


def built(options) -> Transfusion:
    torch.manual_seed(0)
    return awake(tiny(trunk=options))


# the transformer


@pytest.mark.parametrize("name", TRUNKS)
def test_a_packed_batch_is_its_samples_one_by_one_with(name):
    model, batch = built(TRUNKS[name]), ragged_batch()
    together = model(batch, return_loss=False)
    for row, sample in zip(together, batch, strict=True):
        (alone,) = model([sample], return_loss=False)
        torch.testing.assert_close(row[: len(alone)], alone, **EXACT)


@pytest.mark.parametrize("name", TRUNKS)
def test_a_step_downhill_lowers_the_loss_with(name, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", noise_of)
    model, batch = built(TRUNKS[name]), ragged_batch()
    before = model(batch, times=0.5)
    before.backward()
    parameters = list(model.parameters())
    assert all(parameter.grad is not None for parameter in parameters)
    slope = sum(parameter.grad.square().sum() for parameter in parameters)
    step = 1e-3 / slope
    with torch.no_grad():
        for parameter in parameters:
            parameter.sub_(step * parameter.grad)
    torch.testing.assert_close(before - model(batch, times=0.5), tensor(1e-3).double(), rtol=0.2, atol=0)


CHANGES_NOTHING = ("checkpoints",)
SAME_PARAMETERS = ("laser", "soft cap", "swiglu", "rotary base")


@pytest.mark.parametrize("name", [*SAME_PARAMETERS, *CHANGES_NOTHING])
def test_with_the_same_parameters_logits_change_only_where_they_should(name):
    plain, changed = built({}), built(TRUNKS[name])
    changed.load_state_dict(plain.state_dict())
    logits = [model(ragged_batch(), return_loss=False) for model in (plain, changed)]
    assert torch.equal(*logits) == (name in CHANGES_NOTHING)


@pytest.mark.parametrize("name", [name for name in TRUNKS if name not in (*SAME_PARAMETERS, *CHANGES_NOTHING)])
def test_the_other_options_change_the_parameters(name):
    shapes = [[tuple(p.shape) for p in built(options).parameters()] for options in ({}, TRUNKS[name])]
    assert shapes[0] != shapes[1]


def test_checkpoints_change_no_gradient():
    gradients = []
    for options in ({}, dict(use_checkpoint=True)):
        model = built(options).train()
        torch.manual_seed(1)
        model(ragged_batch()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_dropout_acts_in_training_alone():
    model, ids = built(dict(dropout=0.5)), tensor([[1, 2, 3]])
    assert torch.equal(model(ids, return_loss=False), model(ids, return_loss=False))
    model.train()
    assert not torch.equal(model(ids, return_loss=False), model(ids, return_loss=False))


def test_flex_attention_is_the_same_attention_and_says_where_it_cannot_train():
    plain, flex = built({}).float(), built(dict(use_flex_attn=True)).float()
    with torch.no_grad():
        logits = [model(ragged_batch(), return_loss=False) for model in (plain, flex)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    attend._say_flex_fallback.cache_clear()
    with pytest.warns(UserWarning, match="use_flex_attn: torch has no backward"):
        losses = [model(ragged_batch(), times=1.0) for model in (plain, flex)]
    assert torch.equal(*losses)
    losses[1].backward()  # without a second warning, which would be an error


def test_a_transformer_of_the_users_own_is_used_as_it_is():
    trunk = Transformer(16, depth=1, heads=2, dim_head=8)
    model = Transfusion(num_text_tokens=NUM_TEXT, dim_latent=CHANNELS, transformer=trunk)
    assert model.transformer is trunk
    assert model(ragged_batch()).isfinite()


class Mean(nn.Module):
    """A trunk that adds to each token the mean of all."""

    dim = 16

    def forward(self, x, **streams):
        return x + x.mean(dim=0)


def test_any_module_with_a_width_may_be_the_transformer():
    model = awake(Transfusion(num_text_tokens=NUM_TEXT, dim_latent=3, transformer=Mean()))
    ids = tensor([[1, 2, 3]])
    x = model.text_embedding(ids[0])
    torch.testing.assert_close(model(ids, return_loss=False)[0], model.to_logits(x + x.mean(dim=0)), **EXACT)
    model([[ids[0], torch.randn(2, 3)]]).backward()


# positions, pairs


@pytest.mark.parametrize("add_pos_emb", [None, True, False])
def test_without_positions_a_modality_is_a_set(add_pos_emb):
    model = awake(tiny(dim_latent=3, modality_num_dim=2, add_pos_emb=add_pos_emb))
    latents = torch.randn(2, 3, 3)
    turned = latents.flip(0, 1)
    logits = [model([[tensor([1]), part, tensor([2])]], return_loss=False)[0] for part in (latents, turned)]
    if add_pos_emb is False:
        torch.testing.assert_close(logits[0][-3:], logits[1][-3:], **EXACT)
    else:
        assert not torch.allclose(logits[0][-3:], logits[1][-3:])


def test_positions_are_on_where_the_number_of_axes_is_known_and_positive():
    for options, expected in (
        (dict(modality_default_shape=((4, 4), ())), [True, False]),
        (dict(modality_num_dim=(3, 0)), [True, False]),
        (dict(modality_num_dim=(1, None)), [True, False]),
        (dict(modality_num_dim=1, add_pos_emb=(False, True)), [False, True]),
        (dict(), [False, False]),
    ):
        model = tiny(**options)
        assert [info.add_pos_emb for info in map(model.get_modality_info, (0, 1))] == expected


def test_a_pair_of_linear_layers_is_the_default():
    torch.manual_seed(0)
    plain = awake(tiny(dim_latent=3))
    down, up = plain.modalities[0].adapter.to_model, plain.modalities[0].adapter.to_latent
    pair = awake(tiny(dim_latent=3, pre_post_transformer_enc_dec=(nn.Linear(3, 16), nn.Linear(16, 3))))
    names = {"adapter.to_model": "adapter.down", "adapter.to_latent": "adapter.up"}
    state = plain.state_dict()
    for old, new in names.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    pair.load_state_dict(state)
    assert torch.equal(pair.modalities[0].adapter.down.weight, down.weight)
    assert torch.equal(pair.modalities[0].adapter.up.weight, up.weight)
    batch = [[tensor([1]), torch.randn(2, 2, 3), tensor([2]), torch.randn(3, 3)], [torch.randn(3)]]
    results = []
    for model in (plain, pair):
        torch.manual_seed(3)
        results.append((model(batch), model(batch, return_loss=False)))
    torch.testing.assert_close(results[0], results[1], **EXACT)


def convolutions():
    return nn.Conv2d(3, 16, 2, stride=2), nn.ConvTranspose2d(16, 3, 2, stride=2)


def unet():
    return UNetDown(3, 16, dim_hidden=4), UNetUp(3, 16, dim_hidden=4)


def around(pair, **options) -> Transfusion:
    options = dict(dim_latent=3, channel_first_latent=True, modality_num_dim=2) | options
    return tiny(pre_post_transformer_enc_dec=pair, **options)


@pytest.mark.parametrize("pair", [convolutions, unet])
def test_a_pair_of_modules_shortens_the_sequence_and_not_the_written_shape(pair):
    model, sample = around(pair()), [tensor([1]), torch.randn(3, 4, 6), tensor([2])]
    spy, read = Spy(model.text_embedding), Spy(model.transformer)
    model([sample], times=0.5)
    whole = layout(model, [tensor([1]), sample[1].movedim(0, -1), tensor([2])])
    shape = model.char_tokenizer("4,6").tolist()
    assert whole[3:6] == shape
    expected = [0 if token is None else token for token in whole]
    first = whole.index(None)
    expected[first : first + 24] = [0] * 6
    assert spy.inputs[0].tolist() == expected
    assert len(read.inputs[0]) == len(expected)


@pytest.mark.parametrize("pair", [convolutions, unet])
def test_a_pair_of_modules_trains_end_to_end_on_any_shapes(pair, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", noise_of)
    model = awake(around(pair(), reconstruction_loss_weight=1.0))
    shapes = [(4, 6), (2, 2), (4, 6)]
    batch = [[tensor([1]), torch.randn(3, *shapes[0]), torch.randn(3, *shapes[1])], [torch.randn(3, *shapes[2])]]
    times = tensor([[0.25, 0.5], [0.75, 0.75]])
    total, parts = model(batch, times=times, return_breakdown=True)
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name

    singles = [model([s], times=t[None], return_breakdown=True)[1] for s, t in zip(batch, times, strict=True)]
    for loss in ("flow", "recon"):
        first, second = (getattr(parts, loss) for parts in singles)
        torch.testing.assert_close(getattr(parts, loss), (28 * first + 24 * second) / 52, **EXACT)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.step()
        optimizer.zero_grad()
        loss = model(batch, times=times)
        loss.backward()
    assert loss < total


def test_a_unet_takes_odd_sizes_and_starts_at_zero_velocity():
    model, batch = around(unet()).double().eval(), [[torch.randn(3, 5, 3)], [torch.randn(3, 1, 2)]]
    torch.manual_seed(3)
    _, parts = model(batch, times=0.5, return_breakdown=True)
    torch.manual_seed(3)
    clean = latents_of([[part.movedim(0, -1) for part in sample] for sample in batch], 0).double()
    torch.testing.assert_close(parts.flow[0], (clean - torch.randn_like(clean)).square().mean(), **EXACT)


def test_latents_that_do_not_get_through_a_pair_are_named():
    model = around(convolutions())
    with pytest.raises(ValueError, match=r"sample 1, part 1: the modules around the transformer .*\(5, 4, 3\)"):
        model([[tensor([1])], [tensor([1]), torch.randn(3, 5, 4)]])


class Flattening(nn.Module):
    def forward(self, x):
        return x.flatten(1, 2).repeat(1, 1, 4)


class Restoring(nn.Module):
    def forward(self, x):
        return x[..., :4].unflatten(1, (2, 3))


def test_a_pair_may_change_the_number_of_axes_if_there_are_no_positions():
    options = dict(dim_latent=4, modality_default_shape=(2, 3))
    pair = (Flattening(), Restoring())
    with pytest.raises(ValueError, match=r"positions of 2 axes, but .* \(2, 3\) become .* \(6,\); set add_pos_emb"):
        tiny(pre_post_transformer_enc_dec=pair, **options)
    model = tiny(pre_post_transformer_enc_dec=pair, add_pos_emb=False, **options)
    assert model([[torch.randn(2, 3, 4)]]).isfinite()


# the constructor refuses

UNFIT = {
    "negative vocabulary": (dict(num_text_tokens=-1), r"num_text_tokens must be at least 0, got -1"),
    "no modality": (dict(dim_latent=()), r"dim_latent must be the positive number of channels"),
    "no channels": (dict(dim_latent=(3, 0)), r"dim_latent must be the positive number of channels .* \(3, 0\)"),
    "axes against shape": (
        dict(modality_default_shape=(4, 4), modality_num_dim=1),
        r"modality 0: modality_num_dim is 1 but the default shape \(4, 4\) has 2 axes",
    ),
    "empty axis": (dict(modality_default_shape=(4, 0)), r"modality 0: a default shape is .* got \(4, 0\)"),
    "four axes": (dict(modality_default_shape=(1, 1, 1, 1)), r"0 to 3 positive ints, got \(1, 1, 1, 1\)"),
    "shapes too many": (dict(modality_default_shape=((4,),) * 3), r"modality_default_shape: expected one value or 2"),
    "four axes asked for": (dict(modality_num_dim=4), r"modality 0: modality_num_dim must be 0 to 3, got 4"),
    "negative axes": (dict(modality_num_dim=(1, -1)), r"modality 1: modality_num_dim must be 0 to 3, got -1"),
    "axes too few": (dict(modality_num_dim=(1,)), r"modality_num_dim: expected one value or 2, .* got 1"),
    "channels first too many": (
        dict(channel_first_latent=[True] * 3),
        r"channel_first_latent: expected one value or 2",
    ),
    "encoders too few": (dict(modality_encoder=(None,)), r"modality_encoder: expected one value or 2"),
    "decoders too few": (dict(modality_decoder=[nn.Identity()]), r"modality_decoder: expected one value or 2"),
    "weights too many": (dict(flow_loss_weight=(1.0, 1.0, 1.0)), r"flow_loss_weight: expected one value or 2"),
    "consistency weights too few": (
        dict(velocity_consistency_loss_weight=(1.0,)),
        r"velocity_consistency_loss_weight: expected one value or 2",
    ),
    "reconstruction weights too many": (
        dict(reconstruction_loss_weight=(1.0, 1.0, 1.0)),
        r"reconstruction_loss_weight: expected one value or 2",
    ),
    "negative text weight": (dict(text_loss_weight=-1.0), r"text_loss_weight must be at least 0, got -1.0"),
    "negative flow weight": (dict(flow_loss_weight=(1.0, -2.0)), r"flow_loss_weight must be at least 0, got -2.0"),
    "negative consistency weight": (
        dict(velocity_consistency_loss_weight=-0.1),
        r"velocity_consistency_loss_weight must be at least 0",
    ),
    "negative reconstruction weight": (
        dict(reconstruction_loss_weight=(0.0, -0.1)),
        r"reconstruction_loss_weight must be at least 0",
    ),
    "infinite weight": (dict(text_loss_weight=float("inf")), r"text_loss_weight must be finite, got inf"),
    "positions too many": (dict(add_pos_emb=(True,) * 3), r"add_pos_emb: expected one value or 2"),
    "positions without axes": (dict(add_pos_emb=True), r"modality 0: add_pos_emb needs the number of axes"),
    "positions of a vector": (dict(modality_num_dim=0, add_pos_emb=True), r"modality 0: add_pos_emb needs the number"),
    "parsers too few": (dict(to_modality_shape_fn=[len]), r"to_modality_shape_fn: expected one value or 2"),
    "unknown solver": (
        dict(odeint_kwargs=dict(method="magic")),
        r"unknown ODE method 'magic', choose one of .*midpoint",
    ),
    "probability": (dict(prob_uncond=1.1), r"prob_uncond is a probability, got 1.1"),
    "negative probability": (dict(prob_uncond=-0.1), r"prob_uncond is a probability"),
    "label that is an id": (dict(ignore_index=3), r"ignore_index must be negative"),
    "half a unet": (
        dict(dim_latent=3, pre_post_transformer_enc_dec=(unet()[0], nn.Identity())),
        r"UNetDown and UNetUp go together",
    ),
    "pair of wrong width": (
        dict(
            dim_latent=3, modality_default_shape=(4,), pre_post_transformer_enc_dec=(nn.Linear(3, 8), nn.Linear(8, 3))
        ),
        r"must lead from 3 to 16 channels and back",
    ),
    "pair that does not return": (
        dict(dim_latent=3, modality_default_shape=(4,), pre_post_transformer_enc_dec=(nn.Linear(3, 16), nn.Identity())),
        r"must lead from 3 to 16 channels and back",
    ),
    "pair for another shape": (
        dict(dim_latent=3, modality_default_shape=(5, 5), pre_post_transformer_enc_dec=convolutions()),
        r"latents of shape \(5, 5\)|must lead from",
    ),
    "no heads for the keys": (dict(trunk=dict(kv_heads=3)), r"heads must be a multiple of kv_heads"),
    "no layer": (dict(trunk=dict(depth=0)), r"depth must be positive, got 0"),
    "odd head": (dict(trunk=dict(dim_head=7)), r"dim_head must be even"),
    "time policy": (dict(time_policy=lambda: TimePolicy(noise_limit=2.0)), r"noise_limit must be between 0 and 1"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_the_constructor_refuses(case):
    options, message = UNFIT[case]
    with pytest.raises(ValueError, match=message):
        tiny(**{name: value() if name == "time_policy" else value for name, value in options.items()})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(modality_encoder=len), r"modality 0: modality_encoder must be an nn.Module, got builtin"),
        (dict(modality_decoder=(None, "vae")), r"modality 1: modality_decoder must be an nn.Module, got str"),
        (dict(pre_post_transformer_enc_dec=((len, len), None)), r"modality 0: pre_post_.* must be two modules"),
        (dict(transformer=None), r"transformer must be a dict of Transformer arguments, or a module .* got NoneType"),
        (dict(transformer=nn.Linear(2, 2)), r"transformer must be .* `dim`, got Linear"),
    ],
)
def test_the_constructor_takes_modules_where_it_needs_them(options, message):
    with pytest.raises(TypeError, match=message):
        tiny(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_text_tokens="a"), r"num_text_tokens must be an int, got 'a'"),
        (dict(num_text_tokens=10.0), r"num_text_tokens must be an int, got 10.0"),
        (dict(num_text_tokens=True), r"num_text_tokens must be an int, got True"),
        (dict(ignore_index="a"), r"ignore_index must be an int, got 'a'"),
        (dict(prob_uncond="a"), r"prob_uncond must be a number, got 'a'"),
        (dict(text_loss_weight=(1.0, 1.0)), r"text_loss_weight must be a number, got \(1.0, 1.0\)"),
        (dict(flow_loss_weight=(1.0, None)), r"flow_loss_weight must be a number, got None"),
        (dict(reconstruction_loss_weight="a"), r"reconstruction_loss_weight must be a number, got 'a'"),
        (
            dict(fallback_to_default_shape_if_invalid=(False, False)),
            r"fallback_to_default_shape_if_invalid must be a bool, got \(False, False\)",
        ),
        (dict(model_output_clean=(True, False)), r"model_output_clean must be a bool, got \(True, False\)"),
        (dict(tie_embeddings="no"), r"tie_embeddings must be a bool, got 'no'"),
        (dict(freeze_text="no"), r"freeze_text must be a bool, got 'no'"),
        (dict(channel_first_latent="no"), r"modality 0: channel_first_latent must be a bool, got 'no'"),
        (
            dict(modality_encoder_decoder_requires_batch_dim=(True, "no")),
            r"modality 1: modality_encoder_decoder_requires_batch_dim must be a bool, got 'no'",
        ),
        (dict(add_pos_emb=(None, "no")), r"modality 1: add_pos_emb must be a bool, got 'no'"),
        (dict(to_modality_shape_fn="h,w"), r"to_modality_shape_fn must be a function .* got 'h,w'"),
        (dict(odeint_kwargs="euler"), r"odeint_kwargs must be a dict, .* got 'euler'"),
        (dict(time_policy="beta"), r"time_policy must be a TimePolicy, got 'beta'"),
    ],
)
@no_typecheck
def test_the_constructor_takes_what_it_says(options, message):
    with pytest.raises(TypeError, match=message):
        tiny(**options)


def test_the_vocabulary_is_a_plain_number():
    assert type(tiny(num_text_tokens=numpy.int64(7)).vocabulary.num_text) is int


@pytest.mark.parametrize("name", ["velocity_consistency_loss_weight", "reconstruction_loss_weight", "flow_loss_weight"])
def test_weights_of_each_modality_weigh_its_loss(name):
    """One number is meant for all."""
    losses = {}
    for weight in (0.5, (0.5, 0.5), (0.5, 2.0), (0.5, 0.0)):
        off = dict(flow_loss_weight=0.0, velocity_consistency_loss_weight=0.0, reconstruction_loss_weight=0.0)
        torch.manual_seed(1)
        model = awake(tiny(text_loss_weight=0.0, **off | {name: weight}))
        teacher = copy.deepcopy(model)
        for parameter in teacher.modalities.parameters():
            parameter.data.mul_(0.5)
        generator = torch.Generator().manual_seed(3)
        options = dict(velocity_consistency_ema_model=teacher, generator=generator)
        losses[weight] = model(ragged_batch(), return_breakdown=True, **options)[1]
    field = dict(flow_loss_weight="flow", velocity_consistency_loss_weight="velocity").get(name, "recon")
    first, second = getattr(losses[0.5], field)
    assert first > 0
    assert second > 0
    assert losses[0.5].total == losses[0.5, 0.5].total
    torch.testing.assert_close(losses[0.5].total, 0.5 * (first + second), **EXACT)
    torch.testing.assert_close(losses[0.5, 2.0].total, 0.5 * first + 2.0 * second, **EXACT)
    torch.testing.assert_close(losses[0.5, 0.0].total, 0.5 * first, **EXACT)


def test_what_has_no_reconstruction_weight_is_not_decoded():
    decoders = [nn.Linear(channels, 5) for channels in CHANNELS]
    spies = [Spy(decoder) for decoder in decoders]
    model = tiny(modality_decoder=decoders, reconstruction_loss_weight=(0.0, 1.0))
    loss, parts = model(ragged_batch(), return_breakdown=True)
    assert loss.isfinite()
    assert not spies[0].inputs
    assert spies[1].inputs
    assert (parts.recon > 0).tolist() == [False, True]
    counts = model.count_targets(ragged_batch())
    assert (counts.decoded > 0).tolist() == [False, True]


class Listed(Sequence):
    """What configuration libraries have instead of lists (`ListConfig`)."""

    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_lists_and_numbers_of_other_libraries_are_lists_and_numbers():
    options = dict(modality_default_shape=(torch.Size([2, 2]), Listed(3)), dim_latent=Listed(numpy.int64(3), 2))
    options |= dict(
        channel_first_latent=Listed(True, False), flow_loss_weight=Listed(1.0, 2.0), modality_num_dim=[2, 1]
    )
    model = tiny(**options)
    assert [io.spec.default_shape for io in model.modalities] == [(2, 2), (3,)]
    assert model.loss_weights.flow == (1.0, 2.0)
    assert tiny(dim_latent=numpy.int64(3), modality_default_shape=numpy.int32(4)).modalities[0].spec.default_shape == (
        4,
    )
    image = torch.randn(3, 2, 2)
    for part in ([0, image], (numpy.int64(0), image), [numpy.uint8(0), image]):
        assert torch.equal(
            model.eval()([[tensor([1]), part]], return_loss=False), model([[tensor([1]), image]], return_loss=False)
        )


def test_one_pair_for_several_modalities_is_copied():
    down, up = nn.Linear(3, 16), nn.Linear(16, 3)
    model = tiny(dim_latent=(3, 3), pre_post_transformer_enc_dec=(down, up))
    assert model.modalities[0].adapter.down is down
    assert model.modalities[1].adapter.down is not down
    twice = tiny(dim_latent=(3, 3), pre_post_transformer_enc_dec=((down, up), (down, up)))
    assert twice.modalities[1].adapter.up is not up


def test_a_default_device_is_for_the_model_and_not_for_the_batch():
    with torch.device("meta"):
        model = tiny(modality_default_shape=((2, 2), ()))
        batch = model.packer(token_budget=64)(
            [[torch.ones(3, dtype=torch.long, device="cpu"), torch.zeros(2, 2, 3, device="cpu")]]
        )
        assert batch.stream.token.device.type == batch.targets.slot.device.type == "cpu"
        loss = model(batch)
        loss.backward()
        assert loss.is_meta
    model = tiny(modality_default_shape=((2, 2), ()))
    prompt, options = tensor([1]), dict(max_length=30, force_modality_at_start=(0, (2, 2)), text_temperature=0.0)
    expected = seeded(lambda: model.sample(prompt, **options))
    with torch.device("meta"):
        made = seeded(lambda: model.sample(prompt, **options))
    assert repr(made) == repr(expected)


def seeded(call):
    torch.manual_seed(0)
    return call()


class Posterior:
    """A distribution over latents, as diffusers' autoencoders return it."""

    def __init__(self, mean):
        self.mean = mean

    def sample(self):
        return self.mean


@pytest.mark.parametrize(
    "wrap",
    [
        Posterior,
        lambda x: SimpleNamespace(latent_dist=Posterior(x)),
        lambda x: SimpleNamespace(latents=x),
        lambda x: SimpleNamespace(latent=x),
        lambda x: torch.distributions.Normal(x, torch.full_like(x, 1e-20), validate_args=False),
    ],
)
def test_an_encoder_may_return_a_distribution(wrap):
    class Encoder(nn.Module):
        def forward(self, x):
            return wrap(x)

    model, image = tiny(modality_encoder=(Encoder(), None)).eval(), torch.randn(2, 2, 3)
    expected = tiny().eval()
    expected.load_state_dict(model.state_dict())
    samples = [[tensor([1]), image]]
    torch.testing.assert_close(model(samples, return_loss=False), expected(samples, return_loss=False))
    assert repr(model.sample(image, max_length=12, text_temperature=0.0)) == repr(
        expected.sample(image, max_length=12, text_temperature=0.0)
    )


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_stays_what_it_is(error):
    class Encoder(nn.Module):
        def forward(self, x):
            if x.is_meta:
                return x
            raise error

    with pytest.raises(type(error), match=str(error)):
        tiny(modality_encoder=(Encoder(), None))([[torch.randn(2, 2, 3)]])
    pair = Encoder(), nn.Identity()
    with pytest.raises(type(error), match=str(error)):
        tiny(dim_latent=16, pre_post_transformer_enc_dec=pair)([[torch.randn(2, 2, 16)]])


def test_one_value_serves_all_modalities():
    model = tiny(modality_default_shape=4, modality_encoder=nn.Identity(), flow_loss_weight=2)
    assert [info.default_shape for info in map(model.get_modality_info, (0, 1))] == [(4,), (4,)]
    assert model.loss_weights.flow == (2, 2)


# copies


def parser(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))


def used_model() -> Transfusion:
    """Everything a model may remember: gradients, a teacher, shapes that went through a U-Net, a cache."""
    model = around(
        unet(), to_modality_shape_fn=parser, trunk=dict(num_residual_streams=2), modality_encoder=nn.Identity()
    )
    batch = [[tensor([1]), torch.randn(3, 4, 4), tensor([2])]]
    model(batch, velocity_consistency_ema_model=model.create_ema()).backward()
    model.sample(tensor([1]), max_length=6)
    return model


def saved(model: Transfusion) -> Transfusion:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def loaded(model: Transfusion) -> Transfusion:
    other = around(unet(), trunk=dict(num_residual_streams=2), modality_encoder=nn.Identity())
    assert other.load_state_dict(model.state_dict(), strict=True)
    return other


@pytest.mark.parametrize("again", [copy.deepcopy, saved, loaded])
def test_a_copy_does_the_same_and_shares_nothing(again):
    model = used_model()
    other = again(model)
    batch = [[tensor([1]), torch.randn(3, 4, 4), tensor([2])]]
    with torch.no_grad():
        assert torch.equal(model.eval()(batch, return_loss=False), other.eval()(batch, return_loss=False))
        addresses = {parameter.data_ptr() for parameter in model.parameters()}
        assert not addresses & {parameter.data_ptr() for parameter in other.parameters()}
    other.train()(batch).backward()


def test_saved_weights_load_without_trust():
    model, buffer = used_model(), io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = loaded(model)
    assert other.load_state_dict(torch.load(buffer, weights_only=True), strict=True)


def test_times_and_latents_are_precise_in_a_model_of_low_precision(monkeypatch):
    """bfloat16 tells times near 1 apart by 1/256, and latents by as much of themselves."""
    model = tiny().bfloat16()
    seen, run = [], model.forward_stream
    monkeypatch.setattr(model, "forward_stream", lambda *args, **kw: seen.append(args[1:3]) or run(*args, **kw))
    loss = model(ragged_batch(), times=0.999)
    loss.backward()
    [(latents, t)] = seen
    assert {t.dtype, loss.dtype, *(x.dtype for x in latents.values())} == {torch.float32}
    assert t.tolist() == pytest.approx([0.999] * len(t))
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.bfloat16}


def test_an_autoencoder_keeps_its_own_precision():
    model = tiny(
        dim_latent=3,
        modality_default_shape=(2, 2),
        channel_first_latent=True,
        modality_encoder=nn.Conv2d(3, 3, 1),
        modality_decoder=nn.Conv2d(3, 3, 1),
        reconstruction_loss_weight=1.0,
    ).bfloat16()
    model.modalities.float()
    model.modalities[0].adapter.bfloat16()
    model.modalities[0].positions.bfloat16()
    batch = [[torch.randint(0, NUM_TEXT, (3,)), torch.randn(3, 2, 2)]]
    assert model(batch).isfinite()
    kind, picture = model.sample(force_modality_at_start=0, max_length=12, modality_steps=1)[1]
    assert (kind, picture.dtype) == (0, torch.float32)
