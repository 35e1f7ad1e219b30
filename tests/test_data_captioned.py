"""Images with captions: folders in all their forms, tars, Hugging Face datasets."""

import io
import json
import tarfile

import pytest
import torch
from checks import no_typecheck
from PIL import Image
from tiny import tiny
from torch import tensor

from transfusion_pytorch import DataPlan, SkipSample, StepLoader
from transfusion_pytorch.data.captioned import CaptionedImages
from transfusion_pytorch.data.hub import CaptionedRow, HuggingFaceImages
from transfusion_pytorch.data.images import ImageReader, NativeSize
from transfusion_pytorch.data.pairs import ImageCaptionPairs
from transfusion_pytorch.data.tars import WebDatasetTars

SIZES = {"a.png": (4, 6), "b/c.jpg": (8, 4), "b/d.PNG": (4, 4)}
NATIVE = ImageReader(NativeSize(2, 4, 400))


def png(size=(4, 4), colour="red", kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (size[1], size[0]), colour).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Three images in two folders, and what is none."""
    for name, size in SIZES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(size, kind="JPEG" if name.endswith("jpg") else "PNG"))
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "readme.md").write_text("no image")
    return tmp_path


def beside(folder):
    for name in SIZES:
        (folder / name).with_suffix(".txt").write_text(f"of {name}\n\n second\n")


def jsonl(folder, name="captions.jsonl"):
    rows = [{"file_name": name, "text": [f"of {name}", "second"]} for name in SIZES]
    (folder / name).write_text("\n".join(map(json.dumps, rows)) + "\n\n")


def csv(folder):
    lines = ["file_name,caption", *(f'{name},"{text}"' for name in SIZES for text in (f"of {name}", "second"))]
    (folder / "metadata.csv").write_text("\ufeff" + "\n".join(lines))


FORMS = [beside, jsonl, lambda folder: jsonl(folder, "metadata.jsonl"), csv]


@pytest.mark.parametrize("write", FORMS)
def test_captions_are_found_in_every_form(folder, write):
    write(folder)
    data = CaptionedImages(folder, images=8)
    assert len(data) == 3
    assert [list(data.captions(i)) for i in range(3)] == [[f"of {name}", "second"] for name in SIZES]
    assert [data.describe(i) for i in range(3)] == [str(folder / name) for name in SIZES]


def test_the_folder_is_the_class(tmp_path):
    for name in ("red_car/1.png", "red_car/2.png", "blue/x/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(png())
    data = CaptionedImages(tmp_path, images=8)
    assert [data.captions(i) for i in range(3)] == [("x",), ("red car",), ("red car",)]


def test_where_captions_are_may_be_said(folder):
    jsonl(folder)
    with pytest.warns(UserWarning, match="1 of 3 images in .* have no caption: a.png"):
        data = CaptionedImages(folder, images=8, captions="folder")
    assert data.captions(0) == ("b",)
    with pytest.raises(
        ValueError, match=r"no image in .* has a caption: found the images a.png, b/c.jpg, b/d.PNG, and no"
    ):
        CaptionedImages(folder, images=8, captions="beside")


def test_samples_are_a_caption_and_an_image(folder):
    jsonl(folder)
    data = CaptionedImages(folder, images=ImageReader(4), modality_type=1)
    seen = set()
    for seed in range(20):
        ids, (kind, image) = data.sample(1, torch.Generator().manual_seed(seed)).parts
        assert (kind, tuple(image.shape)) == (1, (4, 4, 3))
        seen.add(bytes(ids.tolist()).decode())
    assert seen == {"of b/c.jpg", "second"}
    assert data[1].name == str(folder / "b/c.jpg")
    assert torch.equal(data[1].parts[0], data[1].parts[0])


def test_the_way_round_is_drawn_for_each_position(folder):
    jsonl(folder)

    def share(prob):
        data = CaptionedImages(folder, images=4, prob_describe=prob)
        made = [data.sample(0, torch.Generator().manual_seed(seed)).parts for seed in range(200)]
        return sum(isinstance(parts[0], tuple) for parts in made) / 200

    assert share(0) == 0
    assert share(1) == 1
    assert 0.2 < share(0.3) < 0.4
    with pytest.raises(ValueError, match="prob_describe is a probability, got 2"):
        CaptionedImages(folder, images=4, prob_describe=2)


def test_outlines_have_the_shapes_of_their_samples(folder):
    jsonl(folder)
    data, packer = CaptionedImages(folder, images=NATIVE, prob_describe=0.5), tiny(num_text_tokens=256).packer()
    lengths = set()
    for seed in range(60):
        sample, outline = (make(seed % 3, torch.Generator().manual_seed(seed)) for make in (data.sample, data.outline))
        lengths.add(packer.num_tokens(sample))
        assert packer.num_tokens(outline) == packer.num_tokens(sample)
        assert [isinstance(part, tuple) for part in outline.parts] == [isinstance(part, tuple) for part in sample.parts]
    assert len(lengths) == 6


def test_outlines_read_a_header_once(folder, monkeypatch):
    jsonl(folder)
    data = CaptionedImages(folder, images=NATIVE)
    first = data.outline(2, torch.Generator())
    monkeypatch.setattr(CaptionedImages, "read_image", None)
    assert data.outline(2, torch.Generator()).parts[1][1].shape == first.parts[1][1].shape == (4, 4, 3)


def test_packs_are_as_full_as_planned(folder):
    jsonl(folder)
    packer = tiny(num_text_tokens=256).packer()
    plan = DataPlan(CaptionedImages(folder, images=NATIVE), token_budget=200, epochs=9, packer=packer)
    loader = StepLoader(plan, lambda samples, references: packer([sample.parts for sample in samples]).num_tokens)
    sizes = [size for step in loader for size in step.batches]
    assert plan.fill == sum(sizes) / (200 * len(sizes))


def test_broken_images_are_left_out_with_their_name(folder):
    jsonl(folder)
    (folder / "a.png").write_bytes(png()[:40])
    data = CaptionedImages(folder, images=4)
    with pytest.raises(SkipSample, match=r"a.png: not a whole image"):
        data[0]
    plan = DataPlan(data, token_budget=200, epochs=1, packer=tiny(num_text_tokens=256).packer())
    (step,) = StepLoader(plan, lambda samples, references: len(samples))
    assert step.batches == [2]
    (skipped,) = step.skipped
    assert f"{folder / 'a.png'}: not a whole image" in skipped.reason
    header = png((50, 50))
    (folder / "a.png").write_bytes(header[:60])  # its header is whole, so that planning does not notice
    steps = list(StepLoader(DataPlan(CaptionedImages(folder, images=4), batch_size=3, epochs=1), lambda s, r: len(s)))
    assert [(step.batches, len(step.skipped)) for step in steps] == [([2], 1)]


def test_a_folder_without_images(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        CaptionedImages(tmp_path / "nowhere", images=4)
    with pytest.raises(ValueError, match=r"no images in .*: looked for .png, .jpg.*in its subfolders too; it is empty"):
        CaptionedImages(tmp_path, images=4)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"found notes.txt"):
        CaptionedImages(tmp_path, images=4)


def test_a_folder_without_captions(folder):
    with pytest.raises(ValueError, match=r"no captions for the 3 images .*captions.jsonl.*such as a.txt; and for a"):
        CaptionedImages(folder, images=4)


def test_captions_that_match_nothing(folder):
    (folder / "captions.jsonl").write_text(
        '{"file_name": "x/a.png", "text": "no"}\n{"file_name": "e.png", "text": "no"}'
    )
    with pytest.raises(ValueError, match=r"found the images a.png, b/c.jpg, b/d.PNG, and captions for x/a.png, e.png"):
        CaptionedImages(folder, images=4)


def test_captions_that_match_in_part(folder):
    (folder / "captions.jsonl").write_text(
        '{"image": "./a.png", "caption": "yes"}\n{"image": "e.png", "caption": "no"}'
    )
    with pytest.warns(UserWarning, match="no caption|no image") as caught:
        data = CaptionedImages(folder, images=4)
    assert [entry[0] for entry in data.entries] == ["a.png"]
    messages = sorted(str(each.message) for each in caught)
    assert messages == [
        f"1 captions in {folder} have no image: e.png",
        f"2 of 3 images in {folder} have no caption: b/c.jpg, b/d.PNG",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions.jsonl", '{"file_name": "a.png", "text": "x"}\n{oops', r"captions.jsonl, line 2 is no JSON"),
        ("captions.jsonl", '["a.png"]', r"line 1: expected a JSON object, got \[\"a.png\"\]"),
        (
            "metadata.csv",
            "name,label\na.png,x\n",
            r"metadata.csv, line 2: expected one of the columns .*label",
        ),
    ],
)
def test_tables_that_cannot_be_read(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        CaptionedImages(folder, images=4)


def test_captions_that_are_no_utf8(folder):
    (folder / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"a.txt is not UTF-8"):
        CaptionedImages(folder, images=4)


def test_a_fingerprint_changes_with_the_images_and_how_they_are_read(folder):
    jsonl(folder)
    first = CaptionedImages(folder, images=4).fingerprint()
    assert CaptionedImages(folder, images=4, prob_describe=1).fingerprint() == first
    assert CaptionedImages(folder, images=6).fingerprint() != first
    (folder / "a.png").write_bytes(png((5, 5)))
    assert CaptionedImages(folder, images=4).fingerprint() != first


# tars


def tar_of(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


FILES = {
    "x/0001.png": png((4, 6)),
    "x/0001.txt": b"one\ntwo\n",
    "0002.jpg": png(kind="JPEG"),
    "0002.json": json.dumps({"text": "json", "other": 3}).encode(),
    "0003.cls": b"7",
    "0003.seg.png": png(colour="blue"),
    "0003.png": png(),
    "0004.txt": b"no image",
    ".hidden.png": png(),
    "0005.webp": png(kind="WEBP"),
}


def test_tars_are_read_in_any_order(tmp_path):
    data = WebDatasetTars([tar_of(tmp_path / "a.tar", FILES), tar_of(tmp_path / "b.tar", {"1.png": png()})], images=4)
    names = ["a.tar: x/0001.png", "a.tar: 0002.jpg", "a.tar: 0003.png", "a.tar: 0005.webp", "b.tar: 1.png"]
    assert [data.describe(i) for i in range(len(data))] == [f"{tmp_path}/{name}" for name in names]
    assert [list(data.captions(i)) for i in range(5)] == [["one", "two"], ["json"], ["7"], [], []]
    assert data.read_image(4) == data.read_image(2) == png()
    assert data.image_size(0) == (4, 6)
    assert [len(data[i].parts) for i in (4, 0, 3)] == [1, 2, 1]


def test_a_tar_is_searched_once(tmp_path, monkeypatch):
    path, index = tar_of(tmp_path / "a.tar", FILES), tmp_path / "index"
    entries = WebDatasetTars([path], images=4, index_folder=index).entries
    with monkeypatch.context() as patched:
        patched.setattr(tarfile, "open", None)
        assert WebDatasetTars([path], images=4, index_folder=index).entries == entries
    tar_of(path, {"new.png": png()})
    assert WebDatasetTars([path], images=4, index_folder=index).describe(0).endswith("new.png")


def test_tars_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"a.tar.gz is no uncompressed tar, or cut off"):
        WebDatasetTars([tar_of(tmp_path / "a.tar.gz", FILES, "w:gz")], images=4)
    with pytest.raises(ValueError, match=r"no images in .*e.tar: looked for"):
        WebDatasetTars([tar_of(tmp_path / "e.tar", {"a.txt": b""})], images=4)
    whole = tar_of(tmp_path / "c.tar", FILES).read_bytes()
    (tmp_path / "c.tar").write_bytes(whole[:600])
    with pytest.raises(ValueError, match=r"c.tar is .*cut off"):
        WebDatasetTars([tmp_path / "c.tar"], images=4)


# Hugging Face


def rows():
    return {
        "image": [{"bytes": png((4, 6)), "path": None}, {"bytes": png()[:40], "path": None}, None],
        "text": [["one", "two"], ["three"], None],
        "label": [1, 0, 0],
    }


def hub_dataset():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        image=datasets.Image(),
        text=datasets.Sequence(datasets.Value("string")),
        label=datasets.ClassLabel(names=["cat", "dog"]),
    )
    return datasets.Dataset.from_dict(rows(), features=features)


def test_rows_of_a_hugging_face_dataset():
    data = HuggingFaceImages(hub_dataset(), images=NATIVE)
    assert len(data) == 3
    assert list(data.captions(0)) == ["one", "two"]
    ids, (_, image) = data[0].parts
    assert bytes(ids.tolist()).decode() in ("one", "two")
    assert tuple(image.shape) == (4, 6, 3)
    for index, reason in ((1, "row 1: not a whole image"), (2, "row 2: no image")):
        with pytest.raises(SkipSample, match=reason):
            data[index]
    classes = HuggingFaceImages(hub_dataset(), images=4, text_column="label")
    assert list(classes.captions(0)) == ["dog"]
    assert len(HuggingFaceImages(hub_dataset(), images=4, text_column=None)[0].parts) == 1
    assert data.fingerprint() == HuggingFaceImages(hub_dataset(), images=NATIVE).fingerprint()
    with pytest.raises(ValueError, match="no column 'words', this dataset has image, text, label"):
        HuggingFaceImages(hub_dataset(), images=4, text_column="words")


def test_rows_of_a_stream():
    datasets = pytest.importorskip("datasets")
    prepare = CaptionedRow(images=NATIVE, prob_describe=1)
    row = next(iter(hub_dataset().to_iterable_dataset().cast_column("image", datasets.Image(decode=False))))
    (kind, image), ids = prepare(row, torch.Generator())
    assert (kind, tuple(image.shape)) == (0, (4, 6, 3))
    assert bytes(ids.tolist()).decode() in ("one", "two")
    assert prepare({"image": png(), "text": None}, torch.Generator())[0][1].shape == (4, 4, 3)
    with pytest.raises(TypeError, match=r"expected the bytes of an image, got .*do not let datasets decode it"):
        prepare({"image": Image.new("RGB", (2, 2)), "text": "a"}, torch.Generator())


class Own(ImageCaptionPairs):
    """A user's own source, in five short methods."""

    def __len__(self):
        return 2

    def read_image(self, index):
        return png()

    def captions(self, index):
        return ["", "a"][index : index + 1]

    def describe(self, index):
        return f"own {index}"

    def data_key(self):
        return "own"


