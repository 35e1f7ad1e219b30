"""Two processes that train one model, held to one process that has all samples."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import awake, noise_of, ragged_batch, tiny
from torch import nn, tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

TIMES = tensor([[0.25, 0.5], [0.75, 0.125], [0.5, 0.875], [0.0, 0.0]]).double()
EXACT = dict(rtol=1e-8, atol=1e-10)
# one process has one sample with both modalities; one has no modality at all; one has neither text nor modality 1
SHARES = {"uneven": (slice(0, 1), slice(1, 4)), "text": (slice(0, 3), slice(3, 4))}

pytestmark = pytest.mark.slow


def shared_model(**options) -> nn.Module:
    torch.manual_seed(0)
    return awake(tiny(reconstruction_loss_weight=0.5, **options)).train()


def ordered_batch() -> list:
    """Text alone last, so that a share can be without modalities."""
    batch = ragged_batch()
    return [batch[0], batch[1], batch[3], batch[2]]


def gradients_of(model: nn.Module) -> dict:
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def alone(samples, times, **options):
    """What one process makes of all samples."""
    model = shared_model()
    loss, parts = model(samples, times=times, return_breakdown=True, prob_uncond=0.0, **options)
    loss.backward()
    return parts, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def in_two(job, folder) -> list:
    mp.spawn(run_job, (job, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def run_job(rank: int, job, folder: str) -> None:
    torch.set_num_threads(1)
    torch.randn_like = noise_of
    os.environ |= dict(MASTER_ADDR="localhost")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        torch.save(job(rank), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def assert_parts(made, expected):
    for part, other in zip(made, expected, strict=True):
        torch.testing.assert_close(part, other.detach(), **EXACT)


def assert_gradients(made, expected):
    for name, gradient in made.items():
        other = expected[name]
        torch.testing.assert_close(gradient, torch.zeros_like(gradient) if other is None else other, **EXACT)


# jobs of one process


def ddp_steps(rank):
    model, results = shared_model(), {}
    wrapped = DistributedDataParallel(model)  # without find_unused_parameters
    for name, shares in SHARES.items():
        model.zero_grad()
        mine = shares[rank]
        batch, times = ordered_batch()[mine], TIMES[mine]
        loss, parts = wrapped(batch, times=times, return_breakdown=True, prob_uncond=0.0)
        loss.backward()
        results[name] = [part.detach() for part in parts], gradients_of(model)
    wrapped(ordered_batch()[:1] if rank else tensor([[1, 2]]), reduction="span").flow.sum().backward()
    model.zero_grad()
    images = torch.randn(2, 2, 3).double() if rank else tensor([[1, 2, 3]])  # no text here, nothing but text there
    model.zero_grad()
    wrapped(images).backward()
    results["apart"] = gradients_of(model)
    if rank == 0:  # alone, in evaluation, whether with gradients or without, nobody is waited for
        wrapped.eval()
        results["evaluation"] = [model(ordered_batch(), times=TIMES).detach()]
        with torch.no_grad():
            results["evaluation"].append(model(ordered_batch(), times=TIMES))
    return results


def accumulated(rank):
    model = shared_model()
    wrapped = DistributedDataParallel(model)
    pack, samples = model.packer(prob_uncond=0.0), ordered_batch()
    mine = [0, 3] if rank == 0 else [1, 2]
    batches = [pack([samples[i]], times=TIMES[i : i + 1]) for i in mine]
    counts = sum(model.count_targets(batch) for batch in batches).all_reduce()
    total = torch.zeros(())
    for i, batch in enumerate(batches):
        with wrapped.no_sync() if i == 0 else torch.enable_grad():
            loss = wrapped(batch, counts=counts)
            loss.backward()
        total = total + loss.detach()
    with pytest.raises(ValueError, match=r"call counts\.all_reduce\(\) once per optimizer step"):
        model(batches[0], counts=batches[0].counts)
    return total, gradients_of(model)


def shard(model) -> None:
    for layer in model.transformer.layers:
        fully_shard(layer)
    fully_shard(model)


def sharded(rank):
    model = shared_model()
    ema = model.create_ema(beta=0.5, update_after_step=0, update_every=1, min_value=0.5)
    shard(model)
    shard(ema.ema_model)
    with pytest.raises(TypeError, match="call create_ema before fully_shard"):
        model.create_ema()
    results = {}
    for name, shares in SHARES.items():
        model.zero_grad()
        mine = shares[rank]
        loss, parts = model(ordered_batch()[mine], times=TIMES[mine], return_breakdown=True, prob_uncond=0.0)
        loss.backward()
        whole = {key: p.grad.full_tensor() for key, p in model.named_parameters() if p.requires_grad}
        results[name] = [part.detach() for part in parts], whole
    prompt = tensor([1, 2][: 1 + rank])  # other lengths, so other numbers of steps
    results["sample"] = repr(model.sample(prompt, max_length=12 + 8 * rank, text_temperature=0.0))
    model(ordered_batch(), times=TIMES).backward()  # and it trains on
    ema.update()
    for parameter in model.parameters():
        parameter.data.mul_(0)
    ema.update()  # half of what was
    results["ema"] = {name: p.full_tensor() for name, p in ema.ema_model.named_parameters() if p.requires_grad is False}
    results["average"] = repr(ema.sample(prompt, max_length=12 + 8 * rank, text_temperature=0.0))
    return results


# what they come to


def test_means_are_global_whatever_a_process_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", noise_of)
    for made in in_two(ddp_steps, tmp_path):
        for name in SHARES:
            parts, gradients = alone(ordered_batch(), TIMES)
            assert_parts(made[name][0], parts)
            assert_gradients(made[name][1], gradients)
        assert all(gradient is not None for gradient in made["apart"].values())
        if "evaluation" in made:
            loss = shared_model().eval()(ordered_batch(), times=TIMES).detach()
            assert_parts(made["evaluation"], [loss, loss])


def test_accumulation_over_two_processes_is_one_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", noise_of)
    parts, gradients = alone(ordered_batch(), TIMES)
    for total, made in in_two(accumulated, tmp_path):
        torch.testing.assert_close(total.double(), parts.total.detach(), **EXACT)
        assert_gradients(made, gradients)


def test_a_sharded_model_trains_and_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", noise_of)
    parts, gradients = alone(ordered_batch(), TIMES)
    for rank, made in enumerate(in_two(sharded, tmp_path)):
        for name in SHARES:
            assert_parts(made[name][0], parts)
            assert_gradients(made[name][1], gradients)
        sample = shared_model().sample(tensor([1, 2][: 1 + rank]), max_length=12 + 8 * rank, text_temperature=0.0)
        assert made["sample"] == repr(sample)
        half = shared_model()
        for name, parameter in half.named_parameters():
            parameter.data.mul_(0.5)
            torch.testing.assert_close(made["ema"][name], parameter.data, **EXACT)
        sample = half.sample(tensor([1, 2][: 1 + rank]), max_length=12 + 8 * rank, text_temperature=0.0)
        assert made["average"] == repr(sample)
