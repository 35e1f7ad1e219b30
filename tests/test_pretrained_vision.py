"""Vision encoders: pixels in [-1, 1] to features, opened by name, saved with a model, read by its chats."""

import json
import re
from pathlib import Path

import pytest
import torch
from chats import chat_tokenizer, png
from checks import no_typecheck
from torch import nn

import transfusion_pytorch
from transfusion_pytorch import (
    Condition,
    KLAutoencoder,
    Transfusion,
    VisionEncoder,
    pretrained_vision_encoder,
)
from transfusion_pytorch.conversations import VICUNA_TEMPLATE, ChatTokenizer
from transfusion_pytorch.examples.language_models import write_random

transformers = pytest.importorskip("transformers")

SIZES = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
VISION = SIZES | dict(intermediate_size=16, image_size=8, patch_size=4)
WORDS = SIZES | dict(intermediate_size=16, vocab_size=16, max_position_embeddings=8, eos_token_id=1)
PROCESSOR = dict(size=dict(height=8, width=8), image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
CROPPING = PROCESSOR | dict(size=dict(shortest_edge=10), crop_size=dict(height=8, width=8), do_center_crop=True)


def vision_model(kind):
    """Random; with its words, where it was trained with them."""
    torch.manual_seed(0)
    both = dict(vision_config=VISION, text_config=WORDS)
    if kind == "siglip":
        return transformers.SiglipModel(transformers.SiglipConfig(**both))
    if kind == "clip":
        return transformers.CLIPModel(transformers.CLIPConfig(**both, projection_dim=8))
    if kind == "siglip_vision":
        return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION))
    options = dict(image_size=8, patch_size=4, mlp_ratio=2)
    return transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, **options))


def saved(folder, kind="siglip_vision", processor=PROCESSOR):
    model = vision_model(kind).eval()
    model.save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return getattr(model, "vision_model", model)


def seeing(vision, **options):
    """A model of text, images of 4 x 4 latents, and what the vision encoder sees; with a chat template."""
    torch.manual_seed(1)
    autoencoder = KLAutoencoder(2, widths=(4, 4), num_blocks=(0, 0))
    tokenizer = chat_tokenizer()
    built = dict(
        num_text_tokens=tokenizer.num_tokens,
        dim_latent=(2, vision.dim),
        modality_default_shape=((4, 4), None),
        modality_num_dim=(2, 1),
        channel_first_latent=(True, False),
        modality_encoder=(autoencoder.encoder, vision),
        modality_decoder=(autoencoder.decoder, None),
        transformer=dict(dim=16, depth=1, heads=2, dim_head=8),
    )
    model = Transfusion(**(built | options)).eval()
    model.tokenizer = tokenizer
    return model


def images(*size):
    return torch.rand(*(size or (2, 3, 8, 8)), generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("kind", ["siglip", "clip", "siglip_vision", "dinov2"])
@torch.no_grad()
def test_a_model_is_opened_by_name_and_travels_with_what_it_is_in(tmp_path, kind):
    theirs = saved(tmp_path / "vision", kind, CROPPING if kind == "dinov2" else PROCESSOR)
    encoder = pretrained_vision_encoder(str(tmp_path / "vision"))
    mean, std = (torch.tensor(PROCESSOR[name])[:, None, None] for name in ("image_mean", "image_std"))
    expected = theirs(((images() + 1) / 2 - mean) / std).last_hidden_state
    torch.testing.assert_close(encoder(images()), expected)
    model = seeing(encoder)
    model.save_pretrained(tmp_path / "model")
    loaded = Transfusion.from_pretrained(tmp_path / "model")
    again = loaded.modalities[1].encoder
    assert torch.equal(again(images()), encoder(images()))
    assert not any(each.requires_grad or each.is_meta for each in (*again.parameters(), *again.buffers()))
    assert loaded.conversation_format().vision_images == encoder.image_reader
    assert [io.is_read_only for io in loaded.modalities] == [False, True]


PILLOW = dict(do_resize=True, do_rescale=True, do_normalize=True, resample=2)
PREPARED = {
    "SiglipImageProcessorPil": PROCESSOR | PILLOW,
    "ViTImageProcessorPil": PROCESSOR | PILLOW | dict(image_mean=0.5, image_std=0.25, resample=3),
    "CLIPImageProcessorPil": CROPPING | PILLOW,
}


@pytest.mark.parametrize("kind", PREPARED)
@pytest.mark.parametrize("size", [(24, 8), (11, 31), (8, 8), (9, 8)])
def test_image_files_are_prepared_as_the_models_own_processor_does(tmp_path, kind, size):
    """Scaled to its size or cropped: a strip of three colours is all there, or its middle is."""
    pillow, numpy = pytest.importorskip("PIL.Image"), pytest.importorskip("numpy")
    options = PREPARED[kind]
    saved(tmp_path, processor=options)
    levels = numpy.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=numpy.uint8)
    picture = pillow.fromarray(levels)
    encoder = pretrained_vision_encoder(tmp_path)
    scalar = isinstance(options["image_mean"], float)
    given = options | (dict(image_mean=[0.5] * 3, image_std=[0.25] * 3) if scalar else {})
    expected = getattr(transformers, kind)(**given)(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(encoder._normalized(encoder.image_reader(picture)[None]), expected)


def grey(folder, **processor):
    options = dict(image_size=8, patch_size=4, intermediate_size=16, num_channels=1)
    model = transformers.ViTModel(transformers.ViTConfig(**SIZES, **options)).eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(size=8) | processor))
    return model