def test_an_empty_caption_is_none():
    data = Own(images=4)
    assert [len(data[i].parts) for i in range(2)] == [1, 2]
    assert data[1].parts[0].tolist() == tensor([97]).tolist()
    assert len(data.outline(0, torch.Generator()).parts) == 1


# what is odd in folders and tables


@pytest.mark.parametrize(
    ("table", "row", "message"),
    [
        ("metadata.csv", "file_name,text\na.png,a cat, sitting", r"line 2 has more cells than columns: quote captions"),
        ("metadata.csv", b"file_name,text\na.png,\xff", r"metadata.csv is not UTF-8"),
        (
            "captions.jsonl",
            '{"file_name": "a.png", "text": {"a": 1}}',
            r"line 1: a caption is text, got {'a': 1}, a dict",
        ),
        ("captions.jsonl", '{"file_name": "a.png", "text": ["a", 3]}', r"line 1: a caption is text, got 3, a int"),
    ],
)
def test_rows_that_are_not_what_they_seem(folder, table, row, message):
    (folder / table).write_bytes(row if isinstance(row, bytes) else row.encode())
    with pytest.raises(ValueError, match=message):
        CaptionedImages(folder, images=4)


@pytest.mark.filterwarnings("ignore:.*have no caption")
def test_blank_captions_are_none(folder):
    (folder / "captions.jsonl").write_text('{"file_name": "a.png", "text": [null, "", "  ", " a cat "]}')
    data = CaptionedImages(folder, images=4)
    assert [data.captions(i) for i in range(len(data))] == [("a cat",)]


