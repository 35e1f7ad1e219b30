"""Conversations, captions and edits out of files; and conditions that are dropped."""

import json
import pickle
import re
from io import BytesIO

import pytest
import torch
from chats import CHATML, VICUNA, chat_tokenizer, data_url, model_of, png, shown
from torch import Tensor, nn

from transfusion_pytorch import (
    CaptionedImages,
    Condition,
    DataPlan,
    ImageReader,
    Latents,
    Sample,
    SampleError,
    StepLoader,
    TrainConfig,
    Trainer,
    cache_latents,
    create_dataloader,
)
from transfusion_pytorch.conversations import (
    CaptionConversations,
    ConditionDropout,
    ConversationFormat,
    EditTriples,
    LlavaConversations,
    OpenAIConversations,
)
from transfusion_pytorch.conversations.messages import parse_messages
from transfusion_pytorch.conversations.records import Records
from transfusion_pytorch.data import SkipSample
from transfusion_pytorch.data.images import NativeSize

RED, BLUE = "<0 [1.0, -1.0, -1.0]>", "<0 [-1.0, -1.0, 1.0]>"
TEXT = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "It is red."}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for colour in ("red", "blue"):
        (tmp_path / "images" / f"{colour}.png").write_bytes(png(colour))
    (tmp_path / "images" / "broken.png").write_bytes(png()[:40])
    return tmp_path


def format_of(template: str = CHATML, **options) -> ConversationFormat:
    return ConversationFormat(chat_tokenizer(template), **({"images": 2} | options))


def lines(path, *records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def see(sample: Sample) -> list[str]:
    return shown(sample.parts, chat_tokenizer())


def question(source, kind: str = "image") -> dict:
    return {"role": "user", "content": [{"type": kind, kind: source}, {"type": "text", "text": "What?"}]}


# files of records


@pytest.mark.parametrize("start", ["", "\ufeff", "\n \n"])
@pytest.mark.parametrize("indent", [None, 2])
def test_records_of_an_array(tmp_path, start, indent):
    records = [{"a": 1, "b": "é\n日本"}, {"c": [1, {"d": "]"}]}, {}]
    (tmp_path / "a.json").write_text(start + json.dumps(records, indent=indent, ensure_ascii=False) + "\n")
    read = Records(tmp_path / "a.json")
    assert [read[i] for i in range(len(read))] == records
    first = 1 + start.count("\n")
    found = [int(read.describe(i).rpartition(" ")[2]) for i in range(3)]
    assert found == ([first] * 3 if indent is None else [first + 1, first + 5, first + 13])


@pytest.mark.parametrize("start", ["", "\ufeff", "\n\n"])
def test_records_of_lines(tmp_path, start):
    records = [{"a": "é"}, {"b": [1]}]
    text = start + json.dumps(records[0], ensure_ascii=False) + "\n\n" + json.dumps(records[1])
    (tmp_path / "a.jsonl").write_text(text)
    read = Records(tmp_path / "a.jsonl")
    assert [read[i] for i in range(len(read))] == records
    assert read.describe(1) == f"{tmp_path / 'a.jsonl'}, line {3 + start.count(chr(10))}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no records, expected a JSON array or a JSON object on each line"),
        ("[]", "has no records"),
        ('[{"a": 1},\n {"b": }]', "record that begins on line 2: no JSON"),
        ('[{"a": 1}\n\n', "line 1: the array is cut off"),
        ('[{"a": 1},\n {"b": 2}', "line 2: the array is cut off"),
        ('[{"a": 1},\n', "line 1: the array is cut off"),
        ('[{"a": 1}]\n[{"a": 2}]\n', r"""line 2: '\[{"a": 2}\]\\n' follows the array: a file has one"""),
        ('[{"a": 1}]{"a": 2}', r"""line 1: '{"a": 2}' follows the array"""),
        ('{"a": 1}\n{"b"', "line 2 is no JSON"),
        ("[[1], {}]", "line 1: expected a JSON object, got a list"),
        ('{"a": 1}\n3', "line 2: expected a JSON object, got a int"),
    ],
)
def test_records_that_are_none(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(map(Records(tmp_path / "a.json").__getitem__, range(2)))
    with pytest.raises(FileNotFoundError, match=r"there is no file .*b\.json"):
        Records(tmp_path / "b.json")


# kinds of records


def test_messages_of_openai(folder):
    file = lines(
        folder / "chat.jsonl",
        {"messages": [question("images/red.png"), ANSWER], "id": 7},
        {"messages": [question({"url": data_url("blue")}, "image_url"), ANSWER]},
    )
    data = OpenAIConversations(file, format_of())
    assert len(data) == 2
    assert see(data[0])[1:] == [
        f"[{RED}]",
        "[What?<|im_end|>\n<|im_start|>assistant\n]",
        "It is red.<|im_end|>",
        "[\n]",
    ]
    assert see(data[-1])[1] == f"[{BLUE}]"
    assert data[1].name == f"{file}, line 2"
    with pytest.raises(IndexError, match="there are 2 conversations, got index 2"):
        data[2]


def test_conversations_of_llava(folder):
    first = {
        "id": "a",
        "image": "red.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "Red."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
    }
    two = {
        "image": ["red.png", "blue.png"],
        "conversations": [{"from": "human", "value": "<image> and <image>"}, {"from": "gpt", "value": "Both."}],
    }
    text = {"image": None, "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello."}]}
    drawn = {
        "image": "blue.png",
        "conversations": [{"from": "human", "value": "Draw"}, {"from": "gpt", "value": "<image>"}],
    }
    (folder / "a.json").write_text(json.dumps([first, two, text, drawn], indent=1))
    data = LlavaConversations(folder / "a.json", format_of(VICUNA), root=folder / "images")
    assert [see(data[i]) for i in range(4)] == [
        [
            "[<s>A chat. USER: ]",
            f"[{RED}]",
            "[\nWhat? ASSISTANT:]",
            " Red.</s>",
            "[USER: Sure? ASSISTANT:]",
            " Yes.</s>",
        ],
        ["[<s>A chat. USER: ]", f"[{RED}]", "[ and ]", f"[{BLUE}]", "[ ASSISTANT:]", " Both.</s>"],
        ["[<s>A chat. USER: Hello ASSISTANT:]", " Hello.</s>"],
        ["[<s>A chat. USER: Draw ASSISTANT:]", " ", BLUE, "</s>"],
    ]


