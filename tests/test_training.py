"""What trains: losses and their means over processes, data loading, the moving average; and what a model can tell."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import CHANNELS, NUM_TEXT, awake, noise_of, ragged_batch, tiny
from torch import nn, tensor
from torch.nn.parallel import DistributedDataParallel

import transfusion_pytorch
from transfusion_pytorch import collate_fn, create_dataloader, create_ema, print_modality_sample
from transfusion_pytorch.display import describe_sample
from transfusion_pytorch.training.losses import ErrorSum, LossWeights, combine, global_means, squared_error, text_error

# losses


def test_text_error_is_summed_cross_entropy_in_full_precision():
    logits, labels, as_they_are = torch.randn(5, 7), torch.randint(7, (5,)), nn.Identity()
    total, count = text_error(logits, as_they_are, labels)
    torch.testing.assert_close(total, -logits.log_softmax(dim=-1)[torch.arange(5), labels].sum())
    assert count == 5
    assert text_error(logits.double(), as_they_are, labels).total.dtype == torch.float64
    assert text_error(logits.bfloat16(), as_they_are, labels).total.dtype == torch.float32
    assert text_error(logits[:0], as_they_are, labels[:0]) == (0, 0)


def test_squared_error_counts_elements():
    assert squared_error(tensor([[1.0, 2.0]]), tensor([[0.0, 4.0]])) == (5, 2)
    assert squared_error(torch.ones(2).bfloat16(), torch.zeros(2)).total.dtype == torch.float32


def test_means_of_nothing_are_zero():
    sums = [ErrorSum(tensor(6.0), 4), ErrorSum(tensor(0.0), 0)]
    assert global_means(sums).tolist() == [1.5, 0.0]


def test_parts_are_combined_by_their_weights():
    parts = combine(
        text=ErrorSum(tensor(6.0), 2),
        flow={0: ErrorSum(tensor(8.0), 2), 2: ErrorSum(tensor(5.0), 1)},
        velocity={2: ErrorSum(tensor(4.0), 4)},
        recon={},
        weights=LossWeights(text=0.5, flow=(1.0, 7.0, 2.0), velocity=10.0, recon=100.0),
    )
    assert parts.text == 3
    assert parts.flow.tolist() == [4, 0, 5]
    assert parts.velocity.tolist() == [0, 0, 1]
    assert parts.recon.tolist() == [0, 0, 0]
    assert parts.total == 0.5 * 3 + 4 + 2 * 5 + 10 * 1


# several processes


@pytest.mark.parametrize("with_gradient", [True, False])
def test_means_are_global_where_gradients_are_and_local_where_not(with_gradient, monkeypatch):
    """This process has 6 of 2 and 0 of 0, another one 2 of 6 and 4 of 1: globally 8 / 8 and 4 / 1."""
    reduced = []

    def all_reduce(counts):
        reduced.append(counts.tolist())
        counts += tensor([6, 1])

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with torch.set_grad_enabled(with_gradient):
        means = global_means([ErrorSum(tensor(6.0), 2), ErrorSum(tensor(0.0), 0)])
    others = tensor([2 * 2 / 8, 2 * 4 / 1])
    if with_gradient:
        assert ((means + others) / 2).tolist() == [1.0, 4.0]
    else:
        assert means.tolist() == [3.0, 0.0]
    assert reduced == ([[2, 0]] if with_gradient else [])


TIMES = tensor([[0.25, 0.5], [0.75, 0.125], [0.0, 0.0], [0.5, 0.875]]).double()
SHARES = (slice(0, 1), slice(1, 4))  # one process has one sample with both modalities, the other three
TEXT_SHARES = (slice(0, 3), slice(3, 4))  # ... and here one has no modality at all


def losses_and_gradients(model: nn.Module, batch: list, times: torch.Tensor):
    loss = model(batch, times=times)
    loss.backward()
    return loss.detach(), {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def one_of_two(rank: int, folder: str) -> None:
    """What each process does: its share of the batch, through DDP; the first one keeps the result."""
    torch.set_num_threads(1)
    torch.randn_like = noise_of
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = shared_model()
    batch = ordered_batch()
    results = []
    for shares in (SHARES, TEXT_SHARES):
        model.zero_grad()
        mine = shares[rank]
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        loss, gradients = losses_and_gradients(wrapped, batch[mine], TIMES[mine])
        dist.all_reduce(loss)
        results.append((loss / 2, {name: gradient.clone() for name, gradient in gradients.items()}))
    if rank == 0:  # alone, without a gradient, nobody is waited for
        with torch.no_grad():
            results.append((model(batch, times=TIMES), {}))
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


def shared_model() -> nn.Module:
    torch.manual_seed(0)
    return awake(tiny(reconstruction_loss_weight=0.5))


def ordered_batch() -> list:
    """Text alone last, so that a share can be without modalities."""
    batch = ragged_batch()
    return [batch[0], batch[1], batch[3], batch[2]]


@pytest.mark.slow
def test_two_processes_with_unequal_batches_average_to_one_with_all(tmp_path, monkeypatch):
    mp.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    results = torch.load(tmp_path / "results.pt")
    monkeypatch.setattr(torch, "randn_like", noise_of)
    loss, gradients = losses_and_gradients(shared_model(), ordered_batch(), TIMES)
    for averaged, averaged_gradients in results:
        torch.testing.assert_close(averaged, loss, rtol=1e-10, atol=1e-10)
        for name, gradient in averaged_gradients.items():
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-8, atol=1e-10)


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


def test_a_list_of_samples_is_a_dataset():
    (batch,) = create_dataloader([[tensor([1])], [tensor([2])]])
    assert batch == [[tensor([1])], [tensor([2])]]


def test_a_sample_is_a_list_of_parts_however_a_dataset_gives_it():
    text, image = tensor([1]), torch.ones(2, 3)
    samples = [[text, image], (text, image), (text, (0, image), text), (0, image), image, text]
    batch = collate_fn(samples)
    assert [len(sample) for sample in batch] == [2, 2, 3, 1, 1, 1]
    assert batch[3] == [(0, image)]
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


def test_muon_is_for_the_matrices_of_all_linear_layers_of_the_trunk():
    model = tiny()
    muon = model.muon_parameters()
    layers = dict(model.transformer.layers.named_parameters())
    names = {name for name, parameter in layers.items() if any(parameter is chosen for chosen in muon)}
    matrices = ("attn.to_qkv", "attn.to_gates", "attn.to_out", "attn_norm.to_modulation")
    matrices += ("ff.to_hidden", "ff.to_out", "ff_norm.to_modulation")
    assert names == {f"{layer}.{name}.weight" for layer in (0, 1) for name in matrices} | {"1.skip.weight"}
    assert len(muon) == len(names)
    assert all(parameter.ndim == 2 for parameter in muon)


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
