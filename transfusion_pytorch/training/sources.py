"""What a trainer reads its steps from: data with an index, or a stream."""

from collections.abc import Callable
from typing import Any

import torch

from transfusion_pytorch.data.loader import StepLoader
from transfusion_pytorch.data.mixture import Mixture, as_mixture, is_stream
from transfusion_pytorch.data.plan import DataPlan
from transfusion_pytorch.data.stream import StreamLoader
from transfusion_pytorch.sequence.batch import Batch
from transfusion_pytorch.sequence.packer import Packer
from transfusion_pytorch.sequence.samples import Latents
from transfusion_pytorch.training.collate import PackSeeded, idle
from transfusion_pytorch.training.config import BATCH_SIZE, TrainConfig
from transfusion_pytorch.training.launch import Launch


def open_data(
    data: Any, config: TrainConfig, pack: PackSeeded, launch: Launch, prepare: Callable[..., Any] | None
) -> tuple[StepLoader | StreamLoader, TrainConfig]:
    """The steps of this process, and the configuration with its number of steps."""
    if is_stream(data):
        config = config.resolved(None)
        return _open_stream(data, config, pack, launch, prepare), config
    if prepare is not None:
        raise ValueError(f"prepare goes with data that can only be iterated over, got a {type(data).__name__}")
    mixture = as_mixture(data)
    num_steps = _plan(mixture, config, pack.packer, config.epochs).num_steps if config.epochs else None
    plan = _plan(mixture, config, pack.packer)
    return StepLoader(plan, pack, **_loading(config, launch)), config.resolved(num_steps)


def _plan(mixture: Mixture, config: TrainConfig, packer: Packer, epochs: int | None = None) -> DataPlan:
    return DataPlan(mixture, seed=config.seed, packer=packer, epochs=epochs, **_sizes(config))


def _loading(config: TrainConfig, launch: Launch) -> dict[str, Any]:
    """How both kinds of loader load, and what this process gets of a step."""
    return dict(
        rank=launch.rank,
        num_processes=launch.size,
        num_workers=config.num_workers,
        pin_memory=launch.device.type == "cuda",
        accumulation=config.accumulation if config.token_budget is None else None,
        skips_errors=config.on_bad_sample == "skip",
    )


def _sizes(config: TrainConfig) -> dict[str, Any]:
    if config.token_budget is None:
        return dict(batch_size=config.batch_size or BATCH_SIZE)
    too_long = "skip" if config.on_bad_sample == "skip" else "error"
    return dict(token_budget=config.token_budget, packs_per_step=config.packs_per_step, too_long=too_long)


def _open_stream(data: Any, config: TrainConfig, pack: PackSeeded, launch: Launch, prepare: Any) -> StreamLoader:
    return StreamLoader(
        data,
        pack,
        prepare=prepare,
        seed=config.seed,
        packer=pack.packer,
        **_loading(config, launch),
        **_sizes(config),
    )


def idle_batch(model: Any, packer: Packer) -> Batch:
    """For a process without samples in a step: it computes this one, which has no weight, and waits for nobody."""
    if packer.vocabulary.num_text:
        return idle(packer([[torch.zeros(1, dtype=torch.long)]], seeds=[0]))
    info = model.get_modality_info(0)
    axes = info.default_shape if info.default_shape is not None else (1,) * (info.num_dim or 0)
    shape = (info.dim_latent, *axes) if info.channel_first_latent else (*axes, info.dim_latent)
    return idle(packer([[Latents(0, torch.zeros(shape))]], seeds=[0]))