def test_text_files_without_image_are_reported_and_suffixes_may_be_upper_case(tmp_path):
    for name in ("a.png", "b.JPG"):
        (tmp_path / name).write_bytes(png())
    for name in ("a.txt", "b.TXT", "zzz.txt"):
        (tmp_path / name).write_text(name)
    with pytest.warns(UserWarning, match=r"^1 captions in .* have no image: zzz.txt$"):
        data = CaptionedImages(tmp_path, images=4)
    assert [data.captions(i) for i in range(2)] == [("a.txt",), ("b.TXT",)]


def test_links_to_folders_are_followed_once(tmp_path):
    (tmp_path / "elsewhere/cat").mkdir(parents=True)
    (tmp_path / "elsewhere/cat/1.png").write_bytes(png())
    (tmp_path / "data").mkdir()
    (tmp_path / "data/cat").symlink_to(tmp_path / "elsewhere/cat")
    (tmp_path / "elsewhere/cat/loop").symlink_to(tmp_path / "data")
    assert [name for name, _ in CaptionedImages(tmp_path / "data", images=4).entries] == ["cat/1.png"]


@no_typecheck
def test_captions_are_in_one_of_three_places(folder):
    with pytest.raises(ValueError, match=r"captions is one of 'table', 'beside', 'folder', or None, got 'nope'"):
        CaptionedImages(folder, images=4, captions="nope")