def test_edits(folder):
    file = lines(
        folder / "a.jsonl", {"source": "images/red.png", "instruction": "make it blue", "target": "images/blue.png"}
    )
    assert see(EditTriples(file, format_of())[0])[1:] == [
        f"[{RED}]",
        "[make it blue<|im_end|>\n<|im_start|>assistant\n]",
        BLUE,
        "<|im_end|>",
        "[\n]",
    ]


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        (OpenAIConversations, {"conversation": []}, "expected the key messages, got conversation"),
        (OpenAIConversations, {"messages": [question("red.png")]}, "no message of the assistant is to be learned"),
        (OpenAIConversations, {"messages": [{"role": "human"}]}, "message 0: unknown role 'human'"),
        (OpenAIConversations, {"messages": [question("red.png"), ANSWER]}, "message 0, part 0: there is no image file"),
        (LlavaConversations, {"messages": []}, "expected a list of conversations, got the keys messages"),
        (
            LlavaConversations,
            {"image": "a.png", "conversations": [{"from": "human", "value": "What?"}]},
            "0 <image> in the conversation and 1 images: each image stands where its <image> is",
        ),
        (
            LlavaConversations,
            {"image": ["a.png"], "conversations": [{"from": "human", "value": "<image> <image>"}]},
            "2 <image> in the conversation and 1 images",
        ),
        (
            LlavaConversations,
            {"conversations": [{"from": "human", "value": "a"}, {"from": "bot", "value": "b"}]},
            "message 1: from is one of human, user, gpt, assistant, system, got 'bot'",
        ),
        (LlavaConversations, {"conversations": [{"from": "human"}]}, 'message 0: expected {"from": ..., "value"'),
        (EditTriples, {"source": "a.png", "target": "b.png"}, "there is no instruction"),
    ],
)
def test_bad_records_are_named(folder, kind, record, message):
    data = kind(lines(folder / "a.jsonl", {}, record), format_of())
    for refused in (lambda: data[1], lambda: data.outline(1, torch.Generator())):
        with pytest.raises(
            (ValueError, FileNotFoundError), match=re.escape(f"{folder / 'a.jsonl'}, line 2: ")
        ) as error:
            refused()
        assert message in str(error.value)


