"""What trains: losses and their means over processes, data loading, the moving average; and what a model can tell."""

import copy
import os
import pickle
from pathlib import Path

import pytest
import torch
from checks import TYPECHECK, no_typecheck
from tiny import CHANNELS, NUM_TEXT, awake, ragged_batch, tiny
from torch import nn, tensor

import transfusion_pytorch
from transfusion_pytorch import (
    Batch,
    Sample,
    UNetDown,
    UNetUp,
    collate_fn,
    create_dataloader,
    create_ema,
    print_modality_sample,
)
from transfusion_pytorch.display import describe_sample
from transfusion_pytorch.training.losses import Errors, ErrorSum, LossWeights, combine, divided, squared_error

# losses


def test_squared_error_sums_the_channels_of_each_latent():
    error = squared_error(tensor([[1.0, 2.0], [0.0, 3.0]]), tensor([[0.0, 4.0], [0.0, 0.0]]))
    assert error.tolist() == [5, 9]
    assert squared_error(torch.ones(2, 1).bfloat16(), torch.zeros(2, 1)).dtype == torch.float32


def test_errors_add_up_by_their_weights():
    errors = Errors(tensor([4.0, 6.0, 8.0]), tensor([1.0, 0.0, 0.5]), 2, tensor([0, 0, 2]))
    assert ErrorSum.of(errors) == (8, 3)
    totals, counts = ErrorSum.of(errors, 3)
    assert (totals.tolist(), counts.tolist()) == ([4, 0, 4], [2, 0, 1])


def test_means_of_nothing_are_zero():
    assert divided(tensor([6.0, 0.0]), tensor([4.0, 0.0])).tolist() == [1.5, 0.0]


def error_sum(total, count):
    return ErrorSum(tensor(total), tensor(count))


def test_parts_are_combined_by_their_weights():
    parts = combine(
        text=error_sum(6.0, 2.0),
        flow={0: error_sum(8.0, 2.0), 2: error_sum(5.0, 1.0)},
        velocity={2: error_sum(4.0, 4.0)},
        recon={},
        weights=LossWeights(text=0.5, flow=(1.0, 7.0, 2.0), velocity=(20.0, 30.0, 10.0), recon=(100.0,) * 3),
    )
    assert parts.text == 3
    assert parts.flow.tolist() == [4, 0, 5]
    assert parts.velocity.tolist() == [0, 0, 1]
    assert parts.recon.tolist() == [0, 0, 0]
    assert parts.total == 0.5 * 3 + 4 + 2 * 5 + 10 * 1


# data


class Counted(torch.utils.data.Dataset):
    """Sample i is the text [i] and an image of i + 1 latents."""

    def __len__(self):
        return 5

    def __getitem__(self, i):
        return [tensor([i]), torch.full((i + 1, 3), float(i))]


def test_a_data_loader_gives_lists_of_samples_that_models_take():
    model = tiny()
    batches = list(model.create_dataloader(Counted(), batch_size=2))
    assert [[sample[0].item() for sample in batch] for batch in batches] == [[0, 1], [2, 3], [4]]
    assert all(isinstance(batch, list) and isinstance(sample, list) for batch in batches for sample in batch)
    assert [sample[1].shape for sample in batches[1]] == [(3, 3), (4, 3)]
    for batch in batches:
        assert model(batch).isfinite()


def test_a_data_loader_shuffles_if_asked_and_passes_its_options_on():
    generator = torch.Generator().manual_seed(0)
    loader = create_dataloader(Counted(), batch_size=4, shuffle=True, drop_last=True, generator=generator)
    ((one, two, three, four),) = loader
    ids = [sample[0].item() for sample in (one, two, three, four)]
    assert ids != sorted(ids)
    assert len(set(ids)) == 4


def test_a_data_loader_takes_what_makes_its_batches():
    """As torch's own does: by position, with a `collate_fn`, and with a `batch_sampler` in place of a size."""
    model = awake(tiny())
    for create in (model.create_dataloader, create_dataloader):
        packed = list(create(Counted(), 2, False, collate_fn=model.packer()))
        assert all(isinstance(batch, Batch) for batch in packed)
        assert [len(batch) for batch in packed] == [2, 2, 1]
        plain = list(create(Counted(), 2))
        assert torch.equal(model(packed[0], return_loss=False), model(plain[0], return_loss=False))
        chosen = create(Counted(), batch_sampler=[[4, 0], [1]])
        assert [[sample[0].item() for sample in batch] for batch in chosen] == [[4, 0], [1]]


def test_a_list_of_samples_is_a_dataset():
    (batch,) = create_dataloader([[tensor([1])], [tensor([2])]])
    assert batch == [[tensor([1])], [tensor([2])]]


