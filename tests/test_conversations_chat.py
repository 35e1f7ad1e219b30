"""Chats with a model: prompts from messages, answers with pictures, and conversations that go on."""

import pytest
import torch
from chats import CHATML, SPECIAL, byte_level, chat_tokenizer, data_url, model_of, picture, png
from checks import no_typecheck
from torch import nn, tensor

from transfusion_pytorch import Condition, ImageReader, PatchDecoder, PatchEncoder, SamplingOptions, Transfusion
from transfusion_pytorch.commands.pictures import PictureModel
from transfusion_pytorch.conversations import ChatMethods, ChatTokenizer, ConversationFormat
from transfusion_pytorch.data.model_images import has_channels_first, image_reader_of, picture_channels

ASKED = {
    "role": "user",
    "content": [{"type": "image_url", "image_url": data_url("red")}, {"type": "text", "text": "What?"}],
}


class Chatting(Transfusion, ChatMethods):
    """A model that chats, whatever `Transfusion` itself mixes in."""


def chatting(**options) -> Chatting:
    tokenizer = chat_tokenizer()
    built = dict(
        num_text_tokens=tokenizer.num_tokens,
        dim_latent=3,
        modality_default_shape=(2, 2),
        transformer=dict(dim=16, depth=1, heads=2, dim_head=8),
    )
    model = Chatting(**(built | options)).eval()
    model.tokenizer = tokenizer
    return model


def says(model: Chatting, *ids: int) -> None:
    """Makes a model write these ids one after another, and what it likes then."""
    rest = list(ids)
    write, num_logits = model.logits, model.vocabulary.num_logits

    def logits(hidden):
        made = write(hidden)
        forced = torch.full_like(made, -1e4)
        forced[:, rest.pop(0) if rest else 3] = 0.0
        return forced if made.shape[-1] == num_logits else made

    model.logits = logits


def ids_of(model: Chatting, text: str) -> list[int]:
    return model.tokenizer.encode(text).tolist()


def test_an_answer_ends_where_the_turn_does():
    model = chatting()
    says(model, *ids_of(model, "It is red.<|im_end|>\nAnd so on"))
    assert model.chat([ASKED]) == {"role": "assistant", "content": [{"type": "text", "text": "It is red."}]}


def test_pictures_come_and_go():
    model = chatting()
    opening = model.vocabulary.opening(0, (2, 2)).tolist()
    says(model, *ids_of(model, "Here: "), *opening, *ids_of(model, "!<|im_end|>"))
    messages = [{"role": "user", "content": "Draw."}]
    answer = model.chat(messages, generator=torch.Generator().manual_seed(0))
    assert [part["type"] for part in answer["content"]] == ["text", "image", "text"]
    image = answer["content"][1]["image"]
    assert (image.mode, image.size) == ("RGB", (2, 2))
    messages += [answer, {"role": "user", "content": "And now?"}]
    prompt = model.conversation_format().prompt_of(messages)
    drawn = prompt[1][1]
    assert torch.equal(((drawn + 1) * 127.5).round().byte().flatten(), tensor(list(image.tobytes()), dtype=torch.uint8))
    again = chatting()
    says(again, *ids_of(again, "Nothing.<|im_end|>"))
    assert again.chat(messages)["content"] == [{"type": "text", "text": "Nothing."}]


def test_whatever_a_model_answers_can_be_given_back():
    model = chatting()
    messages = [ASKED]
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        messages.append(model.chat(messages, max_new_tokens=12, generator=generator))
        messages.append({"role": "user", "content": "Go on."})
    assert len(messages) == 9


def test_the_prompt_is_how_training_begins():
    model = chatting()
    seen = []
    model.sample_many = lambda prompts, **options: seen.append(prompts[0]) or [[prompts[0][0]]]
    model.chat([ASKED])
    sample = model.conversation_format().sample_of([ASKED, {"role": "assistant", "content": "Red."}])
    for part, trained in zip(seen[0], sample.parts[:3], strict=True):
        assert isinstance(trained, Condition)
        given, expected = (each[1] if isinstance(each, tuple) else each for each in (part, trained.part))
        assert given.equal(expected)


def test_options_of_sampling():
    model = chatting()
    seen = []
    model.sample_many = lambda prompts, **options: seen.append(options) or [[prompts[0][0]]]
    model.chat([ASKED], max_new_tokens=7, text_temperature=0.0, stop_ids=[5])
    model.chat([ASKED], max_length=9)
    model.chat([ASKED], options=SamplingOptions(max_length=11, stop_ids=[3]), cache_kv=False)
    end, eos = model.tokenizer.encode("<|im_end|></s>").tolist()
    common, unbounded = dict(cache_kv=True, progress=False, options=None), dict(max_length=2**31)
    assert seen[0] == common | dict(text_temperature=0.0, stop_ids=[5, eos, end], **unbounded, max_new_tokens=7)
    assert seen[1] == common | dict(stop_ids=[eos, end], max_length=9)
    assert seen[2]["stop_ids"] == [3, eos]
    assert not seen[2]["cache_kv"]
    greedy = SamplingOptions(text_temperature=0.0)
    both = dict(max_new_tokens=4, max_length=9)
    for options, made in (
        ({}, unbounded | dict(max_new_tokens=1024)),
        (dict(max_new_tokens=4), unbounded | dict(max_new_tokens=4)),
        (both, both),
    ):
        model.chat([ASKED], options=greedy, **options)
        assert {name: seen[-1][name] for name in both} == made
    with pytest.raises(TypeError, match="temperature"):
        model.chat([ASKED], temperature=1.0)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        model.chat([ASKED], max_new_tokens=0)
    assert "text_temperature" in str(__import__("inspect").signature(ChatMethods.chat))