def test_broken_images_are_left_out(folder):
    data = OpenAIConversations(
        lines(folder / "a.jsonl", {"messages": [question("images/broken.png"), ANSWER]}), format_of()
    )
    for skipped in (lambda: data[0], lambda: data.outline(0, torch.Generator())):
        with pytest.raises(SkipSample, match=r"a\.jsonl, line 1: message 0, part 0: not a whole image"):
            skipped()


# captions


def captioned(folder, **options) -> CaptionConversations:
    lines(
        folder / "images" / "captions.jsonl",
        {"file_name": "red.png", "text": ["a red one", "red {caption}"]},
        {"file_name": "blue.png", "text": "a blue one"},
    )
    with pytest.warns(UserWarning, match="1 of 3 images .* have no caption"):
        pairs = CaptionedImages(folder / "images", images=2)
    return CaptionConversations(pairs, format_of(options.pop("template", CHATML)), **options)


def test_captions_both_ways(folder):
    drawn = captioned(folder, prob_describe=0.0)
    assert see(drawn[0])[0].endswith("<|im_start|>user\nDraw a blue one<|im_end|>\n<|im_start|>assistant\n]")
    assert see(drawn[0])[1:] == [BLUE, "<|im_end|>", "[\n]"]
    described = captioned(folder, prob_describe=1.0)
    assert see(described[0])[1:] == [
        f"[{BLUE}]",
        "[Describe the image.<|im_end|>\n<|im_start|>assistant\n]",
        "a blue one<|im_end|>",
        "[\n]",
    ]
    both = captioned(folder, prob_describe=0.5, draw=["{caption}!", "Draw {caption}"], describe=["What?", "Say"])
    seen = {"".join(see(both.sample(1, torch.Generator().manual_seed(seed)))) for seed in range(200)}
    assert len(seen) == 2 * 2 + 2 * 2
    assert any("red {caption}!" in text for text in seen)


def test_captions_options(folder):
    for options, message in (
        (dict(prob_describe=2.0), "prob_describe is a probability, got 2.0"),
        (dict(draw=["Draw"]), "an instruction to draw has {caption} in it, got 'Draw'"),
        (dict(describe=[]), "at least one instruction each"),
    ):
        with pytest.raises(ValueError, match=message):
            captioned(folder, **options)


# in the order of a plan


def data_of(folder, count: int = 6, **options) -> OpenAIConversations:
    records = [
        {
            "messages": [
                question(f"images/{('red', 'blue')[i % 2]}.png"),
                ANSWER | {"content": "It is " + "so " * i + "."},
            ]
        }
        for i in range(count)
    ]
    return OpenAIConversations(lines(folder / "chat.jsonl", *records), format_of(), **options)


def test_outlines_have_the_shapes_of_samples(folder):
    for data in (data_of(folder), captioned(folder, prob_describe=0.5)):
        for index in range(len(data)):
            for seed in range(4):
                sample, outline = (
                    call(index, torch.Generator().manual_seed(seed)) for call in (data.sample, data.outline)
                )
                assert [_shape(part) for part in sample.parts] == [_shape(part) for part in outline.parts]
                assert any(_tensor(part).is_meta for part in outline.parts)


def _tensor(part) -> Tensor:
    part = part.part if isinstance(part, Condition) else part
    return part[1] if isinstance(part, tuple) else part


def _shape(part):
    return isinstance(part, Condition), _tensor(part).dtype, _tensor(part).shape


def test_packs_and_batches(folder):
    data = data_of(folder)
    model = model_of(data.format.tokenizer)
    packer = model.packer(token_budget=160)
    plan = DataPlan(data, token_budget=160, epochs=1, packer=packer)
    loaded = list(StepLoader(plan, lambda samples, _: packer(samples), num_workers=0))
    assert sum(len(batch) for step in loaded for batch in step.batches) == 6
    assert all(model(batch).isfinite() for step in loaded for batch in step.batches)
    (batch,) = create_dataloader(data, batch_size=6)
    assert model(batch).isfinite()
    assert [sample.name for sample in batch] == [f"{folder / 'chat.jsonl'}, line {i}" for i in range(1, 7)]