def test_a_sample_is_a_list_of_parts_however_a_dataset_gives_it():
    text, image = tensor([1]), torch.ones(2, 3)
    samples = [[text, image], (text, image), (text, (0, image), text), (0, image), image, text]
    batch = collate_fn(samples)
    assert [len(sample) for sample in batch] == [2, 2, 3, 1, 1, 1]
    assert batch[3] == [(0, image)]
    (described,) = collate_fn([Sample((text, image), name="a", weight=2.0)])
    assert (described.parts, described.name, described.weight) == ([text, image], "a", 2.0)
    assert tiny()(batch).isfinite()


# the moving average


def test_the_average_lies_between_the_old_and_the_new_weights():
    model = tiny()
    ema = model.create_ema(beta=0.75, update_every=2, update_after_step=0, min_value=0.75)
    assert (ema.beta, ema.update_every) == (0.75, 2)
    ema.update()  # the first one copies
    old = model.to_logits.weight.detach().clone()
    model.to_logits.weight.data.add_(1.0)
    ema.update()  # step 1, not a second one
    assert torch.equal(ema.ema_model.to_logits.weight, old)
    ema.update()
    torch.testing.assert_close(ema.ema_model.to_logits.weight, old + 0.25)


def test_the_default_average_remembers_a_hundred_steps():
    assert tiny().create_ema().beta == create_ema(tiny()).beta == 0.99
    assert tiny().create_ema(0.5).beta == create_ema(tiny(), 0.5).beta == 0.5


def test_an_average_shares_frozen_autoencoders_and_saves_them_once():
    encoder, decoder = nn.Linear(3, 3), nn.Linear(3, 3)
    model = tiny(modality_encoder=(encoder, None), modality_decoder=(decoder, None))
    ema = model.create_ema(update_after_step=0, update_every=1)
    assert ema.ema_model.modalities[0].encoder is encoder
    assert ema.ema_model.modalities[0].decoder is decoder
    assert ema.ema_model.to_logits is not model.to_logits
    saved = [name for name in ema.state_dict() if ".encoder." in name or ".decoder." in name]
    assert len(saved) == 4
    before = encoder.weight.clone()
    ema.update()
    assert torch.equal(encoder.weight, before)
    assert any("online" in name for name in model.create_ema(include_online_model=True).state_dict())


@pytest.mark.parametrize(("after", "every"), [(0, 1), (3, 2)])
def test_an_average_copies_until_it_starts(after, every):
    model = tiny()
    ema = model.create_ema(beta=0.5, update_after_step=after, update_every=every)
    for step in range(8):
        model.to_logits.weight.data.fill_(step)
        ema.update()
        average = ema.ema_model.to_logits.weight[0, 0]
        if step <= after:
            assert average == step - step % every
    assert average < 7 - 7 % every


def test_an_average_samples_as_its_model_does():
    model = awake(tiny(modality_default_shape=(2,)))
    ema = model.create_ema()
    noise, options = torch.randn(8, 3), dict(max_length=24, text_temperature=0.0)
    calls = {
        "sample": lambda m: m.sample(tensor([1]), init_modality_noise=noise, **options),
        "sample_one": lambda m: m.sample_one(tensor([1]), init_modality_noise=noise, **options),
        "sample_many": lambda m: m.sample_many([None, tensor([1])], init_modality_noise=noise, **options),
        "generate_text_only": lambda m: m.generate_text_only(tensor([[1, 2]]), 5, temperature=0.0),
        "generate_modality_only": lambda m: m.generate_modality_only(2, modality_steps=2, init_modality_noise=noise),
    }
    for name, call in calls.items():
        assert repr(call(ema)) == repr(call(model)), name
    before = ema.generate_modality_only(1, init_modality_noise=noise)
    model.to_logits.weight.data.zero_()
    for parameter in model.parameters():
        parameter.data.mul_(0.5)
    assert torch.equal(ema.generate_modality_only(1, init_modality_noise=noise), before)


