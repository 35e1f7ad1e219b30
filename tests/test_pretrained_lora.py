"""LoRA on a language model: what is trained, what is saved, and what stays the same."""

import warnings

import pytest
import torch
from language_models import NUM_TEXT, begun, image, language_model, text
from safetensors.torch import load_file

from transfusion_pytorch import KLAutoencoder, Transfusion

pytest.importorskip("transformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    peft = pytest.importorskip("peft")

BATCH = [[text(4), image(), text(3)], [(1, torch.ones(3, 3)), text(2)], [text(5)]]


def trained(model, batch=BATCH, steps=3):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(batch).backward()
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


def test_an_adapter_has_no_autoencoder_and_draws_with_that_of_its_base(tmp_path):
    torch.manual_seed(2)
    autoencoder = KLAutoencoder(4, widths=(4, 4), num_blocks=(0, 0))
    images = dict(modality_encoder=(autoencoder.encoder, None), modality_decoder=(autoencoder.decoder, None))

    def base():
        return begun(language_model("llama, tied"), channel_first_latent=(True, False), **images)

    model = base()
    adapted = trained(peft.get_peft_model(model, model.lora_config(rank=2)), [[text(3), torch.rand(3, 4, 6) * 2 - 1]])
    adapted.save_pretrained(str(tmp_path), save_embedding_layers=False)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    frozen = [name for name in saved if "coder." in name or ".base_layer." in name or "embedding.text" in name]
    assert not frozen
    assert not [name for name, tensor in saved.items() if len(tensor) == NUM_TEXT]
    loaded = peft.PeftModel.from_pretrained(base(), str(tmp_path))
    drawn = []
    for each in (adapted, loaded, base()):
        generator = torch.Generator().manual_seed(3)
        options = dict(max_length=20, force_modality_at_start=(0, (2, 3)), modality_steps=2)
        drawn.append(each.sample(text(3), generator=generator, **options)[1][1])
    assert drawn[0].shape == (3, 4, 6)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("untied", "adapted_experts"),
    [(["norms"], {"0"}), (["attention"], {"1", "2"}), (["feedforward", "norms"], {"1", "2"})],
)
def test_of_parts_that_are_untied_those_of_modalities_are_adapted(untied, adapted_experts):
    """Norms alone have nothing to adapt, so what all share is."""
    model, batch = begun(language_model(), untied=untied), text(1, 9)
    before = model(batch, return_loss=False).detach()[..., :NUM_TEXT]
    adapted = trained(peft.get_peft_model(model, model.lora_config(rank=2)), steps=1)
    names = [name for name, p in adapted.named_parameters() if p.requires_grad and "lora_B" in name]
    assert {name.split(".experts.")[1][0] for name in names} == adapted_experts
    after = adapted(batch, return_loss=False)[..., :NUM_TEXT]
    assert torch.equal(after, before) == (untied != ["norms"])


def test_ranks_and_dropouts_that_are_none_are_refused():
    model = begun(language_model())
    with pytest.raises(ValueError, match="rank must be an int of at least 1, got 0"):
        model.lora_config(rank=0)
    with pytest.raises(ValueError, match="dropout is a probability below 1, got 1"):
        model.lora_config(dropout=1.0)


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
