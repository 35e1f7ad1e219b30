"""On the meta device nothing can be read: whatever waits for a GPU raises here."""

import pickle

import pytest
import torch
from checks import TYPECHECK
from network_streams import STREAMS, perturb, stream
from torch import nn

from transfusion_pytorch.network.norms import Conditioning
from transfusion_pytorch.network.transformer import Transformer
from transfusion_pytorch.training.cross_entropy import cross_entropy_per_target, summed_cross_entropy

DIM = 12
OPTIONS = {
    "default": dict(),
    "grouped": dict(kv_heads=1),
    "no norm": dict(qk_rmsnorm=False, unet_skips=False),
    "softcap": dict(attn_kwargs=dict(softcap_value=3.0)),
    "laser and value residual": dict(attn_laser=True, use_value_residual=True),
    "streams": dict(num_residual_streams=3),
    "fractions": dict(num_residual_fracs=3),
    "checkpoint": dict(use_checkpoint=True),
    "selective": dict(use_checkpoint="selective", kv_heads=1, dropout=0.5),
}
CASES = {"mixed": ("ttAAtBB", "CCt", "t"), "text": ("ttt", "t"), "padded": ("tAAtt", "t", "t", "t")}


@pytest.mark.parametrize("attention", ["auto", "flex", "dense", "ragged"])
@pytest.mark.parametrize("samples", CASES.values(), ids=CASES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_forward_and_backward_read_nothing_from_the_device(options, samples, attention):
    model = Transformer(DIM, depth=4, heads=2, dim_head=4, **options).to("meta")
    model.attention = attention
    made = stream(*samples)
    x = torch.randn(len(made.span), DIM).to("meta").requires_grad_()
    condition = torch.randn(int(made.span.max()) + 1, DIM).to("meta").requires_grad_()
    conditioning = Conditioning(condition, (made.span + 1).to("meta")) if len(condition) else None
    prepared = made.layout.prepare(blocks=True).to("meta")
    for layout in (made.layout, prepared):
        out = model(x, position=made.position.to("meta"), layout=layout, conditioning=conditioning)
        assert out.is_meta
        out.sum().backward()
        assert x.grad.is_meta
        assert all(parameter.grad is not None for parameter in model.layers[0].attn.parameters())


def test_equal_spans_side_by_side():
    model = Transformer(DIM, depth=2, heads=2, dim_head=4).to("meta")
    made = stream("AAA", "BBB")
    condition = torch.empty(2, DIM, device="meta", requires_grad=True)
    x = torch.empty(6, DIM, device="meta")
    model(
        x, position=made.position.to("meta"), layout=made.layout, conditioning=Conditioning(condition, None)
    ).sum().backward()
    assert condition.grad.shape == condition.shape


@pytest.mark.parametrize("chunk", [1, 10**9])
@pytest.mark.parametrize("bias", [False, True])
def test_cross_entropy_reads_nothing(chunk, bias):
    to_logits = nn.Linear(DIM, 50, bias=bias, device="meta")
    x = torch.empty(40, DIM, device="meta", requires_grad=True)
    labels, weights = torch.empty(40, dtype=torch.long, device="meta"), torch.empty(40, device="meta")
    for loss in (
        summed_cross_entropy(x, to_logits, labels, chunk=chunk),
        summed_cross_entropy(x, to_logits, labels, weights, chunk=chunk),
        cross_entropy_per_target(x, to_logits, labels, chunk=chunk).sum(),
    ):
        loss.backward()
        assert to_logits.weight.grad.is_meta


# a model that is made on meta, and then filled


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_reset_parameters_starts_like_a_new_model(options):
    torch.manual_seed(0)
    new = Transformer(48, depth=3, heads=2, dim_head=8, **options)
    with torch.device("meta"):
        model = Transformer(48, depth=3, heads=2, dim_head=8, **options)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    for module in reversed(list(model.modules())):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    expected = dict(new.named_parameters())
    for name, parameter in model.named_parameters():
        theirs = expected[name]
        if "connection" in name or theirs.min() == theirs.max():
            assert torch.equal(parameter, theirs), name
        elif theirs.numel() > 256:  # drawn at random, as widely
            torch.testing.assert_close(parameter.std(), theirs.std(), rtol=0.1, atol=0, msg=name)
        else:
            assert parameter.abs().max() < 1, name


# layouts that travel


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("samples", STREAMS.values(), ids=STREAMS)
def test_a_prepared_layout_travels(samples, blocks):
    made = stream(*samples)
    prepared = made.layout.prepare(blocks)
    assert prepared.prepare(blocks) is prepared
    assert (prepared.intervals.blocks is not None) == blocks
    again = pickle.loads(pickle.dumps(prepared))
    assert torch.equal(again.intervals.dense(), made.sees)
    assert torch.equal(again.end, prepared.end)
    on_device = prepared.to("meta")
    assert on_device.end.device.type == "cpu", "or laying out runs would wait for the device"
    assert all(tensor.is_meta for tensor in (*on_device.intervals[:2], *(on_device.intervals.blocks or ())))
    assert on_device.to("meta") is on_device
    assert on_device.prepare(blocks) is on_device


def test_blocks_are_added_to_intervals_that_have_none():
    layout = stream("tAAt").layout.prepare()
    assert layout.prepare(blocks=True).intervals.blocks is not None


def test_a_stream_that_continues_a_cache_has_no_intervals():
    with pytest.raises(ValueError, match="continues a cache"):
        stream("tAAt", start=[1]).layout.prepare()


@pytest.mark.skipif(TYPECHECK, reason="a stand-in for tensors")
def test_pinning_pins_what_moves(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    stream("tAAt").layout.prepare(blocks=True).pin_memory()
    assert len(pinned) == 10


def test_padding_is_one_run_and_sees_itself():
    """A budget of 12 tokens: 7 of them are padding."""
    made = stream("tAAtt", *["t"] * 7)
    assert [run.tokens for run in made.layout.runs] == [slice(0, 5), slice(5, 12)]
    model = perturb(Transformer(DIM, depth=2, heads=2, dim_head=4)).double()
    x, condition = torch.randn(12, DIM, dtype=torch.float64), torch.randn(1, DIM, dtype=torch.float64)
    alone = stream("tAAtt")
    for attention in ("ragged", "dense"):
        model.attention = attention
        padded, plain = model(x, **made.arguments(condition)), model(x[:5], **alone.arguments(condition))
        torch.testing.assert_close(padded[:5], plain, rtol=0, atol=1e-10)