@pytest.mark.parametrize("includes_model", [False, True])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema))])
def test_an_average_can_be_copied_and_pickled(again, includes_model):
    """It goes on as the average of a copy of its model; both are other objects than before."""
    encoder = nn.Linear(3, 3)
    model = tiny(modality_encoder=(encoder, None), modality_default_shape=(2,))
    options = dict(update_after_step=0, update_every=1, include_online_model=includes_model)
    ema = model.create_ema(beta=0.5, **options)
    ema.update()
    model.to_logits.weight.data.add_(1.0)
    copied = again(ema)
    assert type(copied) is type(ema)
    assert copied.model is not model
    assert copied.ema_model is not ema.ema_model
    assert copied.ema_model.modalities[0].encoder is copied.model.modalities[0].encoder is not encoder
    for each in (ema, copied):
        each.update()
        each.model.to_logits.weight.data.add_(1.0)
        each.update()
    assert copied.step == ema.step
    for name, tensor_ in ema.state_dict().items():
        assert torch.equal(tensor_, copied.state_dict()[name]), name
    options = dict(max_length=12, text_temperature=0.0)
    assert repr(copied.sample(tensor([1]), **options)) == repr(ema.sample(tensor([1]), **options))
    before = repr(copied.sample(tensor([1]), text_temperature=0.0, max_length=12))
    for parameter in ema.ema_model.parameters():
        parameter.data.zero_()
    assert repr(copied.sample(tensor([1]), text_temperature=0.0, max_length=12)) == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(beta=1.5), ValueError, "beta must be at least 0 and at most 1, got 1.5"),
        (dict(beta="a"), TypeError, "beta must be a number, got 'a'"),
        (dict(update_every=0), ValueError, "update_every must be at least 1, got 0"),
        (dict(update_after_step=-1), ValueError, "update_after_step must be at least 0, got -1"),
    ],
)
@no_typecheck
def test_an_average_of_nothing_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        tiny().create_ema(**options)


def test_an_average_gives_losses_and_takes_no_gradient():
    ema = tiny().create_ema()
    assert ema(ragged_batch()).isfinite()
    assert not any(parameter.requires_grad for parameter in ema.ema_model.parameters())


# what a model tells


def test_a_sample_is_printed_part_by_part(capsys):
    sample = [tensor([10, 1, 2]), (1, torch.ones(2, 2)), tensor(7), torch.tensor([[0.0, 2.0]])]
    print_modality_sample(sample)
    assert capsys.readouterr().out.splitlines() == [
        "text  (3,)  10 1 2",
        "modality 1  (2, 2)  mean 1.000  std 0.000",
        "text  ()  7",
        "modality 0  (1, 2)  mean 1.000  std 1.000",
    ]
    assert describe_sample(tensor([3])) == ["text  (1,)  3"]
    with pytest.raises(TypeError, match=r"a part is a tensor or \(type, tensor\), got str"):
        print_modality_sample(["a cat"])


def test_markers_follow_the_text_in_the_vocabulary():
    model = tiny()
    assert (model.sos_id, model.eos_id, model.meta_id) == (NUM_TEXT, NUM_TEXT + 1, NUM_TEXT + 2)
    ids = [model.sos_id, model.eos_id, model.meta_id, *model.som_ids, *model.eom_ids]
    assert ids == list(range(NUM_TEXT, NUM_TEXT + 7))
    assert model.to_logits.out_features == NUM_TEXT + 7 + len("0123456789,")


@pytest.mark.parametrize("text", ["4,4", "10,2,305", ""])
def test_shapes_are_spelled_and_read(text):
    model = tiny()
    ids = model.char_tokenizer(text)
    assert ids.dtype == torch.long
    assert len(ids) == len(text)
    assert model.decode_chars(ids) == text


def test_what_is_no_shape_is_neither_spelled_nor_read():
    with pytest.raises(ValueError, match=r"shape metadata is written with .* got \['x'\]"):
        tiny().char_tokenizer("4x4")
    with pytest.raises(ValueError, match=r"id 3 is no character"):
        tiny().decode_chars(tensor([3]))


def test_a_modality_tells_what_it_is():
    encoder, decoder = nn.Identity(), nn.Identity()
    options = dict(modality_default_shape=((4, 4), ()), channel_first_latent=(True, False))
    model = tiny(modality_encoder=(encoder, None), modality_decoder=(None, decoder), **options)
    image, vector = (model.get_modality_info(i) for i in (0, 1))
    assert image._asdict() == dict(
        modality_type=0,
        dim_latent=CHANNELS[0],
        num_dim=2,
        default_shape=(4, 4),
        channel_first_latent=True,
        encoder=encoder,
        decoder=None,
        add_pos_emb=True,
        som_id=model.som_ids[0],
        eom_id=model.eom_ids[0],
    )
    assert (vector.num_dim, vector.default_shape, vector.decoder, vector.add_pos_emb) == (0, (), decoder, False)
    assert tiny(dim_latent=3).get_modality_info().modality_type == 0
    for unknown in (2, -1, None):
        with pytest.raises(ValueError, match=f"unknown modality type {unknown}, this model has 2"):
            model.get_modality_info(unknown)
    if not TYPECHECK:
        with pytest.raises(TypeError, match="modality_type: a modality type is an int, got 'image'"):
            model.get_modality_info("image")
    assert model.get_all_modality_info() == [image, vector]