def test_a_folder_of_tars_says_so(tmp_path):
    (tmp_path / "tars").mkdir()
    tar_of(tmp_path / "tars/one.tar", FILES)
    with pytest.raises(ValueError, match=r"but tars: give those, such as .*one.tar"):
        CaptionedImages(tmp_path / "tars", images=4)


# what is odd in tars


def test_a_tar_that_ends_between_two_files_is_cut_off(tmp_path):
    whole = tar_of(tmp_path / "a.tar", {"1.png": png(), "2.png": png()}).read_bytes()
    second = whole.index(b"2.png")
    for length in (second, second + 100):  # between two files, and in a header
        (tmp_path / "a.tar").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"a.tar is cut off, or damaged, at byte {second}"):
            WebDatasetTars([tmp_path / "a.tar"], images=4)
    (tmp_path / "a.tar").write_bytes(whole[:second] + bytes(512))  # some writers end in one block
    assert len(WebDatasetTars([tmp_path / "a.tar"], images=4)) == 1


def test_names_of_all_kinds_in_tars(tmp_path):
    path = tmp_path / "a.tar"
    tar_of(
        path, {"A.PNG": png(), "A.TXT": "\ufeffupper".encode(), "v1.2.png": png(), "c.txt": b"linked", "n.png": png()}
    )
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("c.png")
        link.type, link.linkname = tarfile.LNKTYPE, "A.PNG"
        tar.addfile(link)
    with pytest.warns(UserWarning, match=r"1 images in .* are left out, .*: v1.2.png$"):
        data = WebDatasetTars(str(path), images=4)
    found = {data.describe(i).partition(": ")[2]: data.captions(i) for i in range(len(data))}
    assert found == {"A.PNG": ["upper"], "c.png": ["linked"], "n.png": []}
    assert data.read_image(1) == png()