@torch.no_grad()
def test_models_of_grey_images(tmp_path):
    theirs = grey(tmp_path, do_normalize=False)
    encoder = pretrained_vision_encoder(tmp_path)
    torch.testing.assert_close(encoder(images(2, 1, 8, 8)), theirs((images(2, 1, 8, 8) + 1) / 2).last_hidden_state)
    assert encoder.image_reader(png("red")).shape == (1, 8, 8)
    grey(tmp_path, image_mean=0.5, image_std=0.5)
    assert pretrained_vision_encoder(tmp_path)(images(1, 1, 8, 8)).shape == (1, 5, 8)


def test_models_that_do_not_take_images_alone_are_refused_before_their_weights(tmp_path):
    grey(tmp_path, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"a ViTModel does not take images of 1 channels and 8 x 8 pixels"):
        pretrained_vision_encoder(tmp_path)
    options = dict(patch_size=4, num_patches=4, intermediate_size=16)
    transformers.Siglip2VisionConfig(**SIZES, **options).save_pretrained(tmp_path)
    for size in ({}, dict(size=dict(height=8, width=8))):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(dict(max_num_patches=4) | size))
        with pytest.raises(ValueError, match=r"a Siglip2VisionModel does not take images .*pixel_attention_mask"):
            pretrained_vision_encoder(tmp_path)


@pytest.mark.parametrize("says_its_size", [True, False])
def test_chats_read_images_through_both_branches(says_its_size):
    """A black picture is -1 for the autoencoder, and normalised 0 for the vision encoder."""
    seen, module = [], nn.Unflatten(1, (1, -1))
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    size = dict(size=6) if says_its_size else {}
    flat = nn.Sequential(module, nn.Flatten(2))
    vision = VisionEncoder(flat, dim=3 * 36 if says_its_size else 3 * 64, mean=(0.5, 0.5, 0.5), std=(0.25,) * 3, **size)
    model = seeing(vision)
    format = model.conversation_format()
    asked = [{"role": "user", "content": [{"type": "image", "image": png("black")}, {"type": "text", "text": "What?"}]}]
    types = {part[0]: part[1] for part in format.prompt_of(asked) if isinstance(part, tuple)}
    assert {kind: tuple(image.shape) for kind, image in types.items()} == {
        1: (3, 6, 6) if says_its_size else (3, 8, 8),
        0: (3, 8, 8),
    }
    assert all((image == -1).all() for image in types.values())
    model.chat(asked, max_new_tokens=1, allowed_modalities=())
    assert [each for each in seen if not each.is_meta][-1].unique().tolist() == [-2.0]
    assert model.conversation_format(vision_type=None).vision_type is None
    assert len(model.conversation_format(vision_type=None).prompt_of(asked)) == 3
    model([[Condition((1, images(3, 8, 8))), Condition((0, images(3, 8, 8))), torch.tensor([1, 2])]]).backward()
    with pytest.raises(ValueError, match="vision_type: unknown modality type 2, this model has 2"):
        model.conversation_format(vision_type=2)


