"""Multimodal transformers in folders: the same bits come back."""

import json

import pytest
import torch
from mmdit_models import in_context, mmdit, tokens

from transfusion_pytorch import InContextMMDiT, MMDiT, ModelCard, Transfusion

BUILT = {
    "default": lambda: mmdit(),
    "options": lambda: mmdit(
        3,
        dim_outs=(3, None, 4),
        timestep_embed_dim=(8, 4),
        timestep_scale=1000.0,
        dim_pooled=6,
        qk_norm="layer",
        rope_axes=2,
        attn_bias=True,
        activation="gelu",
        num_registers=(0, 1, 2),
        dual_attention_layers=(0,),
        dual_attention_modalities=(0, 2),
        use_checkpoint=True,
    ),
    "in context": lambda: in_context(num_registers=1, qk_norm="none", rope_axes=0),
}


def run(model):
    inputs = tokens(len(model.dim_modalities))
    if isinstance(model, InContextMMDiT):
        return model(inputs)
    pooled = None if model.dim_pooled is None else torch.ones(2, model.dim_pooled).double()
    times = (0.3,) * len(model.embed_times)
    return model(inputs, times, pooled=pooled)


@pytest.mark.parametrize("build", BUILT.values(), ids=BUILT)
def test_models_come_back_as_they_were(tmp_path, build):
    model = build()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert not loaded.training
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state.pop(name)) for name, tensor in model.state_dict().items())
    assert not state
    torch.manual_seed(0)
    expected = run(model)
    torch.manual_seed(0)
    for out, again in zip(expected, run(loaded), strict=True):
        assert out is again is None or torch.equal(out, again)
    assert getattr(loaded, "use_checkpoint", None) == model.use_checkpoint


def test_the_configuration_is_readable_and_can_be_overridden(tmp_path):
    mmdit().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["class"] == "transfusion_pytorch.mmdit.model.MMDiT"
    assert config["arguments"]["dim_modalities"] == [12, 8]
    assert MMDiT.from_pretrained(tmp_path, attention="flex", dtype=torch.float32).attention == "flex"


def test_the_card_says_how_to_call_it(tmp_path):
    mmdit().save_pretrained(tmp_path / "plain")
    text = (tmp_path / "plain" / "README.md").read_text()
    assert "# MMDiT model" in text
    assert "from transfusion_pytorch import MMDiT" in text
    assert "outputs = model(modality_tokens, timestep)" in text
    assert "text tokens" not in text
    in_context().save_pretrained(tmp_path / "own", card=ModelCard(title="Pushes a T", steps=7))
    text = (tmp_path / "own" / "README.md").read_text()
    assert "# Pushes a T" in text
    assert "outputs = model(modality_tokens)" in text


def test_another_class_is_refused(tmp_path):
    mmdit().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="dim_cond"):
        InContextMMDiT.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="num_text_tokens"):
        Transfusion.from_pretrained(tmp_path)


class Wide(MMDiT):
    def __init__(self, *, width: int):
        super().__init__(depth=1, dim_modalities=(width,), dim_outs=2, dim_cond=4, dim_head=8, heads=1)
        self.width = width


class SavedWide(Wide):
    def constructor_arguments(self):
        return dict(width=self.width)


def test_a_subclass_says_what_it_was_built_with(tmp_path):
    with pytest.raises(TypeError, match="Wide does not say what it was built with; decorate it"):
        Wide(width=4).save_pretrained(tmp_path)
    SavedWide(width=4).save_pretrained(tmp_path)
    assert SavedWide.from_pretrained(tmp_path).dim_modalities == (4,)


def test_a_tokenizer_has_no_place(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    with pytest.raises(TypeError, match="MMDiT has no text tokens; leave the tokenizer out"):
        mmdit().save_pretrained(tmp_path, tokenizer=tokenizer)
