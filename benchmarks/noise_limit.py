"""How much noise training should put on what has something after it in its sample: the default of `TimePolicy`.

    PYTHONPATH=. python benchmarks/noise_limit.py --policies all-last limit-0.5 no-limit default --seeds 0 1 2

Each policy trains each experiment with each seed, and what the model then draws and writes is scored. A row takes 1 to
2 minutes on one CPU core. Finished rows stay in `noise_limit.json`, so an interrupted run goes on where it was.

| experiment | samples |
|---|---|
| toy | `[count, picture, vector]` of `train_toy.py`, in patches of 2x2 pixels |
| digits | 8x8 digits in patches of 4x4: `[label, image, label, image]`, `[image, label]`, `[question, image, label]` |

Patches are larger than in the example scripts, so that models converge in the time.

The policy `all-last` is the reference: samples in which every image is the last part, so that no limit applies.

b samples, m spans (instances of a modality), n images.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from train_toy import MOST_BARS, PICTURE, VECTOR, WIDTHS, bars
from transfusion_pytorch import TimePolicy, Transfusion
from transfusion_pytorch.data.images import patchify, unpatchify
from transfusion_pytorch.examples.data import load_images
from transfusion_pytorch.examples.judge import augment, recognised, train_judge
from transfusion_pytorch.examples.run import positive_int, seed_everything
from transfusion_pytorch.flow.times import CLEAN
from transfusion_pytorch.modalities.latents import latent_times
from transfusion_pytorch.sequence.batch import Batch
from transfusion_pytorch.sequence.stream import TokenStream
from transfusion_pytorch.training.schedule import learning_rate_factor

Scores = dict[str, float]  # each from 0 to 1
DRAWINGS = 200  # scored in each place
MODALITY_STEPS = 8
TALLEST = 7
QUESTION = 10  # the id of text after the ten digits
BAR_PATCH, DIGIT_PATCH = 2, 4


# policies


@dataclass(frozen=True)
class Policy:
    """Times that the library does not offer: a limit for all that has something after it, whatever stands before.

    `probability` is drawn for each span anew.
    """

    noise_limit: float = 0.5
    probability: float = 1.0

    def draw(self, is_context: Bool[Tensor, " m"]) -> Float[Tensor, " m"]:
        """A time for every span; `is_context` says what has something after it."""
        limited = is_context & (torch.rand(is_context.shape) < self.probability)
        return TimePolicy(noise_limit=self.noise_limit).draw(limited)


POLICIES: dict[str, Policy | TimePolicy] = {
    "all-last": TimePolicy(),
    "limit-0.5": Policy(),
    "limit-0.5-half": Policy(probability=0.5),
    "clean-quarter": Policy(noise_limit=1.0, probability=0.25),
    "clean-half": Policy(noise_limit=1.0, probability=0.5),
    "no-limit": TimePolicy(prob_clean_captioned=0.0),
    "paper": TimePolicy(noise_limit=0.5, prob_clean_captioned=0.0),
    "default": TimePolicy(),
}


class LimitedTransfusion(Transfusion):
    """Takes its times from a `Policy`. What is clean has no flow loss, as in the library."""

    policy: Policy

    def _draw_times(self, batch: Batch, *args: Any) -> Float[Tensor, " m"]:
        return self.policy.draw(self._is_context(batch.stream)).to(self.precision)

    def _is_context(self, stream: TokenStream) -> Bool[Tensor, " m"]:
        """Whether anything but two markers, eom and eos, stands between a span and the end of its sample."""
        ends = torch.tensor(stream.lengths).cumsum(0)[stream.spans.sample]
        return torch.tensor(stream.spans.first) + torch.tensor(stream.spans.sizes) + 2 < ends

    def velocities(self, hidden: Any, stream: TokenStream, x_t: Any, t: Float[Tensor, " m"]) -> Any:
        velocities = super().velocities(hidden, stream, x_t, t)
        clean = {modality: (latent_times(stream, modality, t) == CLEAN)[:, None] for modality in velocities}
        return {modality: torch.where(clean[modality], v.detach(), v) for modality, v in velocities.items()}


# training, the same for both experiments


@dataclass(frozen=True)
class Recipe:
    steps: int
    learning_rate: float
    model: Mapping[str, Any]


def train(recipe: Recipe, policy: Policy | TimePolicy, batch: Callable[[], list], steps: int) -> Any:
    """The learning rate ends at zero, so no moving average is needed."""
    if isinstance(policy, TimePolicy):
        model = Transfusion(time_policy=policy, **recipe.model)
    else:
        model = LimitedTransfusion(**recipe.model)
        model.policy = policy
    optimizer = AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.05)
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, total=steps, warmup=min(100, steps // 10)))
    for _ in range(steps):
        model(batch()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


# toy: bars


TOY = Recipe(
    steps=2000,
    learning_rate=3e-3,
    model=dict(
        num_text_tokens=MOST_BARS + 1,
        dim_latent=(BAR_PATCH**2, 4),
        modality_default_shape=((4, 4), ()),
        transformer=dict(dim=64, depth=3, heads=4, dim_head=16),
    ),
)


def as_picture(count: int, height: int, width: int) -> Tensor:
    return patchify(bars(count, height, width).movedim(-1, 0), BAR_PATCH)


def as_vector(height: float) -> Tensor:
    return torch.full((4,), height / 4 - 1.125)


def toy_batch(size: int, all_last: bool) -> list:
    counts = torch.randint(1, MOST_BARS + 1, (size,))
    heights = torch.randint(1, TALLEST + 1, (size,)).tolist()
    widths = [WIDTHS[i] for i in torch.randint(len(WIDTHS), (size,)).tolist()]
    samples = [
        [count, (PICTURE, as_picture(int(count), height, width)), (VECTOR, as_vector(height))]
        for count, height, width in zip(counts, heights, widths, strict=True)
    ]
    return [sample[:2] for sample in samples] if all_last else samples


def height_of(picture: Tensor, count: int) -> int | None:
    """How high the bars are, None where the picture is not that many bars of one height in the right columns."""
    width = BAR_PATCH * picture.shape[1]
    heights = range(1, TALLEST + 1)
    return next((h for h in heights if torch.equal(picture > 0, as_picture(count, h, width) > 0)), None)


def toy_scores(model: Any, all_last: bool) -> Scores:
    """Pictures of the number of bars asked for, and vectors that agree with the picture before them: one of the
    model's own, or a true one.
    """
    counts = (torch.arange(DRAWINGS) % MOST_BARS + 1).tolist()
    asked, shape = [torch.tensor([count]) for count in counts], (4, WIDTHS[1] // BAR_PATCH)
    drawn = draw_parts(model, asked, (PICTURE, shape))
    heights = list(map(height_of, drawn, counts))
    scores = {"picture": mean(height is not None for height in heights)}
    if all_last:
        return scores
    true_heights = [i // MOST_BARS % TALLEST + 1 for i in range(DRAWINGS)]
    true = [as_picture(count, height, WIDTHS[1]) for count, height in zip(counts, true_heights, strict=True)]
    for name, pictures, wanted in (
        ("picture and vector", drawn, heights),
        ("vector of a true one", true, true_heights),
    ):
        prompts = [[text, (PICTURE, picture)] for text, picture in zip(asked, pictures, strict=True)]
        # The number of bars says nothing about their height, so guidance by it would only add to the error.
        scores[name] = mean(map(agrees, draw_parts(model, prompts, VECTOR, cfg_scale=1.0), wanted))
    return scores


def draw_parts(model: Any, prompts: list, kind: Any, **options: Any) -> list[Tensor]:
    """One more modality, a type or (type, shape), behind each prompt."""
    samples = model.sample_many(prompts, plan=[kind], max_length=256, modality_steps=MODALITY_STEPS, **options)
    return [[part[1].cpu() for part in sample if isinstance(part, tuple)][-1] for sample in samples]


def agrees(vector: Tensor, height: int | None) -> bool:
    """Whether all numbers of a vector are nearer to those of this height than to those of any other."""
    return height is not None and bool(((vector - as_vector(height)).abs() < 0.125).all())


def run_toy(name: str, steps: int) -> Scores:
    all_last = name == "all-last"
    model = train(TOY, POLICIES[name], lambda: toy_batch(16, all_last), steps)
    return toy_scores(model, all_last)


# digits


DIGITS = Recipe(
    steps=1800,
    learning_rate=2e-3,
    model=dict(
        num_text_tokens=11,
        dim_latent=DIGIT_PATCH**2,
        modality_default_shape=(2, 2),
        flow_loss_weight=2.0,
        transformer=dict(dim=64, depth=4, heads=4, dim_head=16),
    ),
)


class DigitBatches:
    """Endless batches of 32 samples. Images to be named are augmented, those to be drawn are not."""

    def __init__(self, all_last: bool):
        self.all_last, self.data = all_last, load_images("digits")
        self.exact = patchify(self.data.train.images, DIGIT_PATCH)
        self.generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))

    def __call__(self) -> list:
        images, labels = self.data.train
        chosen = torch.randint(len(labels), (44,))
        labels, exact = labels[chosen], self.exact[chosen]
        augmented = patchify(augment(images[chosen], self.generator), DIGIT_PATCH)
        drawn = [[label, image] for label, image in zip(labels[:24], exact[:24], strict=True)]
        named = [[image, label] for image, label in zip(augmented[24:], labels[24:], strict=True)]
        if self.all_last:
            return [*drawn, *([image] for image, _ in named)]
        interleaved = [[*drawn[i], *drawn[i + 1]] for i in range(0, 24, 2)]
        return [*interleaved, *named[:10], *([torch.tensor(QUESTION), *pair] for pair in named[10:])]


def digit_scores(model: Any, all_last: bool, judge: Any) -> Scores:
    """Drawings and captions, judged. What stands before a drawing is real, of the training images."""
    data = load_images("digits")
    wanted = torch.arange(DRAWINGS) % 10
    before = torch.randint(len(data.train.labels), (DRAWINGS,))
    alone = drawings(model, [None] * DRAWINGS)
    scores = {"no text before": judge(alone.clamp(-1, 1)).softmax(dim=-1).amax(dim=-1).mean().item()}
    places = {"place 1": [[label] for label in wanted]}
    if not all_last:
        latents = patchify(data.train.images[before], DIGIT_PATCH)
        parts = zip(data.train.labels[before], latents, wanted, strict=True)
        places["place 2, the last"] = [list(part) for part in parts]
    for name, prompts in places.items():
        scores[name] = mean(recognised(judge, drawings(model, prompts)) == wanted)
    if not all_last:
        images = list(patchify(data.test.images, DIGIT_PATCH))
        scores["caption loss, nats / 100"] = caption_loss(model, images, data.test.labels)
        scores["caption"] = mean(captions(model, [[image] for image in images]) == data.test.labels)
        asked = [[torch.tensor(QUESTION), image] for image in images]
        scores["answer"] = mean(captions(model, asked) == data.test.labels)
    return scores


def drawings(model: Any, prompts: list) -> Float[Tensor, "n c h w"]:
    return unpatchify(torch.stack(draw_parts(model, prompts, 0)), DIGIT_PATCH)


@torch.no_grad()
def caption_loss(model: Any, images: list[Tensor], labels: Tensor) -> float:
    """The cross-entropy of the labels behind clean images."""
    samples = [[image, label] for image, label in zip(images, labels, strict=True)]
    logits = model(samples, return_loss=False)[:, -3]  # ... eom label eos, and eom predicts the label
    return cross_entropy(logits, labels).item()


def captions(model: Any, prompts: list) -> Tensor:
    """The id that the model writes after each prompt, -1 where it writes none."""
    samples = model.sample_many(prompts, plan=[("text", 1)], max_length=256, text_temperature=0.0)
    return torch.stack([sample[-1][1] if len(sample[-1]) > 1 else torch.tensor(-1) for sample in samples]).cpu()


def run_digits(name: str, steps: int) -> Scores:
    all_last = name == "all-last"
    judge, _ = train_judge(load_images("digits"), seed=0)
    model = train(DIGITS, POLICIES[name], DigitBatches(all_last), steps)
    return digit_scores(model, all_last, judge)


EXPERIMENTS = {"toy": run_toy, "digits": run_digits}


# results


LEGEND = f"""\
Made by `PYTHONPATH=. python benchmarks/noise_limit.py`, whose docstring describes the experiments. Percent: the mean
over seeds, behind it the lowest and the highest. {DRAWINGS} drawings a place and seed in {MODALITY_STEPS} solver
steps; captions of the 360 held-out digits.

