"""`MMDiT.from_sd3` against `diffusers.SD3Transformer2DModel`, whose weights it takes."""

import warnings

import pytest
import torch
from mmdit_models import refused
from torch import randn

from transfusion_pytorch import MMDiT, SD3MMDiT
from transfusion_pytorch.mmdit.sd3_weights import converted, sizes_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")

TINY = dict(
    sample_size=16,
    patch_size=2,
    in_channels=4,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=4,
    joint_attention_dim=24,
    caption_projection_dim=32,
    pooled_projection_dim=20,
    out_channels=4,
    pos_embed_max_size=16,
)
CONFIGURATIONS = {
    "sd3": {},
    "sd3.5 medium": dict(dual_attention_layers=(0, 1), qk_norm="rms_norm"),
    "sd3.5 large": dict(qk_norm="rms_norm"),
    "dual alone": dict(dual_attention_layers=(1,)),
    "layer norm": dict(num_layers=2, qk_norm="layer_norm"),
    "other sizes": dict(num_layers=1, patch_size=1, in_channels=3, out_channels=5, attention_head_dim=12),
}
CONFIGURATIONS["other sizes"]["caption_projection_dim"] = 48


def theirs(**options):
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(**(TINY | options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.double()


def call(channels=4, height=12, width=8):
    """Latents, text, pooled text, times."""
    torch.manual_seed(1)
    shapes = (2, channels, height, width), (2, 7, 24), (2, 20)
    # small times: diffusers makes their sines in single precision, whatever the model is in
    return (*(randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes), torch.tensor([0.25, 6.5]))


def close(a, b, atol):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_outputs_and_gradients_are_those_of_diffusers(options):
    reference = theirs(**options)
    model = MMDiT.from_sd3(reference)
    inputs = call(reference.config.in_channels)
    expected, out = reference(*inputs, return_dict=False)[0], model(*inputs)
    close(out, expected, atol=1e-5)
    weight = randn(out.shape, dtype=torch.float64) / out.numel() ** 0.5
    gradients = [torch.autograd.grad(each, inputs[:3], weight, retain_graph=True) for each in (out, expected)]
    close(*gradients, atol=1e-5)
    out.backward(weight)
    expected.backward(weight)
    check_gradients(model, reference)


def check_gradients(model, reference):
    """Those of all weights, put into our order as the weights are."""
    state = reference.state_dict()
    grads = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    grads |= {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    ours = converted(grads, sizes_of(state, reference.config.attention_head_dim))
    for name, parameter in model.named_parameters():
        is_gain = name.endswith("_norm.weight") and reference.config.qk_norm == "rms_norm"
        expected = ours[name] + 1 if is_gain else ours[name]  # what a weight is less 1, is not so for its gradient
        close(parameter.grad, expected, atol=1e-5)


def test_single_precision_and_real_times_agree():
    torch.manual_seed(0)
    reference = diffusers.SD3Transformer2DModel(**(TINY | CONFIGURATIONS["sd3.5 medium"]))
    inputs = [x.detach().float() for x in call()[:3]]
    for times in (torch.tensor([3.0, 870.0]), torch.tensor([1000.0, 0.0])):
        out, expected = MMDiT.from_sd3(reference)(*inputs, times), reference(*inputs, times, return_dict=False)[0]
        assert expected.abs().max() > 0.1
        close(out, expected, atol=1e-5)


def test_a_state_is_enough_where_norms_tell_the_heads():
    reference = theirs(qk_norm="rms_norm")
    model = MMDiT.from_sd3(reference.state_dict())
    assert model.mmdit.rope["dim_head"] == 8
    inputs = call()
    close(model(*inputs), reference(*inputs, return_dict=False)[0], atol=1e-5)


def test_a_state_without_norms_needs_the_width_of_heads():
    reference = theirs()
    inputs = call()
    model = MMDiT.from_sd3(reference.state_dict(), dim_head=8)
    close(model(*inputs), reference(*inputs, return_dict=False)[0], atol=1e-5)
    with pytest.raises(ValueError, match="heads of 64 channels do not divide the width 32; give dim_head"):
        MMDiT.from_sd3(reference.state_dict())


def test_norms_without_weights_are_there():
    reference = theirs(num_layers=2, qk_norm="fp32_layer_norm", dual_attention_layers=(0,))
    inputs = call()
    expected = reference(*inputs, return_dict=False)[0]
    state = reference.state_dict()
    for model in (MMDiT.from_sd3(reference), MMDiT.from_sd3(state, dim_head=8, qk_norm="fp32_layer_norm")):
        close(model(*inputs), expected, atol=1e-4)  # diffusers makes this norm in single precision
    assert not torch.allclose(MMDiT.from_sd3(state, dim_head=8)(*inputs), expected, atol=1e-2)
    with pytest.raises(ValueError, match=r"qk_norm must be rms_norm, layer_norm or fp32_layer_norm, .* got 'l2'"):
        MMDiT.from_sd3(state, qk_norm="l2")
    with pytest.raises(ValueError, match=r"fp32_layer_norm has no weights, and the state has transformer_blocks\.0"):
        MMDiT.from_sd3(theirs(num_layers=1, qk_norm="rms_norm").state_dict(), qk_norm="fp32_layer_norm")


def test_weights_are_copies_of_their_type():
    reference = theirs().float()
    model = MMDiT.from_sd3(reference)
    before = reference.proj_out.bias.clone()
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.requires_grad
        parameter.data.add_(1)
    assert torch.equal(reference.proj_out.bias, before)


def test_what_is_missing_or_left_over_is_named():
    state = theirs().state_dict()
    with pytest.raises(ValueError, match=r"the state has weights that an SD3 transformer has not: extra\.weight"):
        MMDiT.from_sd3(state | {"extra.weight": torch.zeros(1)}, dim_head=8)
    del state["norm_out.linear.bias"]
    with pytest.raises(ValueError, match=r"the state has no norm_out\.linear\.bias: expected the names of a diffusers"):
        MMDiT.from_sd3(state, dim_head=8)
    with pytest.raises(ValueError, match=r"the state has no pos_embed\.proj\.weight: .*, got a, b"):
        MMDiT.from_sd3(dict(a=torch.zeros(1), b=torch.zeros(1)))


def test_images_must_fit():
    model, (latents, *rest) = MMDiT.from_sd3(theirs()), call()
    with pytest.raises(ValueError, match="hidden_states: expected sides that are multiples of 2, got"):
        model(latents[:, :, :5], *rest)
    with pytest.raises(ValueError, match="hidden_states: at most 16 patches along a side have a position, got 17, 4"):
        model(randn(2, 4, 34, 8, dtype=torch.float64), *rest)


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, randn(2, 3, 12, 8), r"hidden_states: expected latents \(b, 4, y, x\), got \(2, 3, 12, 8\)"),
        (0, randn(4, 12, 8), r"hidden_states: expected latents \(b, 4, y, x\), got \(4, 12, 8\)"),
        (1, randn(2, 7, 23), r"encoder_hidden_states: expected text \(2, tokens, 24\), got \(2, 7, 23\)"),
        (2, randn(2, 19), r"pooled_projections: expected the shape \(2, 20\), got \(2, 19\)"),
    ],
)
def test_wrong_inputs_are_refused_by_name(index, wrong, message):
    inputs = [wrong if i == index else x for i, x in enumerate(call())]
    with refused(ValueError, message, is_type=index == 0 and wrong.ndim == 3):
        tiny()(*inputs)


