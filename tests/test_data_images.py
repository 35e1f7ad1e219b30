"""Images as tensors: opened right whatever they are, at the sizes that were asked for."""

import struct
import sys
import zlib
from io import BytesIO

import numpy
import pytest
import torch
from checks import no_typecheck
from PIL import Image

from transfusion_pytorch import SkipSample
from transfusion_pytorch.data.images import (
    BucketedSize,
    FixedSize,
    ImageReader,
    NativeSize,
    decode_image,
    fit,
    patchify,
    size_of_image,
    to_pixels,
    unpatchify,
)

COLOURS = [[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(255, 255, 0), (0, 255, 255), (255, 0, 255)]]  # 2 x 3
# what a viewer shows of an image with each EXIF orientation, as operations on (h, w) arrays
SHOWN = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: numpy.rot90(a, -1),
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: numpy.rot90(a, 1),
}


def encoded(image, kind="PNG", **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def colours():
    return numpy.array(COLOURS, dtype=numpy.uint8)


def values(data, mode="RGB"):
    return numpy.array(decode_image(data, mode=mode))


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_images_are_turned_as_their_orientation_says(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = dict(lossless=True) if kind == "WEBP" else {}
    data = encoded(Image.fromarray(colours()), kind, exif=exif, **options)
    shown = SHOWN[orientation](colours())
    assert numpy.array_equal(values(data), shown)
    assert size_of_image(data) == shown.shape[:2]


def test_what_is_transparent_is_white():
    pixels = numpy.zeros((1, 3, 4), dtype=numpy.uint8)
    pixels[0, :, 3] = (0, 255, 51)  # black: unseen, opaque, a fifth
    pixels[0, 0, :3] = 99
    assert values(encoded(Image.fromarray(pixels))).tolist() == [[[255] * 3, [0] * 3, [204] * 3]]
    grey = Image.fromarray(numpy.array([[[0, 0], [0, 255]]], dtype=numpy.uint8))
    assert values(encoded(grey), "L").tolist() == [[255, 0]]


def test_palettes_and_their_transparent_colour():
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 1, 2, 3])
    image.putdata([0, 1, 2])
    assert values(encoded(image)).tolist() == [[[255, 0, 0], [0, 255, 0], [1, 2, 3]]]
    assert values(encoded(image, transparency=1)).tolist() == [[[255, 0, 0], [255, 255, 255], [1, 2, 3]]]
    assert values(encoded(image, "GIF", transparency=0)).tolist()[0][0] == [255, 255, 255]


@pytest.mark.parametrize(("mode", "grey"), [("RGB", [[128, 128, 128]]), ("L", [128])])
def test_grey_images_have_the_channels_that_were_asked_for(mode, grey):
    assert values(encoded(Image.new("L", (1, 1), 128)), mode).tolist() == [grey]


def test_colours_become_luminance():
    assert values(encoded(Image.fromarray(colours())), "L")[0].tolist() == [76, 150, 29]  # ITU-R 601


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_become_eight(kind):
    image = Image.fromarray(numpy.array([[0, 257, 32896, 65535]], dtype=numpy.uint16))
    assert values(encoded(image, kind), "L").tolist() == [[0, 1, 128, 255]]
    assert values(encoded(image, kind))[0, 2].tolist() == [128] * 3


def test_a_transparent_value_of_sixteen_bits_is_no_error():
    image = Image.fromarray(numpy.array([[0, 65535]], dtype=numpy.uint16))
    assert values(encoded(image, transparency=65535), "L").tolist() == [[0, 255]]


def test_black_and_white_and_print_colours():
    assert values(encoded(Image.new("1", (1, 1), 1))).tolist() == [[[255] * 3]]
    assert values(encoded(Image.new("CMYK", (1, 1), (0, 0, 0, 255)), "TIFF")).tolist() == [[[0] * 3]]


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert values(data)[0, 0].tolist() == [255, 0, 0] or values(data)[0, 0].tolist() == [254, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_files_that_are_cut_off_are_skipped_with_the_reason(kind):
    noise = torch.randint(256, (40, 40, 3), dtype=torch.uint8).numpy()
    data = encoded(Image.fromarray(noise), kind)
    assert values(data).shape == (40, 40, 3)
    for keep in (0, 10, len(data) // 2):
        with pytest.raises(SkipSample, match=r"not a whole image: .+"):
            decode_image(data[:keep])


def test_what_is_no_image_is_skipped():
    for data in (b"", b"hello", b"\x89PNG\r\n\x1a\n" + bytes(50)):
        with pytest.raises(SkipSample, match="not a whole image"):
            decode_image(data)
        with pytest.raises(SkipSample, match="not a whole image"):
            size_of_image(data)


def test_an_image_that_would_fill_the_memory_is_skipped():
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 99))
    with pytest.raises(SkipSample, match="decompression bomb"):
        decode_image(data)


def test_floating_point_images_are_skipped():
    with pytest.raises(SkipSample, match="floating point pixels"):
        decode_image(encoded(Image.new("F", (2, 2)), "TIFF"))


# sizes


@pytest.mark.parametrize("size", [(10, 30), (30, 10), (8, 8), (3, 5), (1, 400)])
def test_every_image_gets_a_fixed_size(size):
    image = Image.new("RGB", (size[1], size[0]), "red")
    assert fit(image, FixedSize(8, 6)(size)).size == (6, 8)