def test_data_workers_see_the_same(folder):
    data = captioned(folder, prob_describe=0.5)
    collate = lambda samples, _: [see(sample) for sample in samples]  # noqa: E731
    steps = [list(StepLoader(DataPlan(data, batch_size=2, epochs=3), collate, num_workers=n)) for n in (0, 1)]
    assert [step.batches for step in steps[0]] == [step.batches for step in steps[1]]


def test_errors_in_a_plan_name_the_line(folder):
    data = OpenAIConversations(lines(folder / "a.jsonl", {"messages": []}), format_of())
    loader = StepLoader(DataPlan(data, batch_size=1, epochs=1), lambda samples, _: samples)
    with pytest.raises(
        SampleError, match=r"index 0 \(.*a\.jsonl, line 1\): could not be loaded: .*conversation is empty"
    ):
        list(loader)


def test_a_trainer_learns_from_them(folder, tmp_path):
    data = data_of(folder)
    model = model_of(data.format.tokenizer).train()
    config = TrainConfig(steps=2, batch_size=3, num_workers=0, device="cpu")
    fitted = Trainer(model, data, config, folder=tmp_path / "run").fit()
    assert fitted.step == 2


# latents made once


def test_latents_are_cached(folder):
    data = data_of(folder)
    encoder = nn.Conv2d(3, 2, 1).requires_grad_(False)
    model = model_of(data.format.tokenizer, modality_encoder=_Last(encoder), dim_latent=2)
    cached = cache_latents(data, model, folder / "latents")
    for index in range(len(data)):
        plain, kept = data[index].parts, cached[index].parts
        assert [type(part.part) if isinstance(part, Condition) else type(part) for part in kept][1] is Latents
        expected = encoder(plain[1].part[1].movedim(-1, 0)).movedim(0, -1)
        assert torch.allclose(kept[1].part.latents, expected, atol=1e-6)
        assert model([plain], return_loss=False).allclose(model([kept], return_loss=False), atol=1e-5)
    assert data_of(folder).fingerprint() == data.fingerprint()


