"""A `PeftModel` in the trainer: what is saved is the adapter, with the numbers of the average."""

import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_training_trainer import CONFIG, StopAt, assert_equal_states, samples, trainer, weights
from tiny import awake, ragged_batch, tiny

from transfusion_pytorch import ModelCard, Transfusion

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    peft = pytest.importorskip("peft")

AVERAGED = replace(CONFIG, ema_beta=0.9, ema_every=1, ema_start=1, validate_every=0, details_every=0, save_every=5)
SAVED_WITH_IT = {
    "matrices": {},
    "rows": dict(trainable_token_indices={"text_embedding": [1, 2, 3]}),
    "a module": dict(modules_to_save=["to_logits"]),
}


@pytest.fixture
def base(tmp_path):
    awake(tiny()).float().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(base, **options):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["to_qkv", "to_out"], **options)
    return peft.get_peft_model(Transfusion.from_pretrained(base), config)


def loaded(base, adapter):
    """As docs/saving.md says."""
    return peft.PeftModel.from_pretrained(Transfusion.from_pretrained(base), adapter).eval()


def loss_of(model):
    with torch.no_grad():
        return model.eval()(ragged_batch(), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", SAVED_WITH_IT.values(), ids=SAVED_WITH_IT)
def test_the_adapter_of_the_average_is_saved(tmp_path, base, options):
    run = trainer(tmp_path / "run", AVERAGED, model=adapted(base, **options))
    run.fit()
    run.save_pretrained(tmp_path / "adapter")
    kept = loaded(base, tmp_path / "adapter")
    assert torch.equal(loss_of(kept), loss_of(run.average))
    assert not torch.equal(loss_of(kept), loss_of(run.model))
    assert not torch.equal(loss_of(kept), loss_of(Transfusion.from_pretrained(base)))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    assert sum(tensor.numel() for tensor in saved.values()) == sum(parameter.numel() for parameter in trained)


def test_without_an_average_the_last_weights_are_saved(tmp_path, base):
    run = trainer(tmp_path / "run", replace(AVERAGED, ema_beta=None), model=adapted(base), validation=samples(3))
    run.fit()
    run.save_pretrained(tmp_path / "adapter")
    assert torch.equal(loss_of(loaded(base, tmp_path / "adapter")), loss_of(run.model))


def test_an_adapter_has_neither_card_nor_tokenizer(tmp_path, base):
    run = trainer(tmp_path / "run", AVERAGED, model=adapted(base))
    with pytest.raises(TypeError, match=r"an adapter is saved without card: .*merge_and_unload"):
        run.save_pretrained(tmp_path / "adapter", card=ModelCard())
    assert not (tmp_path / "adapter").exists()


def test_a_run_of_an_adapter_is_resumed_to_the_bit(tmp_path, base):
    whole = trainer(tmp_path / "whole", AVERAGED, model=adapted(base))
    whole.fit()
    with pytest.raises(RuntimeError, match="pulled the plug"):
        trainer(tmp_path / "cut", AVERAGED, model=adapted(base), callbacks=[StopAt(8)]).fit()
    again = trainer(tmp_path / "cut", AVERAGED, model=adapted(base))
    again.fit(resume=True)
    assert_equal_states(weights(again.average), weights(whole.average))


def test_compiling_reaches_the_transformer_inside(tmp_path, base, monkeypatch):
    compiled = []
    monkeypatch.setattr(Transfusion, "compile", lambda model: compiled.append(model))
    model = adapted(base)
    trainer(tmp_path / "run", replace(AVERAGED, batch_size=None, token_budget=40, compile=True), model=model)
    assert compiled == [model.get_base_model()]
