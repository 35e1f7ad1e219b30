"""Labelled images with sentences, images that are held out, and scores."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from transfusion_pytorch.data import ByteText, CaptionedImages, ImageReader, Selection, hold_out
from transfusion_pytorch.examples.captions import (
    TEMPLATES,
    LabelledCaptions,
    as_one_size,
    class_words,
    longest_caption,
    mentioned_class,
    score_labelled,
    score_remembered,
    sentences,
    some_images,
)
from transfusion_pytorch.examples.data import FASHION_CLASSES, LabelledImages, load_images


@pytest.fixture
def pairs(tmp_path) -> CaptionedImages:
    """Twenty colours and their numbers."""
    for i in range(20):
        Image.new("RGB", (4, 4), (12 * i, 255 - 12 * i, 0)).save(tmp_path / f"{i:02}.png")
        (tmp_path / f"{i:02}.txt").write_text(f"colour {i}\nnumber {i}")
    return CaptionedImages(tmp_path, images=4, prob_describe=0.5)


# sentences


def test_every_sentence_names_its_class_and_no_other():
    for names in (FASHION_CLASSES, class_words(load_images("digits"))):
        for i, name in enumerate(names):
            for templates in TEMPLATES.values():
                assert [mentioned_class(text, names) for text in sentences(name, templates)] == [i] * len(templates)


def test_articles():
    assert sentences("ankle boot", ["{a}"]) == ["an ankle boot"]
    assert sentences("one", ["{a}"]) == ["a one"]


@pytest.mark.parametrize("caption", ["", "a picture", "someone wrote a two and a three", "twofold", "a one-two"])
def test_none_or_several_classes_are_no_answer(caption):
    assert mentioned_class(caption, ["two", "three"]) is None


# labelled images


def labelled(**options) -> LabelledCaptions:
    images = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8)
    data = LabelledImages(images, torch.tensor([1, 0]))
    captions = [["no", "none"], ["yes"]]
    return LabelledCaptions(data, captions, images=ImageReader(8, mode="L"), **options)


def test_labelled_images_are_files_with_the_captions_of_their_class():
    data = labelled(augments=False)
    assert [list(data.captions(i)) for i in range(2)] == [["yes"], ["no", "none"]]
    expected = torch.linspace(-1, 1, 2 * 64).reshape(2, 8, 8, 1)
    for i in range(2):
        assert torch.allclose(data.modalities(i)[0][1], expected[i], atol=1 / 255 + 1e-6)


@pytest.mark.parametrize(("describes", "moves"), [(1.0, True), (0.0, False)])
def test_only_images_to_be_described_are_moved(describes, moves):
    plain = labelled(augments=False, prob_describe=describes)
    moved = labelled(augments=True, prob_describe=describes)

    def image(data: LabelledCaptions, seed: int) -> Tensor:
        parts = data.sample(0, torch.Generator().manual_seed(seed)).parts
        return next(part[1] for part in parts if isinstance(part, tuple))

    assert torch.equal(image(plain, 0), plain.modalities(0)[0][1])
    assert (not torch.equal(image(moved, 0), image(plain, 0))) == moves
    assert (not torch.equal(image(moved, 0), image(moved, 1))) == moves
    assert image(moved, 0).shape == (8, 8, 1)


# some of the images


def test_held_out_images_are_the_others(pairs):
    train, held_out = hold_out(pairs, 5, seed=3)
    assert (len(train), len(held_out)) == (15, 5)
    assert sorted([*train.indices, *held_out.indices]) == list(range(20))
    assert hold_out(pairs, 5, seed=3)[1].indices == held_out.indices != hold_out(pairs, 5, seed=4)[1].indices
    with pytest.raises(ValueError, match="20 images cannot be held out of 20"):
        hold_out(pairs, 20)


def test_a_selection_is_its_images(pairs):
    some = Selection(pairs, [7, 3])
    assert [list(some.captions(i)) for i in range(2)] == [["colour 7", "number 7"], ["colour 3", "number 3"]]
    assert torch.equal(some.modalities(1)[0][1], pairs.modalities(3)[0][1])
    assert some.describe(0) == pairs.describe(7)
    assert some.image_size(0) == (4, 4)
    assert some.prob_describe == 0.5
    assert some.fingerprint() != Selection(pairs, [3, 7]).fingerprint()


def test_broken_and_bare_images_are_not_shown(pairs):
    (Path(pairs.folder) / "00.png").write_bytes(b"broken")
    assert [list(captions) for _, captions in some_images(pairs, 4)] == [
        [f"colour {i}", f"number {i}"] for i in (5, 10, 15)
    ]
    assert longest_caption(pairs, ByteText()) == len("colour 10")


def test_pictures_of_every_size_stand_on_white():
    sheet = as_one_size([torch.zeros(2, 3, 3), None, torch.zeros(4, 1, 3)])
    assert sheet.shape == (3, 3, 4, 3)
    assert (sheet == 0).sum((1, 2, 3)).tolist() == [18, 0, 12]
    assert (sheet[1] == 1).all()


# scores


class Perfect:
    """Draws and says what is right, except for some."""

    def __init__(self, image_of, caption_of, wrong: int):
        self.image_of, self.caption_of, self.wrong = image_of, caption_of, wrong

    def draw(self, captions, **options):
        return [None if i < self.wrong else self.image_of(caption) for i, caption in enumerate(captions)]

    def describe(self, images, **options):
        return ["?" if i < self.wrong else self.caption_of(image) for i, image in enumerate(images)]


@pytest.mark.parametrize("wrong", [0, 5])
def test_scores_of_what_was_remembered(pairs, wrong):
    images = [pairs.modalities(i)[0][1] for i in range(20)]
    by_caption = {caption: images[i] for i in range(20) for caption in pairs.captions(i)}
    by_image = {image.sum((0, 1)).tolist()[0]: i for i, image in enumerate(images)}
    pictures = Perfect(
        lambda caption: by_caption[caption] + 0.02 * torch.randn(4, 4, 3),
        lambda image: f"number {by_image[image.sum((0, 1)).tolist()[0]]}",
        wrong,
    )
    scores = score_remembered(pictures, pairs, count=20, seed=0, options={})
    assert scores == (1 - wrong / 20, 1 - wrong / 20, None, None)


def test_pictures_of_several_sizes_have_no_nearest(pairs):
    Image.new("RGB", (8, 4)).save(Path(pairs.folder) / "00.png")
    pairs.images = ImageReader(lambda size: size)
    assert score_remembered(Perfect(None, lambda image: "?", 0), pairs, count=20, seed=0, options={}) == (
        None,
        0,
        None,
        None,
    )


def test_scores_of_digits(tmp_path):
    data = load_images("digits")
    names = class_words(data)
    first = {name: data.test.images[data.test.labels == i][0].movedim(0, -1) for i, name in enumerate(names)}
    pictures = Perfect(
        lambda caption: first[names[mentioned_class(caption, names)]],
        lambda image: "a picture of a three",
        0,
    )
    captions = [sentences(name, TEMPLATES["digits"]) for name in names]
    held_out = LabelledCaptions(data.test, captions, images=ImageReader(8, mode="L"), augments=False)
    scores = score_labelled(pictures, data, held_out, per_class=4, seed=0, sheet=tmp_path / "a.png", options={})
    assert scores.drawn >= 0.9
    assert scores.captioned == pytest.approx((data.test.labels == 3).float().mean().item())
    assert scores.reference >= 0.98
    assert scores.distance > 0
    assert (tmp_path / "a.png").is_file()
