"""Decoding in low precision gives the logits of one forward pass over the same sample.

The ids are forced, so that a rounding error changes no choice, and the logits of all steps are compared. The two round
in different places, so both are also compared with the same model in double precision: decoding must not be much worse.
"""

from math import prod
from typing import NamedTuple

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from transfusion_pytorch import Transfusion
from transfusion_pytorch.network.inference import LinearWeights

NUM_TEXT, IMAGE = 12, 1
CHANNELS = (3, 2)
TRANSFORMERS = {
    "plain": dict(),
    "grouped heads": dict(kv_heads=1, use_value_residual=True),
    "hyper-connections": dict(num_residual_streams=2),
    "laser": dict(attn_laser=True),
}
# Root mean square of the difference, for logits whose standard deviation is about 0.8. bfloat16 has 8 bits: a rounding
# error is up to 0.004 of a number, and a few of them add up.
TOLERANCES = {"float64": 1e-13, "float32": 3e-6, "bfloat16": 0.03, "autocast": 0.03}


def build(**transformer) -> Transfusion:
    """A model of which nothing is zero, as it is at the start of training."""
    torch.manual_seed(0)
    transformer = dict(dim=32, depth=3, dim_head=8, heads=4) | transformer
    model = Transfusion(num_text_tokens=NUM_TEXT, dim_latent=CHANNELS, modality_num_dim=(1, 2), transformer=transformer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


class Recorder:
    """A logits processor that has these ids written, and keeps the logits that the model gave for them."""

    def __init__(self, ids: list[int]):
        self.ids, self.steps = ids, []

    def __call__(self, so_far: Tensor, logits: Tensor) -> Tensor:
        wanted = self.ids[len(self.steps)]
        self.steps.append(logits.double())
        return torch.full_like(logits, float("-inf")).index_fill(0, torch.tensor(wanted), 0.0)


class Logits(NamedTuple):
    """Before each of the forced ids: of decoding, of one forward pass, and of one in double precision."""

    decoded: Float[Tensor, "ids v"]
    read: Float[Tensor, "ids v"]
    exact: Float[Tensor, "ids v"]


def prompt_of(dtype: torch.dtype) -> list:
    generator = torch.Generator().manual_seed(1)
    line, image = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((3, 3), (2, 2, 2)))
    return [torch.tensor([1, 5, 2]), line, torch.tensor([7]), (IMAGE, image), torch.tensor([3, 4])]


def slots_of(sample: list) -> list[int]:
    """The id in every slot of a sample, -1 where it is a latent."""
    parts = ([-1] * prod(it[1].shape[:-1]) if isinstance(it, tuple) else it.tolist() for it in sample)
    return [slot for part in parts for slot in part]


def logits_of(model: Transfusion, precision: str, *, cache_kv: bool = True) -> Logits:
    """Text, an image that the model draws, and text, all behind a prompt of both."""
    dtype = torch.float32 if precision == "autocast" else getattr(torch, precision)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast")
    opening = [model.meta_id, *model.char_tokenizer("2,3").tolist(), model.som_ids[IMAGE]]
    ids = [*(torch.arange(40) * 7 % NUM_TEXT).tolist(), *opening, 0, 9, 1, 1, 6, model.eos_id]
    recorder, model = Recorder(ids), model.to(dtype)
    options = dict(modality_steps=2, cfg_scale=1.0, generator=torch.Generator().manual_seed(2))
    with autocast, torch.no_grad():
        sample = model.sample(prompt_of(dtype), cache_kv=cache_kv, logits_processors=[recorder], **options)
        [read] = model([sample], return_loss=False)
    with torch.no_grad():
        same = [(it[0], it[1].double()) if isinstance(it, tuple) else it for it in sample]
        [exact] = model.double()([same], return_loss=False)
    slots = slots_of(sample)
    unforced = {-1, *model.eom_ids}  # latents, and what follows them by itself
    written = [at for at in range(len(slots)) if slots[at] not in unforced][-len(ids) :]
    assert [slots[at] for at in written] == ids
    before = torch.tensor(written) - 1
    return Logits(torch.stack(recorder.steps), read.double()[before], exact[before])


def error(logits: Tensor, expected: Tensor) -> float:
    assert logits.isfinite().all()
    return (logits - expected).square().mean().sqrt().item()


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_decoding_gives_the_logits_of_one_forward_pass(name, precision):
    decoded, read, exact = logits_of(build(**TRANSFORMERS[name]), precision)
    assert 0.5 < exact.std() < 2
    assert error(decoded, read) < TOLERANCES[precision]
    assert error(decoded, exact) < 2 * error(read, exact) + TOLERANCES["float64"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_a_cache_rounds_no_worse_than_reading_everything_again(precision):
    cached, again = (logits_of(build(), precision, cache_kv=cache_kv) for cache_kv in (True, False))
    assert error(cached.decoded, cached.exact) < 2 * error(again.decoded, again.exact)


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
def test_low_precision_is_at_work(precision):
    """Otherwise the tests above would compare single precision with itself."""
    assert error(*logits_of(build(), precision)[1:]) > 100 * error(*logits_of(build(), "float32")[1:])


@pytest.mark.parametrize("bias", [None, torch.ones(5)])
def test_autocast_rounds_products_and_not_what_they_are_added_to(bias):
    layer = LinearWeights.of(torch.randn(5, 3), bias, None, 2)
    x, total = torch.randn(2, 3), torch.randn(2, 5)
    torch.testing.assert_close(layer.add_to(total, x), total + torch.nn.functional.linear(x, layer.weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        out, product = layer.add_to(total, x), layer(x)
    assert product.dtype == torch.bfloat16
    assert torch.equal(out, total + product)