def test_padding_of_text_is_left_out():
    model, (latents, text, *rest) = MMDiT.from_sd3(theirs()), call()
    mask = torch.tensor([[True] * 5 + [False] * 2] * 2)
    close(model(latents, text, *rest, padding_mask=mask), model(latents, text[:, :5], *rest), atol=1e-10)


def test_it_can_be_saved_and_checkpointed(tmp_path):
    model, inputs = MMDiT.from_sd3(theirs(qk_norm="rms_norm", dual_attention_layers=(0,))), call()
    model.save_pretrained(tmp_path)
    assert torch.equal(SD3MMDiT.from_pretrained(tmp_path)(*inputs), model(*inputs))
    expected = torch.autograd.grad(model(*inputs).square().sum(), inputs[0])
    model.gradient_checkpointing_enable()
    close(torch.autograd.grad(model(*inputs).square().sum(), inputs[0]), expected, atol=0)


def tiny():
    sizes = dict(channels=4, out_channels=4, patch_size=2, dim_text=24, dim_pooled=20, table_size=8)
    return SD3MMDiT(depth=1, dim_head=8, heads=2, **sizes)


def test_it_can_be_built_without_weights():
    model = tiny()
    out = model(*(x.float() for x in call()))
    assert torch.equal(out, torch.zeros(2, 4, 12, 8))
    rows = model.position_table.flatten(0, 1)
    assert (torch.cdist(rows, rows) + torch.eye(64)).min() > 0.1