def test_muon_is_for_the_hidden_matrices_of_the_trunk():
    model = tiny()
    muon = model.muon_parameters()
    layers = dict(model.transformer.layers.named_parameters())
    names = {name for name, parameter in layers.items() if any(parameter is chosen for chosen in muon)}
    hidden = ("attn.to_qkv", "attn.to_gates", "attn.to_out", "attn_norm.to_modulation")
    hidden += ("ff.to_hidden", "ff.to_out", "ff_norm.to_modulation")
    assert names == {f"{layer}.{name}.weight" for layer in (0, 1) for name in hidden} | {"1.skip.weight"}
    assert len(muon) == len(names) + 1  # and the final norm's modulation
    assert all(parameter.ndim == 2 for parameter in muon)


def test_muon_takes_a_trunk_of_the_users_own():
    class Trunk(nn.Module):
        def __init__(self):
            super().__init__()
            self.dim, self.layer, self.norm = 16, nn.Linear(16, 16), nn.LayerNorm(16)

        def forward(self, x, **kwargs):
            return self.norm(self.layer(x))

    model = tiny()
    model.transformer = Trunk()
    assert [id(p) for p in model.muon_parameters()] == [id(model.transformer.layer.weight)]


def test_matrices_decay_and_the_rest_does_not():
    model = tiny(modality_encoder=(nn.Linear(3, 3), None))
    decays, rest = model.parameter_groups(weight_decay=0.1)
    assert (decays["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert all(parameter.ndim >= 2 for parameter in decays["params"])
    assert all(parameter.ndim < 2 for parameter in rest["params"])
    together = [id(parameter) for group in (decays, rest) for parameter in group["params"]]
    assert len(together) == len(set(together))
    assert set(together) == set(map(id, model.parameters_without_encoder_decoder()))
    torch.optim.AdamW(model.parameter_groups(weight_decay=0.1))


@pytest.mark.parametrize("untied", [True, ["attention"], ["norms"]])
def test_experts_have_parameter_groups_of_their_own(untied):
    """Every parameter is in one group; those of an expert are what moves if all others have a learning rate of 0."""
    model = tiny(trunk=dict(untied=untied))
    groups = model.parameter_groups(weight_decay=0.0, by_expert=True)
    every = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(every) == sorted(map(id, model.parameters()))
    assert {group["expert"] for group in groups} == {None, *range(model.transformer.num_experts)}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([group | dict(lr=float(group["expert"] == 1)) for group in groups]).step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if "experts.1." in name or "final_norm.1." in name}


def test_parameter_groups_by_expert_need_experts():
    with pytest.raises(ValueError, match="by_expert=True: this transformer has one set of weights for all"):
        tiny().parameter_groups(weight_decay=0.1, by_expert=True)


def test_initial_values_can_be_had_again_after_meta():
    options = dict(modality_default_shape=((4, 4), ()), modality_num_dim=(2, 0), trunk=dict(use_value_residual=True))
    pair = lambda: (UNetDown(3, 16, dim_hidden=8), UNetUp(3, 16, dim_hidden=8))  # noqa: E731
    expected = tiny(pre_post_transformer_enc_dec=(pair(), None), **options)
    with torch.device("meta"):
        model = tiny(pre_post_transformer_enc_dec=(pair(), None), **options)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor_ in (*model.parameters(), *model.buffers()):
            tensor_.fill_(float("nan"))
    model.reset_parameters()
    for (name, made), (_, other) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert made.isfinite().all(), name
        assert torch.equal(made == 0, other == 0), name
        if other.numel() > 100 and other.std() > 0:
            assert 0.7 < made.std() / other.std() < 1.4, name
    assert model([[tensor([1]), torch.randn(4, 4, 3)]]).isfinite()


def test_activations_may_be_computed_again():
    model = tiny()
    model.gradient_checkpointing_enable()
    assert model.transformer.use_checkpoint
    model(ragged_batch()).backward()
    model.gradient_checkpointing_enable("selective")
    model(ragged_batch()).backward()
    with pytest.raises(
        (ValueError, TypeError), match=None if TYPECHECK else "must be True, False or 'selective', got 'some'"
    ):
        model.gradient_checkpointing_enable("some")
    model.gradient_checkpointing_disable()
    assert not model.transformer.use_checkpoint
    model.transformer = nn.Identity()
    with pytest.raises(TypeError, match="the trunk, of type Identity, has no gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable()


def test_what_is_trained_leaves_out_exactly_the_autoencoders():
    encoder, decoder = nn.Linear(3, 3), nn.Linear(2, 2)
    model = tiny(modality_encoder=(encoder, None), modality_decoder=(None, decoder))
    frozen = {id(parameter) for half in (encoder, decoder) for parameter in half.parameters()}
    trained = {id(parameter) for parameter in model.parameters_without_encoder_decoder()}
    assert trained == {id(parameter) for parameter in model.parameters()} - frozen
    assert len(frozen) == 4


def test_every_public_name_is_there():
    assert all(hasattr(transfusion_pytorch, name) for name in transfusion_pytorch.__all__)
    assert os.path.exists(Path(transfusion_pytorch.__file__).parent / "py.typed")
