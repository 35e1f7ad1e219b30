"""What the trainer costs over a loop written by hand: `python benchmarks/trainer.py`.

Both train copies of one model on the same data: forward, backward, clipping, AdamW, EMA. They take turns step by step
in one process: a step of the loop follows every step of the trainer. The trainer also seeds every sample's random
numbers, checks gradients, reports and writes metrics.csv; neither validates nor saves. Figures are medians, in
milliseconds a step, and the ratio of the medians.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from training_jobs import TRAINING, Training

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_toy
from transfusion_pytorch import Callback, TrainConfig, Trainer, Transfusion


class Turns(Callback):
    """Makes a step of the loop after each of the trainer's, and times both."""

    def __init__(self, loop: Iterator[None], warmup: int):
        self.loop, self.warmup = loop, warmup
        self.seconds: dict[str, list[float]] = {"trainer": [], "loop": []}
        self.resumed: float | None = None

    def on_step(self, trainer: Any, losses: Any) -> None:
        arrived = time.perf_counter()
        next(self.loop)
        left = time.perf_counter()
        if self.resumed is not None and trainer.step > self.warmup:
            self.seconds["trainer"].append(arrived - self.resumed)
            self.seconds["loop"].append(left - arrived)
        self.resumed = time.perf_counter()


def by_hand(model: Transfusion, data: list, config: TrainConfig) -> Iterator[None]:
    """The loop of the README, with clipping and an average."""
    ema = model.create_ema(beta=config.ema_beta, update_every=config.ema_every)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(config.beta1, config.beta2))
    batches = model.create_dataloader(data, batch_size=config.batch_size, shuffle=True)
    model.train()
    while True:
        for batch in batches:
            loss = model(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
            loss.item()
            yield


def samples_of(training: Training) -> list:
    """Samples of its batches, one behind the other."""
    batches = [training.batch() for _ in range(4)]
    return [sample for batch in batches for sample in batch]


def workload(name: str) -> tuple[Any, list, int]:
    """A function that builds a model, data, and how many samples a step has."""
    torch.manual_seed(0)
    if name == "toy":
        bars = train_toy.Bars()
        data = [bars.sample(index, torch.Generator().manual_seed(index)) for index in range(256)]
        return train_toy.build_model, data, 16
    training = TRAINING[name]

    def build() -> Transfusion:
        return Transfusion(
            num_text_tokens=training.num_text,
            dim_latent=training.latents,
            modality_default_shape=training.shapes,
            transformer=training.width,
        )

    return build, samples_of(training), 16


def measure(name: str, steps: int) -> dict[str, float]:
    build, data, batch_size = workload(name)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(build())
    config = TrainConfig(
        steps=steps, batch_size=batch_size, device="cpu", validate_every=0, sample_every=0, save_every=0
    )
    turns = Turns(by_hand(models[0], data, config), warmup=max(steps // 10, 2))
    with tempfile.TemporaryDirectory() as folder:
        Trainer(models[1], data, config, folder=folder, callbacks=[turns]).fit()
    return {side: 1000 * statistics.median(seconds) for side, seconds in turns.seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["W2", "W4", "toy"])
    parser.add_argument("--steps", type=int, default=60, help="of the large ones; the toy gets five times as many")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.workloads:
        found = measure(name, args.steps * (5 if name == "toy" else 1))
        ratio = found["trainer"] / found["loop"]
        print(f"{name}: trainer {found['trainer']:.1f} ms, loop {found['loop']:.1f} ms, ratio {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