@pytest.mark.parametrize(
    ("text", "message"), [(b'{"text": [3]}', "a caption is text"), (b"[]", "a JSON object"), (b"{", "not readable")]
)
def test_captions_of_tars_that_are_none(tmp_path, text, message):
    data = WebDatasetTars([tar_of(tmp_path / "a.tar", {"1.png": png(), "1.json": text})], images=4)
    with pytest.raises(ValueError, match=rf"a.tar: 1.json.*{message}"):
        data.captions(0)


def test_tars_of_one_name_have_indexes_of_their_own(tmp_path):
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        made.append(tar_of(tmp_path / name / "x.tar", {f"{name}.png": png()}))
    for path in made:
        WebDatasetTars([path], images=4, index_folder=tmp_path / "index")
    assert len(list((tmp_path / "index").iterdir())) == 2


def test_a_negative_class_is_no_caption():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    made = datasets.Dataset.from_dict({"image": [rows()["image"][0]] * 2, "label": [-1, 1]}, features=features)
    data = HuggingFaceImages(made, images=4, text_column="label")
    assert [list(data.captions(i)) for i in range(2)] == [[], ["dog"]]


def small(size):
    return 4, 4


def test_functions_that_choose_sizes_have_a_lasting_fingerprint():
    def sized(side):
        return lambda size: (side, side)

    assert "0x" not in "".join(ImageReader(small).settings())
    keys = [Own(images=ImageReader(size)).fingerprint() for size in (small, small, sized(4), sized(4), sized(8))]
    assert keys[0] == keys[1] != keys[2] == keys[3] != keys[4]