@torch.no_grad()
def test_any_dtype_grey_images_and_other_sizes(tmp_path):
    saved(tmp_path)
    encoder = pretrained_vision_encoder(tmp_path, dtype=torch.bfloat16)
    assert {each.dtype for each in encoder.parameters()} == {torch.bfloat16}
    features = encoder(images(2, 1, 12, 16))
    assert (features.dtype, features.shape) == (torch.float32, (2, 4, 8))
    assert pretrained_vision_encoder(tmp_path, size=16).size == (16, 16)
    own = VisionEncoder(nn.Flatten(2), dim=4, mean=(0.5,), std=(0.5,))
    torch.testing.assert_close(own(images(1, 1, 2, 2)), images(1, 1, 2, 2).flatten(2))
    assert own.image_reader is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (None, FileNotFoundError, "no folder .*nowhere with a vision model"),
        ("config.json", FileNotFoundError, r"has no config\.json: it is no vision model"),
        ("preprocessor_config.json", FileNotFoundError, r"no preprocessor_config\.json, which says how its images"),
        ("model.safetensors", FileNotFoundError, "no weights of a vision model as safetensors"),
        ("llama", ValueError, "has no vision encoder: it is a model of type 'llama'"),
        ("lost", ValueError, r"lacks \d+ weights of its vision encoder"),
    ],
)
def test_what_is_no_vision_model_is_named(tmp_path, change, error, message):
    if change is not None:
        saved(tmp_path)
    if change == "llama":
        transformers.LlamaConfig().save_pretrained(tmp_path)
    elif change == "lost":
        transformers.SiglipVisionConfig(**VISION | dict(num_hidden_layers=2)).save_pretrained(tmp_path)
    elif change is not None:
        (tmp_path / change).unlink()
    with pytest.raises(error, match=message):
        pretrained_vision_encoder(tmp_path / "nowhere" if change is None else tmp_path)


@no_typecheck
def test_arguments_that_make_no_encoder_are_refused():
    flat = nn.Flatten(2)
    for options, message in (
        ({}, "number of features of a Flatten is not known: hand over dim="),
        (dict(dim=0), "dim must be positive, got 0"),
        (dict(dim=4, size=(8, 0)), "size is height and width in pixels"),
        (dict(dim=4, mean=(0.5,)), "a number for each channel"),
    ):
        with pytest.raises(ValueError, match=message):
            VisionEncoder(flat, **options)
    with pytest.raises(TypeError, match=r"pretrained_vision_encoder\('google/siglip'\)"):
        VisionEncoder("google/siglip")
    with pytest.raises(TypeError, match="a vision model is a module, a folder, or the id of a repository, got int"):
        pretrained_vision_encoder(3)
    with pytest.raises(ValueError, match=r"reads images of 3 channels, which come first, got \(1, 8, 8, 3\)"):
        VisionEncoder(flat, dim=4)(images(1, 8, 8, 3))
    with pytest.raises(ValueError, match=r"gives \(b, n, 4\), got \(1, 3, 64\)"):
        VisionEncoder(flat, dim=4)(images(1, 3, 8, 8))
    with pytest.raises(ValueError, match="has latents of dim_latent=4, got 5"):
        seeing(VisionEncoder(flat, dim=4), dim_latent=(2, 5))


# the pages


def example(name):
    """The blocks of a page that begin with a language model or go on with one, for tiny models."""
    page = (Path(__file__).parent.parent / name).read_text()
    blocks = [code for _, code in re.findall(r"^```(\w*)\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)]
    code = "\n".join(block for block in blocks if "from_pretrained_lm(\n" in block or "model.tokenizer = " in block)
    smaller = {
        '"(HuggingFaceTB|Qwen)/.*?"': '"language"',
        '"google/.*?"': '"vision"',
        r"\(16, 16\)": "(4, 4)",
        "=512": "=60",
        ", 40,": ", 8,",
        "max_new_tokens=64": "max_new_tokens=4",
        r'"cat\.png"}}\]}\]\)': '"cat.png"}}]}], max_new_tokens=4)',
    }
    for pattern, replacement in smaller.items():
        code = re.sub(pattern, replacement, code)
    return code


@pytest.mark.parametrize("name", ["README.md", "docs/pretrained.md"])
def test_examples_of_language_models_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_random(tmp_path / "language", dim=16, depth=1)
    saved(tmp_path / "vision")
    (tmp_path / "cat.png").write_bytes(png())
    autoencoder = KLAutoencoder(4, widths=(4, 4), num_blocks=(0, 0))
    halves = dict(pretrained_autoencoder=lambda name: (autoencoder.encoder, autoencoder.decoder))
    templates = dict(ChatTokenizer=ChatTokenizer, VICUNA_TEMPLATE=VICUNA_TEMPLATE, Path=Path)
    made = {**vars(transfusion_pytorch), **templates, **halves}
    exec(compile(example(name), name, "exec"), made)
    assert made["model"].conversation_format().vision_type == (1 if name == "docs/pretrained.md" else None)