| policy | times of what has something after it |
|---|---|
| `all-last` | reference: nothing has anything after it, all times are uniform in [0, 1] |
| `no-limit` | uniform in [0, 1] |
| `limit-x` | uniform in [x, 1]; `-half`, `-fifth`: with that probability, for each span anew, else in [0, 1] |
| `clean-half`, `clean-quarter` | 1 with that probability, then without a flow loss; else uniform in [0, 1] |
| `paper` | uniform in [0.5, 1] where text follows and none stands before; else in [0, 1] |
| `default` | 1 with probability 0.5, without a flow loss, where text follows and none stands before; else in [0, 1] |

| column | what is right |
|---|---|
| picture | that many bars as asked for, all of one height, every pixel |
| picture and vector | also the vector drawn after it, which says the height |
| vector of a true one | the vector after a picture of the data |
| no text before | how sure the judge is of an image drawn at the start of a sample (93.4 for real ones) |
| place 1, place 2 | the judge sees the digit asked for, in `[label, image, label, image]` |
| caption, answer | the label behind an image, and behind a question and an image |"""


def mean(values: Any) -> float:
    values = values.tolist() if isinstance(values, Tensor) else list(values)
    return sum(values) / len(values)


def write(folder: Path, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "noise_limit.json").write_text(json.dumps(rows, indent=1) + "\n")
    (folder / "noise_limit.md").write_text("\n".join(map(str, markdown(rows))) + "\n")


def markdown(rows: list[dict]) -> list[str]:
    """A table for each experiment: percent, as the mean over seeds and, behind it, the lowest and the highest."""
    lines = ["# Noise of what has something after it", "", LEGEND, ""]
    for experiment, steps in sorted({(row["experiment"], row["steps"]) for row in rows}, reverse=True):
        these = [row for row in rows if (row["experiment"], row["steps"]) == (experiment, steps)]
        names = list(dict.fromkeys(name for row in these for name in row["scores"]))
        lines += [f"## {experiment}, {steps} steps", "", f"| policy | seeds | {' | '.join(names)} |"]
        lines += ["|---|" + "---|" * (len(names) + 1)]
        of_policy = defaultdict(list)
        for row in these:
            of_policy[row["policy"]].append(row["scores"])
        for policy in filter(of_policy.__contains__, POLICIES):
            scores = of_policy[policy]
            cells = [cell([each[name] for each in scores if name in each]) for name in names]
            lines.append(f"| {policy} | {len(scores)} | {' | '.join(cells)} |")
        lines.append("")
    return lines[:-1]


def cell(scores: Sequence[float]) -> str:
    if not scores:
        return ""
    low, middle, high = (100 * value for value in (min(scores), math.fsum(scores) / len(scores), max(scores)))
    return f"{middle:.1f}" if len(scores) == 1 else f"{middle:.1f} ({low:.1f} to {high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--experiments", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--steps", type=positive_int, help="training steps (default: toy 2000, digits 1800)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()

    torch.set_num_threads(1)
    file = args.out / "noise_limit.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    for seed in args.seeds:
        for policy in args.policies:
            for experiment in args.experiments:
                steps = args.steps or {"toy": TOY, "digits": DIGITS}[experiment].steps
                key = dict(experiment=experiment, policy=policy, seed=seed, steps=steps)
                if any(key.items() <= row.items() for row in rows):
                    continue
                seed_everything(seed)
                started = time.monotonic()
                scores = EXPERIMENTS[experiment](policy, steps)
                rows.append({**key, "scores": scores, "seconds": round(time.monotonic() - started)})
                write(args.out, rows)
                print(rows[-1], flush=True)
    write(args.out, rows)


if __name__ == "__main__":
    main()