def test_each_conversation_has_its_own_new_tokens():
    """Counted behind its own prompt, whatever the others are."""
    model, longer = chatting(), [ASKED, {"role": "assistant", "content": "A sneaker."}, ASKED]
    asked = dict(max_new_tokens=5, text_temperature=0.0, allowed_modalities=())
    together = model.chat_many([[ASKED], longer], **asked)
    assert together == [model.chat(messages, **asked) for messages in ([ASKED], longer)]


def test_a_plan_or_a_forced_picture():
    model = chatting()
    answer = model.chat([ASKED], force_modality_at_start=0, max_new_tokens=1)
    assert answer["content"][0]["type"] == "image"


def test_errors():
    model = chatting()
    with pytest.raises(ValueError, match="message 0: unknown role 'me'"):
        model.chat([{"role": "me", "content": "a"}])
    with pytest.raises(FileNotFoundError, match=r"message 0, part 0: there is no image file .*nowhere\.png"):
        model.chat([{"role": "user", "content": [{"type": "image", "image": "nowhere.png"}]}])
    broken = {"role": "user", "content": [{"type": "image", "image": png()[:40]}]}
    with pytest.raises(ValueError, match="message 0, part 0: not a whole image"):
        model.chat([broken])
    with pytest.raises(ValueError, match="conversation 1: message 0, part 0: not a whole image"):
        model.chat_many([[ASKED], [broken]])
    with pytest.raises(ValueError, match="vision_type: unknown modality type 1, this model has 1"):
        model.conversation_format(vision_type=1)
    model.tokenizer = byte_level()
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        model.chat([ASKED])
    model.tokenizer = None
    with pytest.raises(ValueError, match="the model has no tokenizer, so it cannot chat"):
        model.chat([ASKED])


def test_a_format_of_ones_own():
    model = chatting()
    own = ConversationFormat(
        ChatTokenizer(byte_level(), chat_template="{{ messages[0]['content'] }}"), images=ImageReader(2)
    )
    seen = []
    model.sample_many = lambda prompts, **options: seen.append(prompts[0]) or [[tensor([0])]]
    model.chat([ASKED], format=own)
    assert model.tokenizer.decode(seen[0][-1]) == "What?"
    assert model.conversation_format(images=4).images == ImageReader(4)


@no_typecheck
def test_a_format_is_a_format():
    with pytest.raises(TypeError, match="format is a ConversationFormat, got int"):
        chatting().chat([ASKED], format=3)
    for options, error, message in (
        (dict(images="16"), TypeError, "images is an ImageReader or a side in pixels, got str"),
        (dict(modality_type=-1), ValueError, "modality_type is the type of a modality, from 0, got -1"),
    ):
        with pytest.raises(error, match=message):
            ConversationFormat(chat_tokenizer(), **options)


def test_many_conversations_at_once():
    model = chatting()
    conversations = [
        [ASKED],
        [{"role": "user", "content": "Draw."}],
        [ASKED, {"role": "assistant", "content": []}, ASKED],
    ]
    options = dict(text_temperature=0.0, max_length=120, modality_steps=2)
    together = model.chat_many(conversations, max_batch=2, **options)
    assert [repr(_texts(answer)) for answer in together] == [
        repr(_texts(model.chat(messages, **options))) for messages in conversations
    ]
    with pytest.raises(ValueError, match="there are no conversations to answer"):
        model.chat_many([])
    with pytest.raises(ValueError, match="conversation 1: message 0: unknown role"):
        model.chat_many([[ASKED], [{"role": "me"}]])


def _texts(answer: dict) -> list:
    return [part.get("text", part["type"]) for part in answer["content"]]


# how models take images


