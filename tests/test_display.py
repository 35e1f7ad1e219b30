"""Samples as people read them: the HTML is parsed and its pictures decoded again."""

import sys
from io import BytesIO
from types import SimpleNamespace

import pytest
import torch
from pages import Image, Page, ids_of, letters, refused
from torch import tensor

from transfusion_pytorch.display import (
    describe_sample,
    print_modality_sample,
    render_image,
    show_sample,
    show_samples,
    watch,
)


def page(sample, **options) -> Page:
    return Page(show_sample(sample, **options)._repr_html_())


# pictures


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_picture_has_the_pixels_of_its_tensor(channels, channel_first):
    pixels = torch.randint(256, (5, 7, channels), dtype=torch.uint8)
    image = pixels.float() / 127.5 - 1
    image = image.movedim(-1, 0) if channel_first else image
    shown = page([image], renderers={0: render_image(channel_first=channel_first)}).pixels()
    assert torch.equal(shown.reshape(5, 7, channels), pixels)


def test_a_range_of_values_is_black_to_white_and_clamped():
    image = tensor([2.0, 3.0, 4.0, 1.0, 5.0, torch.nan]).reshape(2, 3, 1)
    shown = page([image], renderers=render_image(value_range=(2, 4))).pixels()
    assert shown.tolist() == [[0, 128, 255], [0, 255, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floats_make_a_picture(dtype):
    image = tensor([-1.0, 1.0], dtype=dtype).reshape(1, 2, 1).requires_grad_()
    assert page([image], renderers=render_image()).pixels().tolist() == [[0, 255]]


@pytest.mark.parametrize(
    ("side", "smallest", "shown", "sharp"), [(16, 128, 128, True), (100, 128, 200, True), (200, 128, 200, False)]
)
def test_small_pictures_are_enlarged_a_whole_number_of_times(side, smallest, shown, sharp):
    found = page([torch.zeros(side, side // 2, 3)], renderers=render_image(), smallest=smallest)
    (image,) = found.images
    assert (image["height"], image["width"]) == (str(shown), str(shown // 2))
    assert ("image-rendering:pixelated" in image["style"]) == sharp
    assert found.picture(0).size == (side // 2, side)  # the data is not


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 4, 2), {}, r"an image \(h, w, c\) of 1, 3 or 4 channels, got shape \(4, 4, 2\); write a renderer"),
        ((3, 8, 8), {}, r"got shape \(3, 8, 8\); say render_image\(channel_first=True\)"),
        ((8, 8, 3), dict(channel_first=True), r"\(c, h, w\) .* \(8, 8, 3\); say render_image\(channel_first=False\)"),
        ((8, 3), {}, r"got shape \(8, 3\); write a renderer"),
        ((0, 8, 3), {}, r"got shape \(0, 8, 3\); write a renderer"),
    ],
)
def test_what_is_no_image_is_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        render_image(**options)(torch.zeros(shape))


def test_integers_are_no_image():
    with pytest.raises(TypeError, match=r"expected a floating point tensor, got torch\.uint8"):
        render_image()(torch.zeros(2, 2, 3, dtype=torch.uint8))


@pytest.mark.parametrize("value_range", [(1.0, 1.0), (1.0, -1.0), (0.0, float("inf")), (float("nan"), 1.0)])
def test_a_range_goes_up(value_range):
    with pytest.raises(ValueError, match="expected two finite numbers, the lower one first"):
        render_image(value_range=value_range)


def test_a_range_is_two_numbers():
    with refused("expected two numbers, of black and of white, got 3"):
        render_image(value_range=3)


@pytest.mark.parametrize("name", ["PIL", "PIL.Image"])
def test_without_pillow_the_extra_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    if name == "PIL":
        monkeypatch.delitem(sys.modules, "PIL.Image")
    view = show_sample([torch.zeros(4, 4, 3)], renderers=render_image())
    assert repr(view).startswith("modality 0")
    with pytest.raises(ImportError, match=r'pip install "transfusion-pytorch\[notebook\]"'):
        view._repr_html_()


# what a renderer may return

GREY = torch.arange(6, dtype=torch.uint8).reshape(2, 3) * 50
COLOUR = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4) * 10


@pytest.mark.parametrize(
    ("rendered", "pixels"),
    [
        (Image.fromarray(COLOUR.numpy()), COLOUR),
        (COLOUR, COLOUR),
        (COLOUR[..., :3], COLOUR[..., :3]),
        (COLOUR.numpy(), COLOUR),
        (COLOUR.numpy()[::-1, :, :3], COLOUR.flip(0)[..., :3]),
        (GREY, GREY),
        (GREY[..., None], GREY),
        (GREY / 255, GREY),
        (GREY.numpy() / 255, GREY),
        (Image.fromarray(GREY.numpy()).convert("CMYK"), GREY[..., None].expand(-1, -1, 3)),
    ],
    ids=range(10),
)
def test_a_renderer_returns_an_image_or_pixels(rendered, pixels):
    assert torch.equal(page([torch.zeros(1)], renderers=lambda latents: rendered).pixels(), pixels)


def test_a_renderer_returns_a_read_only_array():
    array = GREY.numpy().copy()
    array.flags.writeable = False
    assert torch.equal(page([torch.zeros(1)], renderers=lambda latents: array).pixels(), GREY)


def test_bytes_of_a_png_are_shown_as_they_are_and_need_no_pillow(monkeypatch):
    buffer = BytesIO()
    Image.fromarray(COLOUR.numpy()).save(buffer, format="PNG")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "PIL.Image", None)
        html = show_sample([torch.zeros(1)], renderers=lambda _: buffer.getvalue(), smallest=10)._repr_html_()
    assert torch.equal(Page(html).pixels(), COLOUR)
    assert (Page(html).images[0]["width"], Page(html).images[0]["height"]) == ("12", "8")


def test_a_renderer_returns_anything_with_html_or_text():
    class Audio:
        def _repr_html_(self):
            return "<audio controls></audio>"

    sample = [(0, torch.zeros(1)), (1, torch.zeros(1))]
    found = page(sample, renderers={0: lambda _: Audio(), 1: lambda _: "<b>loud</b>"})
    assert found.tags.count("audio") == 1
    assert "b" not in found.tags
    assert found.texts == ["<b>loud</b>"]


@pytest.mark.parametrize(
    ("rendered", "error", "message"),
    [
        (None, TypeError, r"renderer of modality 2 \(1,\) returned NoneType; expected a PIL image"),
        (SimpleNamespace(_repr_html_=lambda: None), TypeError, "returned SimpleNamespace"),
        (b"\xff\xd8\xff\xe0 a jpeg", ValueError, r"bytes that are no PNG image, beginning b'\\xff"),
        (torch.zeros(3, 8, 8), ValueError, r"array of shape \(3, 8, 8\); expected \(h, w\) or \(h, w, c\)"),
        (torch.zeros(0, 8), ValueError, r"array of shape \(0, 8\)"),
        (torch.zeros(8, 8, dtype=torch.long), TypeError, r"array of torch\.int64; expected uint8, or floats"),
    ],
)
def test_what_cannot_be_shown_is_refused(rendered, error, message):
    view = show_sample([(2, torch.zeros(1))], renderers={2: lambda latents: rendered})
    with pytest.raises(error, match=message):
        view._repr_html_()


def test_a_renderer_gets_its_own_modality():
    given = {0: [], 1: []}
    renderers = {kind: lambda latents, kind=kind: given[kind].append(latents) or "seen" for kind in given}
    first, second, third = torch.randn(2, 3), torch.randn(4), torch.randn(1)
    found = page([first, (1, second), (2, third)], renderers=renderers)
    assert torch.equal(given[0][0], first)
    assert torch.equal(given[1][0], second)
    assert found.texts == ["seen", "seen", describe_sample((2, third))[0]]


# text, and the parts together


def test_parts_are_shown_in_their_order():
    black, white = -torch.ones(2, 2, 1), torch.ones(2, 2, 1)
    found = page(
        [ids_of("one"), white, ids_of("two"), (1, torch.ones(3)), (0, black), ids_of("three")],
        decode_text=letters,
        renderers={0: render_image()},
    )
    assert found.first_pixels() == ["one", 255, "two", "modality 1  (3,)  mean 1.000  std 0.000", 0, "three"]


def test_text_is_escaped():
    text = '<script>alert("&amp;")</script></div>'
    found = page([ids_of(text)], decode_text=letters)
    assert "".join(found.texts) == text
    assert set(found.tags) == {"div"}


def test_labels_are_escaped():
    html = show_samples([[tensor([1])]], labels=["</div><img src=x onerror=alert(1)>"])._repr_html_()
    assert Page(html).texts == ["</div><img src=x onerror=alert(1)>", "1"]


def test_control_characters_are_replaced():
    shown = page([ids_of("a\x1b[2J\x00\ud800b\tc\r\nd\n")], decode_text=letters).texts
    assert shown == ["a\ufffd[2J\ufffd\ufffdb\tc\nd\n"]


def test_ids_are_shown_without_a_decoder_and_markers_hidden_on_demand():
    sample = [tensor([10, 1, 2, 12]), tensor([11, 13]), tensor(7)]
    assert page(sample).texts == ["10 1 2 12", "11 13", "7"]
    assert page(sample, num_text=10).texts == ["1 2", "7"]
    assert page(sample, num_text=10, decode_text=lambda ids: repr(ids.tolist())).texts == ["[1, 2]", "[7]"]
    assert page(sample[1:2], num_text=10).texts == ["nothing to show"]


@pytest.mark.parametrize(
    ("max_text", "shown"),
    [(3, ["abc", " … 1,001 characters more"]), (1004, ["abcd" * 251]), (None, ["abcd" * 251])],
)
def test_long_text_is_cut(max_text, shown):
    assert page([ids_of("abcd" * 251)], decode_text=letters, max_text=max_text).texts == shown


def test_elsewhere_a_view_is_the_lines_of_its_parts(capsys):
    sample = [tensor([10, 1, 2]), (1, torch.ones(2, 2)), torch.empty(0, 4)]
    view = show_sample(sample, decode_text=letters, renderers=render_image())
    print_modality_sample(sample)
    lines = ["text  (3,)  10 1 2", "modality 1  (2, 2)  mean 1.000  std 0.000", "modality 0  (0, 4)  empty"]
    assert str(view) == repr(view) == "\n".join(lines) == capsys.readouterr().out.rstrip("\n")


def test_a_single_part_is_a_sample():
    assert page(tensor([3])).texts == page([tensor([3])]).texts == ["3"]
    assert page((1, torch.ones(2))).texts == describe_sample((1, torch.ones(2)))


def test_samples_stand_side_by_side_under_their_labels():
    samples = [[tensor([1]), torch.ones(2)], [tensor([2])]]
    first, line, second = (describe_sample(part)[0] for part in (*samples[0], *samples[1]))
    view = show_samples(samples, labels=tensor([7, 8]))
    assert Page(view._repr_html_()).texts == ["7", "1", line, "8", "2"]
    assert repr(view).splitlines() == ["7", f"  {first}", f"  {line}", "8", f"  {second}"]
    assert Page(show_samples(samples)._repr_html_()).texts[::3] == ["sample 0", "sample 1"]


def test_samples_take_the_options_of_a_sample():
    options = dict(decode_text=letters, renderers=render_image(), num_text=200, max_text=2, smallest=8)
    sample = [ids_of("abc\u0101"), torch.ones(4, 4, 1)]
    card = show_samples([sample], labels=[""], **options)._repr_html_()
    assert show_sample(sample, **options)._repr_html_() in card


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (["a cat"], r"a part is a tensor or \(type, tensor\), got str"),
        ([[tensor([1])], [tensor([2])]], "a list of samples is shown by show_samples"),
        ([("0", torch.ones(2))], r"a pair is \(type, tensor\) with an int for its type, got str"),
        ([(True, torch.ones(2))], "an int for its type, got bool"),
        ([(1, tensor([2]))], r"modality 1 must be floating point, got torch\.int64; text has no type"),
        ([tensor([True])], r"text is int64 and modalities are float32 or the like, got torch\.bool"),
        ([tensor([1j])], r"got torch\.complex64"),
    ],
)
def test_what_is_no_sample_is_refused(sample, message):
    with pytest.raises(TypeError, match=message):
        show_sample(sample)
    with pytest.raises(TypeError, match=message):
        show_samples([sample])