class _Last(nn.Module):
    """A convolution of images whose channels are last."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.movedim(-1, 1)).movedim(1, -1)


def test_text_without_images_is_cached_too(folder):
    data = OpenAIConversations(
        lines(folder / "a.jsonl", {"messages": [question("images/red.png"), ANSWER]}, {"messages": [TEXT, ANSWER]}),
        format_of(),
    )
    cached = cache_latents(data, model_of(data.format.tokenizer), folder / "latents")
    assert [len(cached[index].parts) for index in range(2)] == [5, 3]
    assert all(part.part.equal(kept.part) for part, kept in zip(data[1].parts[::2], cached[1].parts[::2], strict=True))


@pytest.mark.parametrize("length", [120, 300, 1000, 4080, 5000])
def test_fingerprints_of_images_that_stand_in_the_records(folder, length):
    """Of any length: no name of a file is as long as some of them."""
    source = data_url().ljust(length, "A")
    data = OpenAIConversations(lines(folder / "a.jsonl", {"messages": [question(source), ANSWER]}), format_of())
    assert len(data.fingerprint()) == 32


def test_fingerprints_change_with_files_however_they_are_named(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    file = folder / "images" / "red.png"
    for source in ("images/red.png", str(file), f"file://{file}", "~/images/red.png"):
        file.write_bytes(png())
        path = lines(folder / "a.jsonl", {"messages": [question(source), ANSWER]})
        data = OpenAIConversations(path, format_of())
        before = data.fingerprint()
        file.write_bytes(png() + b"more")
        assert data.fingerprint() != before


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("a" * 300 + ".png", FileNotFoundError, "there is no image file .*aaa"),
        ("a/" * 2000 + ".", FileNotFoundError, "there is no image file .*a/a/"),
        ("~nobody-of-this-name/x.png", FileNotFoundError, "there is no image file .*~nobody"),
        ("x\0y.png", FileNotFoundError, "there is no image file "),
        ("file://[x/a.png", FileNotFoundError, "there is no image file "),
        (data_url().partition(",")[2], ValueError, 'there is no .* stands behind "data:image/png;base64,"'),
    ],
)
def test_images_that_cannot_be_files_are_named(folder, source, error, message):
    path = lines(folder / "a.jsonl", {"messages": [TEXT, ANSWER]}, {"messages": [question(source), ANSWER]})
    data = OpenAIConversations(path, format_of())
    with pytest.raises(error, match=f"a.jsonl, line 2: message 0, part 0: {message}") as raised:
        data[1]
    assert len(str(raised.value)) < 400


def test_files_that_cannot_be_read_are_named(folder, monkeypatch):
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda path: (_ for _ in ()).throw(PermissionError("no")))
    data = OpenAIConversations(
        lines(folder / "a.jsonl", {"messages": [question("images/red.png"), ANSWER]}), format_of()
    )
    with pytest.raises(OSError, match=r"a\.jsonl, line 1: message 0, part 0: no"):
        data[0]


def test_outlines_of_turned_pictures_are_turned(folder):
    """Also of those that are no files."""
    pillow, file = pytest.importorskip("PIL.Image"), BytesIO()
    picture = pillow.new("RGB", (8, 4))
    picture.getexif()[0x0112] = 6
    picture.save(file, "JPEG", exif=picture.getexif())
    made = format_of(images=ImageReader(NativeSize(1, 1, 10_000)))
    for source in (file.getvalue(), pillow.open(file)):
        messages = parse_messages([question(source)])
        [[(_, image)]], [[(_, outline)]] = made.load(messages), made.load(messages, is_outline=True)
        assert image.shape == outline.shape == (8, 4, 3)


def test_fingerprints_tell_data_apart(folder):
    first = data_of(folder).fingerprint()
    bigger = OpenAIConversations(folder / "chat.jsonl", format_of(images=4))
    assert len({first, bigger.fingerprint(), data_of(folder, 5).fingerprint()}) == 3
    before = data_of(folder).fingerprint()
    (folder / "images" / "red.png").write_bytes(png("green", (4, 4)))
    assert OpenAIConversations(folder / "chat.jsonl", format_of()).fingerprint() != before


# dropped conditions


def edit(vision: bool = True) -> Sample:
    ids, image = torch.tensor([1, 2]), torch.zeros(2, 2, 3)
    read = [*([Condition((1, image))] if vision else []), Condition((0, image))]
    return Sample([Condition(ids), *read, Condition(ids), (0, image), ids, *read], name="a", weight=2.0)


def kinds(sample: Sample) -> str:
    """t text, v the vision branch, l latents, D drawn."""
    found = []
    for part in sample.parts:
        inner = part.part if isinstance(part, Condition) else part
        found.append("t" if isinstance(inner, Tensor) else "v" if inner[0] == 1 else "l" if part is not inner else "D")
    return "".join(found)


def dropped(dropout: ConditionDropout, sample: Sample, count: int = 4000) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    seen = [kinds(dropout(sample, generator)) for _ in range(count)]
    return {kind: seen.count(kind) / count for kind in set(seen)}


def test_branches_are_dropped_on_their_own():
    shares = dropped(ConditionDropout(latents=0.3, vision=0.1, vision_type=1), edit())
    expected = {"tvltDtvl": 0.7 * 0.9, "tvtDtvl": 0.3 * 0.9, "tltDtvl": 0.7 * 0.1, "ttDtvl": 0.3 * 0.1}
    assert shares.keys() == expected.keys()
    for kind, share in expected.items():
        assert abs(shares[kind] - share) < 0.025, kind
    assert dropped(ConditionDropout(vision_type=1), edit()).keys() == expected.keys()


def test_both_branches_out_of_files(folder):
    file = lines(
        folder / "a.jsonl", {"source": "images/red.png", "instruction": "make it blue", "target": "images/blue.png"}
    )
    both = format_of(vision_type=1, vision_images=4)
    data = EditTriples(file, both)
    kept = EditTriples(file, both, transform=ConditionDropout(latents=1.0, vision=0.0))
    assert EditTriples(file, both, transform=ConditionDropout()).transform == ConditionDropout(vision_type=1)
    for made, dropout, message in (
        (both, ConditionDropout(vision_type=2), "vision_type is 2 here, and 1 in the ConversationFormat"),
        (format_of(), ConditionDropout(vision=0.5), "vision=0.5, but there is no vision_type"),
    ):
        with pytest.raises(ValueError, match=message):
            EditTriples(file, made, transform=dropout)
    with pytest.raises(ValueError, match="set vision_type, too"):
        ConditionDropout(vision=0.5)(edit(), torch.Generator())
    assert [kinds(each[0]) for each in (data, kept)] == ["tvltDtt", "tvtDtt"]
    assert kinds(data.outline(0, torch.Generator())) == "tvltDtt"
    shapes = [tuple(_tensor(part).shape) for part in data[0].parts if _tensor(part).is_floating_point()]
    assert shapes == [(4, 4, 3), (2, 2, 3), (2, 2, 3)]
    one = {"dim_latent": (3, 3), "modality_default_shape": ((2, 2), (4, 4))}
    cached = cache_latents(data, model_of(both.tokenizer, **one), folder / "latents")
    types = [
        part.part.type if isinstance(part, Condition) else part.type for part in cached[0].parts if _has_type(part)
    ]
    assert types == [1, 0, 0]


def _has_type(part) -> bool:
    return isinstance(part.part if isinstance(part, Condition) else part, Latents)


def test_without_a_vision_branch():
    shares = dropped(ConditionDropout(), edit(vision=False))
    assert shares.keys() == {"tltDtl", "ttDtl"}
    assert abs(shares["ttDtl"] - 0.3) < 0.025


def test_what_is_only_understood_is_never_dropped():
    ids = torch.tensor([1, 2])
    sample = Sample([Condition(ids), Condition((0, torch.zeros(2, 2, 3))), ids])
    assert ConditionDropout(1.0)(sample, torch.Generator()).parts == sample.parts
    assert kinds(ConditionDropout(1.0, 1.0, 1)(edit(), torch.Generator())) == "ttDtvl"


@pytest.mark.parametrize("draws", [False, True])
def test_text_is_dropped_by_the_model_where_something_is_drawn(draws):
    made = format_of()
    image, text = {"type": "image", "image": png()}, {"type": "text", "text": "a red one"}
    asked, answered = ([text], [image]) if draws else ([image], [text])
    model = model_of(made.tokenizer)
    sample = made.sample_of([{"role": "user", "content": asked}, {"role": "assistant", "content": answered}])
    batch = model.packer(prob_uncond=1.0)([sample])
    seen = batch.for_training(model.vocabulary.null).stream.token
    first = int(batch.stream.spans.first_slot[0])
    is_text = batch.stream.token[:first] < model.vocabulary.num_text
    assert (seen[:first][is_text] == model.vocabulary.null).all() == draws
    assert not (seen[first:] == model.vocabulary.null).any()


def test_cached_latents_and_lone_tensors_are_dropped_too():
    latents = Latents(0, torch.zeros(2, 3))
    sample = Sample([Condition(latents), Condition(torch.zeros(2, 3)), latents])
    assert ConditionDropout(1.0)(sample, torch.Generator()).parts == [latents]


def test_the_rest_of_a_sample_stays():
    made = ConditionDropout(1.0)(edit(vision=False), torch.Generator())
    assert (made.name, made.weight) == ("a", 2.0)
    with pytest.raises(ValueError, match=r"vision is a probability, got 1\.5"):
        ConditionDropout(vision=1.5)


def test_dropout_depends_on_the_visit_alone(folder):
    dropout = pickle.loads(pickle.dumps(ConditionDropout(0.5)))
    file = lines(
        folder / "a.jsonl", {"source": "images/red.png", "instruction": "make it blue", "target": "images/blue.png"}
    )
    data = EditTriples(file, format_of(), transform=dropout)
    seen = [see(data.sample(0, torch.Generator().manual_seed(seed))) for seed in [*range(20), *range(20)]]
    assert seen[:20] == seen[20:]
    assert {len(parts) for parts in seen} == {5, 6}
    for seed in range(20):
        outline = data.outline(0, torch.Generator().manual_seed(seed))
        assert len(outline.parts) == len(seen[seed])
