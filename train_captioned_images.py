"""A folder of images with captions becomes a model that draws from captions and captions images.

python train_captioned_images.py                                  # handwritten digits with sentences, scored at the end
python train_captioned_images.py --data FOLDER --size 32 --steps 3000
python train_captioned_images.py --data FOLDER --unet --sizes bucketed --bpe 1000 --prompt "a red apple"
python train_captioned_images.py --data one.tar two.tar           # WebDataset
python train_captioned_images.py --resume                         # goes on with the latest run, given its own options

A folder has its captions in captions.jsonl or metadata.csv, in name.txt beside name.png, or as names of subfolders.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from transfusion_pytorch import (
    Callback,
    ModelCard,
    PatchDecoder,
    PatchEncoder,
    TimePolicy,
    TrainConfig,
    Trainer,
    Transfusion,
    UNetDown,
    UNetUp,
)
from transfusion_pytorch.commands.errors import run_command
from transfusion_pytorch.commands.pictures import PictureModel
from transfusion_pytorch.data import (
    BucketedSize,
    ByteText,
    CaptionedImages,
    FixedSize,
    ImageCaptionPairs,
    ImageReader,
    NativeSize,
    TextCodec,
    TokenizerText,
    WebDatasetTars,
    hold_out,
    train_bpe,
)
from transfusion_pytorch.examples import run
from transfusion_pytorch.examples.captions import (
    TEMPLATES,
    LabelledCaptions,
    as_one_size,
    class_words,
    longest_caption,
    score_labelled,
    score_remembered,
    sentences,
    some_images,
)
from transfusion_pytorch.examples.data import IMAGE_LOADERS, ImageData
from transfusion_pytorch.examples.pictures import load_picture, save_grid
from transfusion_pytorch.saving.tokenizer import TokenizerFiles, load_tokenizer, tokenizer_json, write_tokenizer_files
from transfusion_pytorch.training.config import config_from_arguments
from transfusion_pytorch.training.launch import Launch


class Recipe(NamedTuple):
    """What suits a data set, on two CPU cores."""

    size: int
    patch: int
    dim: int
    depth: int
    flow_loss_weight: float
    training: TrainConfig


RECIPES = {
    "digits": Recipe(8, 2, 64, 4, 2.0, TrainConfig(steps=1500, batch_size=64, learning_rate=2e-3, ema_beta=0.95)),
    "fashion": Recipe(28, 4, 96, 5, 5.0, TrainConfig(steps=4000, batch_size=32, learning_rate=2e-3)),
    "folder": Recipe(32, 4, 128, 6, 5.0, TrainConfig(steps=3000, token_budget=4096, learning_rate=2e-3)),
}
EMBEDDED = ("digits", "fashion")


class Captioned(NamedTuple):
    """Images with captions. `labelled` is set where a judge can score what is drawn."""

    train: ImageCaptionPairs
    held_out: ImageCaptionPairs
    source: str
    labelled: ImageData | None = None


def main() -> None:
    arguments = parse()
    recipe, config = recipe_of(arguments), config_of(arguments)
    data = load_data(arguments, recipe)
    name = data.labelled.name if data.labelled else "captioned"
    place = run.open_run(arguments, f"images-{name}", device=config.device)
    text = load_text(arguments.bpe, data, place.folder, Launch(device=config.device, precision=config.precision))
    for pairs in (data.train, data.held_out):
        pairs.text = text
    run.seed_everything(config.seed)
    sampling = dict(cfg_scale=arguments.cfg_scale, modality_steps=arguments.modality_steps)
    samples = Samples(data, text, arguments.prompt, sampling)
    trainer = Trainer(
        build_model(arguments, recipe, text.num_tokens),
        data.train,
        config,
        folder=place.folder,
        validation=data.held_out if len(data.held_out) else None,
        callbacks=[samples],
    )
    started = time.monotonic()
    trainer.say(f"data: {data.source}; {len(data.train):,} images to train on, {len(data.held_out):,} held out")
    trainer.say(f"text: {text.num_tokens:,} tokens")
    fitted = trainer.fit(resume=place.resume)
    if fitted.was_stopped:
        return
    trainer.say(f"trained for {time.monotonic() - started:.0f} s")
    figures: dict[str, Any] = {f"validation {name}": value for name, value in fitted.figures.items()}
    if trainer.fill is not None:
        figures["fill of the token budget"] = f"{trainer.fill:.1%}"
        trainer.say(f"packing: the token budget of {config.token_budget:,} was filled to {trainer.fill:.1%}")
    prompt = f' "{samples.prompts[0]}"' if samples.prompts else ""
    save_model(trainer, data, text, figures, prompt=prompt)  # first, since scoring may fail
    figures |= score(trainer, samples, data, per_class=arguments.draw_per_class)
    save_model(trainer, data, text, figures, prompt=prompt)
    trainer.say(f"results in {place.folder} after {time.monotonic() - started:.0f} s; to use the model:")
    trainer.say(f"python -m transfusion_pytorch sample {place.folder / 'model'}{prompt}")


# options


def parse() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--data", type=run.existing_path, nargs="+", help="a folder of images with captions, or WebDataset tars"
    )
    parser.add_argument("--dataset", choices=EMBEDDED, help="without --data (default: digits)")
    parser.add_argument(
        "--size", type=run.positive_int, help="side of the images in pixels, or of a square of their area"
    )
    parser.add_argument("--sizes", choices=("square", "bucketed", "native"), default="square", help="their shapes")
    parser.add_argument("--grey", action="store_true", help="read the images of a folder without colour")
    parser.add_argument("--patch", type=run.positive_int, help="side of a patch in pixels")
    parser.add_argument("--unet", action="store_true", help="halves of a U-Net around the transformer, not patches")
    parser.add_argument("--dim", type=run.positive_int, help="width of the transformer")
    parser.add_argument("--depth", type=run.positive_int, help="its layers")
    parser.add_argument("--untied", action="store_true", help="text and images have weights of their own")
    parser.add_argument(
        "--bpe", type=run.positive_int, metavar="SIZE", help="train byte-pair encoding on the captions, not bytes"
    )
    parser.add_argument("--held-out", type=float, default=0.05, help="share of a folder to validate on (%(default)s)")
    parser.add_argument("--prompt", action="append", default=[], help="a caption to draw; may be given several times")
    parser.add_argument("--cfg-scale", type=float, default=3.0, help="guidance of drawings (default: %(default)s)")
    parser.add_argument(
        "--modality-steps", type=run.positive_int, default=16, help="solver intervals (default: %(default)s)"
    )
    parser.add_argument(
        "--draw-per-class", type=run.positive_int, default=20, help="drawings scored at the end (%(default)s)"
    )
    run.add_common_arguments(parser, RECIPES["digits"].training)
    arguments = parser.parse_args()
    if not all(prompt.strip() for prompt in arguments.prompt):
        parser.error("a --prompt is empty")
    if arguments.data and arguments.dataset:
        parser.error("give --data or --dataset, not both")
    arguments.dataset = arguments.dataset or "digits"
    return arguments


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """What suits the data, under what was asked for. A patch of a folder's images is an eighth of their side."""
    recipe = RECIPES["folder" if arguments.data else arguments.dataset]
    size = arguments.size or recipe.size
    usual = recipe.patch if size == recipe.size else max(1, size // 8)
    patch = 1 if arguments.unet else arguments.patch or usual
    if size % patch:
        raise ValueError(f"patches of {patch} pixels do not divide images of {size}: choose --patch or --size")
    return recipe._replace(
        size=size, patch=patch, dim=arguments.dim or recipe.dim, depth=arguments.depth or recipe.depth
    )


def config_of(arguments: argparse.Namespace) -> TrainConfig:
    usual = RECIPES["folder" if arguments.data else arguments.dataset].training
    return config_from_arguments(arguments, usual)


# data


def sizing_of(arguments: argparse.Namespace, recipe: Recipe) -> FixedSize | BucketedSize | NativeSize:
    multiple, area = 2 ** num_downsamples(recipe) if arguments.unet else recipe.patch, recipe.size**2
    if arguments.sizes == "square":
        return FixedSize(recipe.size, recipe.size)
    return BucketedSize(area, multiple) if arguments.sizes == "bucketed" else NativeSize(multiple, multiple**2, area)


def load_data(arguments: argparse.Namespace, recipe: Recipe) -> Captioned:
    """Raises `ValueError` for a folder without images, and for captions that match none."""
    mode = "L" if arguments.grey or not arguments.data else "RGB"
    options: dict[str, Any] = dict(images=ImageReader(sizing_of(arguments, recipe), mode=mode), prob_describe=0.5)
    if arguments.data:
        pairs, source = open_pairs(arguments.data, **options), ", ".join(map(str, arguments.data))
        return Captioned(*hold_out(pairs, round(arguments.held_out * len(pairs))), source)
    labelled = IMAGE_LOADERS[arguments.dataset](None)
    captions = [sentences(name, TEMPLATES[labelled.name]) for name in class_words(labelled)]
    train = LabelledCaptions(labelled.train, captions, augments=True, **options)
    held_out = LabelledCaptions(labelled.test, captions, augments=False, **options)
    return Captioned(train, held_out, labelled.source, labelled)


def open_pairs(paths: list[Path], **options: Any) -> ImageCaptionPairs:
    """One folder, or any number of tars. Raises `ValueError` for anything else."""
    folders = [path for path in paths if path.is_dir()]
    if not folders:
        return WebDatasetTars(paths, **options)
    if len(paths) > 1:
        raise ValueError(
            f"--data takes one folder, or tars; got {', '.join(map(str, paths))}. Put several folders into one"
        )
    return CaptionedImages(folders[0], **options)


def load_text(bpe_size: int | None, data: Captioned, folder: Path, launch: Launch) -> TextCodec:
    """Bytes, or byte-pair encoding, which the folder of a run keeps for when it is resumed."""
    file = folder / "tokenizer.json"
    if bpe_size is None:
        return ByteText()
    if launch.is_main and not file.is_file():
        trained = train_bpe((caption for i in range(len(data.train)) for caption in data.train.captions(i)), bpe_size)
        write_tokenizer_files(folder, TokenizerFiles(tokenizer_json(trained.tokenizer, bpe_size)))
    launch.wait()
    return TokenizerText(load_tokenizer(file.read_text(encoding="utf-8"), bpe_size, file))


# the model


def num_downsamples(recipe: Recipe) -> int:
    """Halvings until the longer side has at most 8 tokens."""
    return max(1, (recipe.size - 1).bit_length() - 3)


def build_model(arguments: argparse.Namespace, recipe: Recipe, num_text_tokens: int) -> Transfusion:
    channels = 1 if arguments.grey or not arguments.data else 3
    sizing = None if arguments.sizes == "square" else sizing_of(arguments, recipe)
    encoder = PatchEncoder(recipe.patch, channels=channels, sizing=sizing)
    pair: Any = None
    if arguments.unet:
        shape = dict(dim_hidden=32, num_downsamples=num_downsamples(recipe))
        pair = tuple(half(encoder.dim_latent, recipe.dim, **shape) for half in (UNetDown, UNetUp))
    return Transfusion(
        num_text_tokens=num_text_tokens,
        dim_latent=encoder.dim_latent,
        modality_encoder=encoder,
        modality_decoder=PatchDecoder(recipe.patch),
        modality_default_shape=(recipe.size // recipe.patch,) * 2,
        fallback_to_default_shape_if_invalid=True,
        pre_post_transformer_enc_dec=pair,
        flow_loss_weight=recipe.flow_loss_weight,
        time_policy=TimePolicy(prob_clean_captioned=0.8),  # images come clean to be captioned
        transformer=dict(
            dim=recipe.dim, depth=recipe.depth, heads=4, dim_head=recipe.dim // 4, untied=arguments.untied
        ),
    )


# what is seen of it


class Samples(Callback):
    """Draws captions and captions held-out images while the model learns: `step-01000.png`, and lines of text."""

    def __init__(self, data: Captioned, text: TextCodec, prompts: list[str], sampling: dict[str, Any]):
        usual = (captions[i % len(captions)] for i, (_, captions) in enumerate(some_images(data.train, 21)))
        self.prompts = list(dict.fromkeys([*prompts, *usual]))
        self.shown = [("held out", *pair) for pair in some_images(data.held_out, 3)]
        self.shown += [("trained on", *pair) for pair in some_images(data.train, 3)] * (data.labelled is None)
        self.text, self.sampling, self.longest = text, sampling, 8 + longest_caption(data.train, text)

    def pictures_of(self, trainer: Trainer) -> PictureModel:
        most = 2 * math.prod(trainer.model.get_modality_info(0).default_shape)  # no image has more than about half
        return PictureModel(trainer.average, text=self.text, longest_text=self.longest, most_latents=most)

    def on_sample(self, trainer: Trainer) -> dict[str, Any]:
        pictures = self.pictures_of(trainer)
        generator = torch.Generator().manual_seed(trainer.config.seed)
        drawn = pictures.draw(self.prompts, generator=generator, **self.sampling)
        said = pictures.describe([image for _, image, _ in self.shown], text_temperature=0.0, generator=generator)
        if not trainer.is_main or not drawn:  # images without captions give no prompts
            return {}
        file = trainer.folder / f"step-{trainer.step:06}.png"
        save_grid(file, as_one_size(drawn), self.prompts, columns=7, smallest=96)
        trainer.say(f"step {trainer.step:,}: drew {len(drawn)} captions, {file}")
        for (kind, _, captions), text in zip(self.shown, said, strict=True):
            trainer.say(f"  an image of {captions[0]!r} ({kind}) is called {text!r}")
        return {"drawings": load_picture(file)}


def score(trainer: Trainer, samples: Samples, data: Captioned, *, per_class: int) -> dict[str, str]:
    """Scores drawings and captions. Prints how, and returns figures for the model card."""
    pictures, options = samples.pictures_of(trainer), dict(seed=trainer.config.seed, options=samples.sampling)
    if data.labelled:
        sheet = trainer.folder / "drawings.png" if trainer.is_main else None
        options |= dict(per_class=per_class, sheet=sheet)
        scores = score_labelled(pictures, data.labelled, data.held_out, **options)
        drawn = f"recognised as asked by a judge that recognises {scores.reference:.1%} of real held-out images"
        captioned = "of held-out images name their class"
    else:
        scores = score_remembered(pictures, data.train, count=200, **options)
        drawn = "nearest to the training image whose caption was asked for"
        captioned = "of training images are theirs"
    figures = {} if scores.captioned is None else {f"captions {captioned}": f"{scores.captioned:.1%}"}
    if scores.drawn is not None:
        figures = {f"drawings {drawn}": f"{scores.drawn:.1%}"} | figures
    if scores.distance is not None:
        name = "distance (Frechet, of what the judge sees) of the drawings to as many held-out images"
        figures[name] = f"{scores.distance:.1f}"
    for (what, _, how), figure in zip((name.partition(" ") for name in figures), figures.values(), strict=True):
        trainer.say(f"{what}: {figure} {how}")
    return figures


def save_model(trainer: Trainer, data: Captioned, text: TextCodec, figures: dict[str, Any], *, prompt: str) -> None:
    command = "python -m transfusion_pytorch sample MODEL"
    command = f"{command}{prompt}\n{command} --image FILE"
    card = ModelCard(
        title="Captions to images, images to captions",
        description="Trained by `train_captioned_images.py`.",
        training_data=f"{len(data.train):,} images with captions: {data.source}",
        steps=trainer.step,
        figures=figures,
        how_to_use=f"```bash\n{command}\n```",
    )
    tokenizer = text.tokenizer if isinstance(text, TokenizerText) else None
    trainer.save_pretrained(trainer.folder / "model", card=card, tokenizer=tokenizer)


if __name__ == "__main__":
    run_command(main)