def test_one_sample_is_not_several():
    with pytest.raises(TypeError, match=r"expected a list of samples, .* a single one is for show_sample"):
        show_samples([tensor([1]), torch.ones(2)])
    with pytest.raises(ValueError, match="labels: expected one for each of 1 samples, got 2"):
        show_samples([[tensor([1])]], labels=["a", "b"])
    with refused("labels: expected a sequence, one for each sample, got int"):
        show_samples([[tensor([1])]], labels=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(decode_text="utf-8"), "decode_text: expected a function from ids to str, got str"),
        (dict(renderers=[render_image()]), "renderers: expected a function, or a dict .* got list"),
        (dict(renderers={"0": render_image()}), "got the key '0'"),
        (dict(renderers={0: "image"}), "got str for type 0"),
        (dict(num_text=2.5), "num_text: expected an int, got float"),
        (dict(max_text="all"), "max_text: expected an int, got str"),
        (dict(smallest=1.5), "smallest: expected an int, got float"),
    ],
)
@pytest.mark.parametrize("show", [show_sample, show_samples, watch])
def test_wrong_options_are_refused(show, options, message):
    if show is watch and "num_text" in options:
        return
    with refused(message):
        show([], **options)


@pytest.mark.parametrize("name", ["num_text", "max_text", "smallest"])
def test_options_have_a_least_value(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        show_sample([], **{name: 0})


def test_a_decoder_returns_text():
    with pytest.raises(TypeError, match="decode_text takes ids, a 1-D tensor, and returns a str, got list"):
        page([tensor([1])], decode_text=lambda ids: ids.tolist())
