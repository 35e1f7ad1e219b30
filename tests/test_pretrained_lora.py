"""LoRA on a language model: what is trained, what is saved, and what stays the same."""

import warnings

import pytest
import torch
from language_models import NUM_TEXT, begun, image, language_model, text
from safetensors.torch import load_file

from transfusion_pytorch import Transfusion

pytest.importorskip("transformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    peft = pytest.importorskip("peft")

BATCH = [[text(4), image(), text(3)], [(1, torch.ones(3, 3)), text(2)], [text(5)]]


def trained(model, steps=3):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(BATCH).backward()
        optimizer.step()
    return model


def loss_of(model):
    with torch.no_grad():
        return model.eval()(BATCH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("time", ["norms", "added", "token", "output"])
def test_an_adapter_holds_all_that_was_learned(tmp_path, time, untied):
    def base():
        return begun(language_model("llama, tied"), untied=untied, time_conditioning=time)

    model = base()
    adapted = trained(peft.get_peft_model(model, model.lora_config(rank=2)))
    adapted.save_pretrained(str(tmp_path), save_embedding_layers=False)
    loaded = peft.PeftModel.from_pretrained(base(), str(tmp_path))
    assert torch.equal(loss_of(loaded), loss_of(adapted))
    assert not torch.equal(loss_of(loaded), loss_of(base()))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    count = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert sum(tensor.numel() for tensor in saved.values()) == count
    assert not [name for name in saved if "embedding.text" in name or "logits.text" in name]


def test_text_stays_the_same_to_the_bit_where_modalities_have_layers_of_their_own():
    model, batch = begun(language_model(), untied=True), text(2, 20)
    before = model(batch, return_loss=False).detach()
    adapted = trained(peft.get_peft_model(model, model.lora_config(rank=2)))
    assert torch.equal(adapted(batch, return_loss=False)[..., :NUM_TEXT], before[..., :NUM_TEXT])
    assert {
        name.split(".experts.")[1][0] for name, p in adapted.named_parameters() if p.requires_grad and "lora" in name
    } == {"1", "2"}
    shared = begun(language_model())
    tied = trained(peft.get_peft_model(shared, shared.lora_config(rank=2)))
    assert not torch.equal(tied(batch, return_loss=False)[..., :NUM_TEXT], before[..., :NUM_TEXT])


def test_a_merged_adapter_samples_as_it_did():
    model = begun(language_model())
    adapted = trained(peft.get_peft_model(model, model.lora_config(rank=2)))
    batch = text(1, 5)
    hidden = adapted.eval()(batch, return_loss=False)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(batch, return_loss=False), hidden, rtol=1e-4, atol=1e-4)
    assert len(merged.sample(batch[0], max_length=20, force_modality_at_start=0, modality_steps=2)) >= 3


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("time", ["norms", "added", "token", "output"])
def test_an_adapter_learns_times(time, untied):
    model = begun(language_model(), untied=untied, time_conditioning=time)
    adapted = trained(peft.get_peft_model(model, model.lora_config(rank=2)), steps=5).eval()
    noise, sample = image().flatten(0, 1), [[text(3), image()]]
    losses = [adapted(sample, times=t, noise=noise, reduction="span").flow for t in (0.1, 0.9)]
    assert not torch.equal(*losses)  # noise and image are the same: only the time differs


def test_a_merged_adapter_of_a_tied_model_is_saved_and_loaded(tmp_path):
    model = begun(language_model("llama, tied"))
    merged = trained(peft.get_peft_model(model, model.lora_config(rank=2))).merge_and_unload()
    merged.save_pretrained(tmp_path)
    batch = text(1, 6)
    torch.testing.assert_close(
        Transfusion.from_pretrained(tmp_path)(batch, return_loss=False), merged.eval()(batch, return_loss=False)
    )
