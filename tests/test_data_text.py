"""Text as ids and back; long texts in windows."""

import sys

import pytest
import torch
from torch import tensor

from transfusion_pytorch import DataPlan, StepLoader
from transfusion_pytorch.data.text import ByteText, TextCodec, TextWindows, TokenizerText, train_bpe

TEXTS = ["a red circle", "a blue circle above a red square", "ein grüner Kreis", "  two  spaces\n", "日本語 🎈", ""]


def bpe():
    pytest.importorskip("tokenizers")
    return train_bpe(TEXTS * 4, 300)


@pytest.mark.parametrize("make", [ByteText, bpe])
def test_text_comes_back_as_it_was(make):
    codec = make()
    assert isinstance(codec, TextCodec)
    for text in [*TEXTS, "never seen: Ω", "\x00\x7f"]:
        ids = codec.encode(text)
        assert ids.dtype == torch.long
        assert ids.ndim == 1
        assert not len(ids) or 0 <= ids.min() <= ids.max() < codec.num_tokens
        assert codec.decode(ids) == text


def test_bytes_that_are_no_text_are_replaced():
    assert ByteText().decode(tensor([255, 65])) == "\ufffdA"
    with pytest.raises(ValueError, match="bytes must be in range"):
        ByteText().decode(tensor([300]))


def test_pairs_of_bytes_make_text_shorter():
    codec = bpe()
    assert 256 < codec.num_tokens <= 300
    assert len(codec.encode(TEXTS[1])) < len(TEXTS[1]) / 2
    assert repr(codec) == repr(bpe())
    with pytest.raises(ValueError, match="vocab_size is at least 256, one for each byte, got 100"):
        train_bpe(TEXTS, 100)


def test_a_tokenizer_places_no_markers_of_its_own():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[CLS]": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 0)]
    )
    codec = TokenizerText(tokenizer)
    assert codec.encode("b a c").tolist() == [2, 1, 3]
    assert codec.num_tokens == 4


def test_without_tokenizers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'need tokenizers here.*transfusion-pytorch\[data\]"'):
        train_bpe(TEXTS, 300)


def test_windows_cover_every_text_once(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(25)))
    (tmp_path / "b.txt").write_bytes(b"")
    data = TextWindows([tmp_path / "a.txt", tmp_path / "b.txt", torch.arange(100, 110)], 10)
    assert [data[i][0].tolist() for i in range(len(data))] == [
        list(range(10)),
        list(range(10, 20)),
        list(range(20, 25)),
        list(range(100, 110)),
    ]
    assert [data.num_tokens(i) for i in range(4)] == [12, 12, 7, 12]
    assert data[0][0].dtype == torch.long


def test_windows_may_start_later_every_time():
    data = TextWindows([torch.arange(35), torch.arange(3)], 10, moves=True)
    starts = [set() for _ in range(5)]
    for seed in range(300):
        for index in range(5):
            (ids,) = data.sample(index, torch.Generator().manual_seed(seed))
            assert ids.tolist() == list(range(int(ids[0]), int(ids[0]) + data.num_tokens(index) - 2))
            starts[index].add(int(ids[0]))
    assert starts == [set(range(10)), set(range(10, 20)), set(range(20, 26)), {30}, {0}]
    still = TextWindows([torch.arange(35)], 10)
    assert still.sample(1, torch.Generator())[0][0] == 10


def test_files_of_a_tokenizer_are_encoded_whole(tmp_path):
    codec = bpe()
    (tmp_path / "a.txt").write_text(TEXTS[1] * 5)
    data = TextWindows([tmp_path / "a.txt"], 7, codec=codec)
    assert codec.decode(torch.cat([data[i][0] for i in range(len(data))])) == TEXTS[1] * 5
    with pytest.raises(FileNotFoundError, match=r"no text file .*b.txt"):
        TextWindows([tmp_path / "b.txt"], 7)
    with pytest.raises(ValueError, match="length is at least 1"):
        TextWindows([], 0)


def test_windows_are_loaded_by_workers(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(200)))
    loaded = []
    for workers in (0, 2):
        plan = DataPlan(TextWindows([tmp_path / "a.txt"], 10, moves=True), token_budget=60, epochs=2)
        collate = lambda samples, _: [sample.parts[0].tolist() for sample in samples]  # noqa: E731
        loaded.append([step.batches for step in StepLoader(plan, collate, num_workers=workers)])
    assert loaded[0] == loaded[1]
    assert len(loaded[0]) == 8


def test_a_tokenizer_neither_cuts_nor_fills_and_may_have_gaps():
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 9}, unk_token="a"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.enable_truncation(2)
    codec = TokenizerText(made)
    made.enable_padding(length=5)
    assert TokenizerText(made).encode("a b a").tolist() == codec.encode("a b a").tolist() == [0, 9, 0]
    assert codec.num_tokens == 10
    assert made.truncation  # it was a copy that was changed


def test_line_ends_stay_as_they_are(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\rc")
    codec = bpe()
    (window,) = TextWindows([tmp_path / "a.txt"], 100, codec=codec)[0]
    assert codec.decode(window) == "a\r\nb\rc"