class Photos(nn.Module):
    """An encoder that says how it takes images."""

    image_reader = ImageReader(8, channels_first=True)

    def forward(self, images):
        return images[:, :2]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(), "ImageReader(size=FixedSize(height=2, width=2), mode='RGB', patch_size=None, channels_first=False)"),
        (
            dict(channel_first_latent=True, dim_latent=1),
            "ImageReader(size=FixedSize(height=2, width=2), mode='L', patch_size=None, channels_first=True)",
        ),
        (
            dict(modality_encoder=PatchEncoder(4, channels=1), modality_decoder=PatchDecoder(4), dim_latent=16),
            "ImageReader(size=FixedSize(height=8, width=8), mode='L', patch_size=None, channels_first=False)",
        ),
        (dict(modality_encoder=Photos(), channel_first_latent=True, dim_latent=2), str(Photos.image_reader)),
        (dict(dim_latent=5), "None"),
        (dict(modality_encoder=nn.Identity()), "None"),
        (dict(modality_default_shape=(4,)), "None"),
        (dict(modality_default_shape=None, modality_num_dim=2), "None"),
    ],
)
def test_how_a_model_takes_images(options, expected):
    io = chatting(**options).modalities[0]
    assert str(image_reader_of(io)) == expected
    if expected != "None":
        assert has_channels_first(io) == ("channels_first=True" in expected)


def test_any_encoder_that_says_how_makes_pictures():
    model = chatting(modality_encoder=Photos(), channel_first_latent=True, dim_latent=2, modality_default_shape=(8, 8))
    assert [picture_channels(io) for io in model.modalities] == [3]
    assert [picture_channels(io) for io in chatting(dim_latent=5).modalities] == [None]
    assert PictureModel(model).reader == Photos.image_reader
    content = [{"type": "image", "image": png()}, {"type": "text", "text": "What?"}]
    says(model, *ids_of(model, "Red.<|im_end|>"))
    assert _texts(model.chat([{"role": "user", "content": content}])) == ["Red."]


def test_pictures_through_patches():
    model = chatting(modality_encoder=PatchEncoder(4, channels=1), modality_decoder=PatchDecoder(4), dim_latent=16)
    content = [{"type": "image", "image": picture("white", (20, 30))}, {"type": "text", "text": "What?"}]
    says(model, *model.vocabulary.opening(0, (2, 2)).tolist(), *ids_of(model, "<|im_end|>"))
    (part,) = model.chat([{"role": "user", "content": content}])["content"]
    assert (part["image"].mode, part["image"].size) == ("L", (8, 8))


def test_channels_that_come_first():
    model = chatting(channel_first_latent=True, modality_default_shape=(3, 2))
    says(model, *model.vocabulary.opening(0, (3, 2)).tolist(), *ids_of(model, "<|im_end|>"))
    content = [{"type": "image", "image": png()}, {"type": "text", "text": "What?"}]
    (part,) = model.chat([{"role": "user", "content": content}])["content"]
    assert (part["image"].mode, part["image"].size) == ("RGB", (2, 3))


def test_a_saved_model_chats(tmp_path):
    model = chatting()
    model.save_pretrained(tmp_path)
    loaded = Chatting.from_pretrained(tmp_path)
    answers = [
        each.chat([ASKED], max_new_tokens=10, generator=torch.Generator().manual_seed(1)) for each in (model, loaded)
    ]
    assert repr(answers[0]["content"][:1]) == repr(answers[1]["content"][:1])
    assert isinstance(loaded.tokenizer, ChatTokenizer)
    assert set(SPECIAL) <= loaded.tokenizer.special_texts
    assert loaded.tokenizer.chat_template == CHATML
    assert model_of(chat_tokenizer()).tokenizer is not None


@pytest.mark.slow
def test_what_was_learned_is_answered():
    """Two colours, to be named and to be drawn: a small model knows them by heart, and chats about them."""
    model = chatting(transformer=dict(dim=64, depth=2, heads=2, dim_head=32))
    made = model.conversation_format()
    colours = ("red", "blue")
    looked = {colour: [ASKED | {"content": [{"type": "image", "image": png(colour)}]}] for colour in colours}
    wished = {colour: [{"role": "user", "content": f"Draw {colour}."}] for colour in colours}
    told = {colour: {"role": "assistant", "content": f"It is {colour}."} for colour in colours}
    drawn = {colour: {"role": "assistant", "content": [{"type": "image", "image": png(colour)}]} for colour in colours}
    asked = {"role": "user", "content": "What is it?"}
    samples = [
        made.sample_of(messages)
        for colour in colours
        for messages in (
            [*looked[colour], told[colour]],
            [*wished[colour], drawn[colour], asked, told[colour]],
        )
    ]
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    batch = model.packer(prob_uncond=0.0)(samples * 4)
    for _ in range(200):
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
    model.eval()
    options = dict(text_temperature=0.0, cfg_scale=1.0, generator=torch.Generator().manual_seed(0))
    for colour in colours:
        assert _texts(model.chat(looked[colour], **options)) == [f"It is {colour}."]
        answer = model.chat(wished[colour], **options)
        (part,) = answer["content"]
        means = torch.tensor(list(part["image"].tobytes())).reshape(4, 3).float().mean(0)
        assert means.argmax() == dict(red=0, blue=2)[colour]
        assert means.max() > 180
        assert means.sort().values[1] < 80
        assert _texts(model.chat([*wished[colour], answer, asked], **options)) == [f"It is {colour}."]