def test_an_image_is_cropped_around_its_centre():
    stripes = numpy.zeros((2, 6), dtype=numpy.uint8)
    stripes[:, 2:4] = 200
    assert numpy.array(fit(Image.fromarray(stripes), (2, 2))).tolist() == [[200, 200]] * 2


def test_making_an_image_smaller_averages():
    checks = numpy.indices((64, 64)).sum(0) % 2 * 200
    small = numpy.array(fit(Image.fromarray(checks.astype(numpy.uint8)), (8, 8)))
    assert abs(small.astype(int) - 100).max() <= 5


def test_an_image_of_the_right_size_is_left_alone():
    image = Image.fromarray(colours())
    assert fit(image, (2, 3)) is image


def test_buckets_have_about_the_same_area_and_fit_the_patch():
    buckets = BucketedSize(area=256 * 256, multiple=16, max_aspect=2)
    assert (256, 256) in buckets.sizes
    assert len(set(buckets.sizes)) == 9
    for height, width in buckets.sizes:
        assert height % 16 == width % 16 == 0
        assert abs(height * width / 256**2 - 1) < 0.05
        assert 0.5 <= height / width <= 2
    assert sorted(buckets.sizes) == sorted((w, h) for h, w in buckets.sizes)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((500, 500), (256, 256)), ((64, 64), (256, 256)), ((10, 1000), (176, 368)), ((1000, 10), (368, 176))],
)
def test_an_image_goes_into_the_bucket_of_its_aspect(size, bucket):
    buckets = BucketedSize(area=256 * 256, multiple=16, max_aspect=2.1)
    chosen = buckets(size)
    assert abs(chosen[0] / chosen[1] - bucket[0] / bucket[1]) < 0.12


def test_buckets_that_do_not_exist():
    with pytest.raises(ValueError, match="no size of about 10 pixels has sides that are multiples of 16"):
        BucketedSize(area=10, multiple=16)


def test_native_sizes_are_kept_within_limits():
    native = NativeSize(multiple=8, min_area=32 * 32, max_area=64 * 64)
    assert native((40, 48)) == (40, 48)
    assert native((47, 55)) == (40, 48)
    assert native((8, 8)) == (32, 32)
    assert native((640, 640)) == (64, 64)
    assert native((2000, 500)) == (128, 32)
    assert native((1, 4000))[0] == 8
    with pytest.raises(ValueError, match="multiple² <= min_area <= max_area, got 8², 10, 64"):
        NativeSize(8, 10, 64)


# tensors


@pytest.mark.parametrize("size", [6, FixedSize(4, 6), BucketedSize(24, 2), NativeSize(2, 16, 40)])
@pytest.mark.parametrize("options", [dict(), dict(mode="L"), dict(patch_size=2), dict(channels_first=True)])
def test_the_shape_is_known_from_the_size(size, options):
    reader = ImageReader(size, **options)
    for height, width in ((5, 9), (10, 3), (6, 6)):
        image = Image.fromarray(torch.randint(256, (height, width, 3), dtype=torch.uint8).numpy())
        pixels = reader(encoded(image))
        assert tuple(pixels.shape) == reader.shape_of((height, width))
        assert -1 <= pixels.min() <= pixels.max() <= 1


def test_pixels_go_from_minus_one_to_one():
    image = Image.fromarray(numpy.array([[[0, 51, 255]]], dtype=numpy.uint8))
    assert torch.allclose(to_pixels(image), torch.tensor([[[-1, -0.6, 1]]]))
    assert torch.equal(ImageReader(1, channels_first=True)(encoded(image)), to_pixels(image).movedim(-1, 0))


def test_patches_of_a_reader_are_those_of_patchify():
    image = Image.fromarray(torch.randint(256, (4, 6, 3), dtype=torch.uint8).numpy())
    pixels = to_pixels(image).movedim(-1, 0)
    patches = ImageReader(FixedSize(4, 6), patch_size=2)(encoded(image))
    assert torch.equal(patches, patchify(pixels, 2))
    assert torch.equal(unpatchify(patches, 2), pixels)


def test_patches_must_divide_the_image():
    with pytest.raises(ValueError, match="patches of 4x4 do not divide images of 6x6; set the multiple"):
        ImageReader(6, patch_size=4)(encoded(Image.new("RGB", (9, 9))))
    with pytest.raises(ValueError, match="patches have their channels last"):
        ImageReader(6, patch_size=2, channels_first=True)


def test_without_pillow_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r'need PIL here.*transfusion-pytorch\[data\]"'):
        decode_image(b"")


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (1, 20), (3, 3), (5000, 3000)])
def test_native_sizes_stay_within_their_area(size):
    height, width = NativeSize(4, 16, 1024)(size)
    assert height * width <= 1024
    assert min(height, width) >= 4
    assert height % 4 == width % 4 == 0
    if size == (1, 2000):
        assert (height, width) == (4, 256)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(dict(size=8, mode="rgb"), 'mode is "RGB" or "L", got \'rgb\'', marks=no_typecheck),
        (dict(size=0), "size is at least 1 pixel, got 0"),
        (dict(size=8, patch_size=0), "patch_size is at least 1 pixel, got 0"),
    ],
)
def test_readers_that_read_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ImageReader(**options)
