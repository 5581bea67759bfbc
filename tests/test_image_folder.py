"""Reading a folder tree: every pixel mode has its value, every entry is read or named."""

import contextlib
import io
import os
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import types
import unicodedata
import warnings
import zlib
from pathlib import Path

import image_folder
from arguments import RunError
from image_folder import read_image, read_tree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageSequence, __version__, features

PILLOW = int(__version__.split(".")[0])
WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)
RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)  # black to white
NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
SHORT = settings(derandomize=True, deadline=None, max_examples=25)


def kind_of(value):
    """The name of a case: pytest would take all bytes of a file."""
    return type(value).__name__


def encoded(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png(width, bits, color_type, row, *chunks):
    """One row of pixels as a PNG, chunk by chunk, for what Pillow reads but does not write."""
    header = struct.pack(">IIBBBBB", width, 1, bits, color_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    body = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def tiff(width, bits, data, photometric=1, sample_format=1, order="<"):
    """One row of gray pixels as a TIFF, tag by tag."""
    tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1),
            (278, 1), (279, len(data)), (339, sample_format)]
    data += b"\0" * (len(data) % 2)
    entries = b"".join(struct.pack(order + "HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(data))
    return start + data + struct.pack(order + "H", len(tags)) + entries + b"\0\0\0\0"


def read(data, tmp_path, size=32):
    path = tmp_path / "image"  # no suffix: the content decides
    path.write_bytes(data)
    return read_image(path, size)


def row(data, tmp_path, width):
    """The first `width` pixels of an image of one row that is `width` pixels wide."""
    image = Image.open(io.BytesIO(data))
    assert image.size == (width, 1)
    path = tmp_path / "image"
    path.write_bytes(data)
    return read_image(path, width)[0].tolist()  # bilinear from one row: every row is this one


def make_tree(top, files, content=None):
    """Writes files, by path below `top`, whose color is the position in `files`; returns `top`."""
    for position, name in enumerate(files):
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        color = (position % 256, position // 256, 7)
        path.write_bytes(content or encoded(Image.new("RGB", (2, 2), color), "PPM"))
    return top


def small_tree(top):
    return make_tree(top, [f"{split}/{name}/{i}.ppm" for split in ("train", "test")
                           for name in ("ant", "bee") for i in range(2)])


def error_of(top):
    """The one sentence that the tree ends in."""
    with pytest.raises(RunError) as caught:
        read_tree(top)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- pixels -------------------------------------------------------------------------------------


def pgm(top):
    values = RAMP.astype(np.int64) * top // 65535
    return b"P5 256 256 %d\n" % top + values.astype(">u2").tobytes()


def big_endian(**options):
    image = Image.frombytes("I;16B", (256, 256), RAMP.astype(">u2").tobytes())
    return encoded(image, "TIFF", **options)


GRAY16 = {
    "png": lambda: encoded(Image.fromarray(RAMP), "PNG"),
    "tiff": lambda: encoded(Image.fromarray(RAMP), "TIFF"),
    "tiff lzw": lambda: encoded(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw"),
    "tiff big endian": big_endian,
    "tiff big endian lzw": lambda: big_endian(compression="tiff_lzw"),
    "pgm": lambda: pgm(65535),
    "pgm of 12 bits": lambda: pgm(4095),
    "jpeg 2000": lambda: encoded(Image.fromarray(RAMP), "JPEG2000"),
}


@pytest.mark.parametrize("name", GRAY16)
def test_a_16_bit_ramp_from_black_to_white_stays_one(name, tmp_path):
    pixels = read(GRAY16[name](), tmp_path, 256)
    assert pixels.mean() == pytest.approx(127.5, abs=0.1)
    step = 1 if "12" in name else 0.5  # 4096 levels are off by one rounding more
    assert np.abs(pixels - (RAMP / 257)[:, :, None]).max() <= step


@pytest.mark.parametrize(("data", "expected"), ids=kind_of, argvalues=[
    (tiff(4, 12, bytes.fromhex("0008007fffff")), [0, 128, 127, 255]),
    (tiff(3, 16, struct.pack("<3H", 0, 257 * 100, 65535), photometric=0), [255, 155, 0]),
    (tiff(3, 16, struct.pack(">3H", 0, 257 * 100, 65535), order=">"), [0, 100, 255]),
    (tiff(3, 8, bytes([0, 100, 255]), photometric=0), [255, 155, 0]),
    (png(3, 16, 0, struct.pack(">3H", 128, 129, 65535)), [0, 1, 255]),  # 128/257 is below a half
    (png(2, 16, 2, struct.pack(">6H", 0, 25700, 65535, 65535, 0, 0)), [[0, 100, 255], RED]),
    (png(2, 16, 4, struct.pack(">4H", 0, 65535, 0, 32896)), [0, 127]),
    (png(4, 2, 0, bytes([0b00011011])), [0, 85, 170, 255]),
    (png(8, 1, 0, bytes([0b00001111])), [0, 0, 0, 0, 255, 255, 255, 255]),
])
def test_bits_and_polarity(data, expected, tmp_path):
    pixels = row(data, tmp_path, len(expected))
    assert pixels == [[v] * 3 if isinstance(v, int) else list(v) for v in expected]


@pytest.mark.parametrize(("data", "expected"), ids=kind_of, argvalues=[
    (png(4, 2, 0, bytes([0b00011011]), (b"tRNS", b"\0\1")), [0, 255, 170, 255]),
    (png(2, 4, 0, bytes([0x35]), (b"tRNS", b"\0\3")), [255, 85]),
    (png(8, 1, 0, bytes([0b00001111]), (b"tRNS", b"\0\0")), [255] * 8),
    (png(3, 8, 0, bytes([7, 8, 9]), (b"tRNS", b"\0\x08")), [7, 255, 9]),
    (png(2, 16, 0, struct.pack(">2H", 2570, 2571), (b"tRNS", struct.pack(">H", 2570))), [255, 10]),
    (png(2, 8, 2, bytes([1, 2, 3, 1, 2, 4]), (b"tRNS", struct.pack(">3H", 1, 2, 3))),
     [WHITE, (1, 2, 4)]),
    (png(2, 8, 3, bytes([0, 1]), (b"PLTE", bytes([*RED, *BLUE])), (b"tRNS", b"\0")), [WHITE, BLUE]),
    (png(2, 8, 3, bytes([0, 1]), (b"PLTE", bytes([*RED, *BLUE])), (b"tRNS", bytes([255, 51]))),
     [RED, (204, 204, 255)]),
])
def test_a_color_declared_transparent_shows_the_background(data, expected, tmp_path):
    pixels = row(data, tmp_path, len(expected))
    assert pixels == [[v] * 3 if isinstance(v, int) else list(v) for v in expected]


def premultiplied(mode, color):
    """A TIFF whose tag "extra samples" says that its alpha is multiplied in already."""
    data = encoded(Image.new(mode, (32, 32), color), "TIFF")
    alpha, associated = (struct.pack("<HHIHH", 338, 3, 1, kind, 0) for kind in (2, 1))
    assert data.count(alpha) == 1
    return data.replace(alpha, associated)


def palette_with_alpha():
    image = Image.merge("PA", [Image.new("L", (32, 32), 1), Image.new("L", (32, 32), 51)])
    image.putpalette([*WHITE, *RED])
    return encoded(image, "TIFF")


def transparent_gif():
    image = Image.new("P", (32, 32), 1)
    image.putpalette([*RED, 0, 0, 0])
    return encoded(image, "GIF", transparency=1)


ALPHA = {  # black of alpha 51, a fifth, on white is 204; of alpha 0, white
    "RGBA": (lambda: encoded(Image.new("RGBA", (32, 32), (0, 0, 0, 51)), "PNG"), (204, 204, 204)),
    "RGBA color": (lambda: encoded(Image.new("RGBA", (32, 32), (255, 0, 100, 51)), "TGA"),
                   (255, 204, 224)),
    "LA": (lambda: encoded(Image.new("LA", (32, 32), (0, 51)), "PNG"), (204, 204, 204)),
    "La": (lambda: premultiplied("LA", (20, 51)), (224, 224, 224)),  # 20 + 204
    "RGBa": (lambda: premultiplied("RGBA", (51, 20, 0, 51)), (255, 224, 204)),
    "PA": (palette_with_alpha, (255, 204, 204)),
    "gif": (transparent_gif, WHITE),
    "webp": (lambda: encoded(Image.new("RGBA", (32, 32), (0, 0, 0, 0)), "WEBP"), WHITE),
}


def bitmap(pixel):
    """A BMP of one BGRA pixel whose header says where each of the four bytes is."""
    masks = 0xFF0000, 0xFF00, 0xFF, 0xFF000000
    header = struct.pack("<IiiHHIIiiII4I", 56, 1, 1, 1, 32, 3, 4, 0, 0, 0, 0, *masks)
    return b"BM" + struct.pack("<IHHI", 74, 0, 0, 70) + header + bytes(pixel)


@pytest.mark.parametrize(("alpha", "expected"), [(0, [10, 20, 30]), (51, [206, 208, 210])])
def test_the_fourth_byte_of_a_bitmap_is_alpha_if_it_is_used(alpha, expected, tmp_path):
    assert row(bitmap([30, 20, 10, alpha]), tmp_path, 1) == [expected]  # a fifth, on white


def test_a_fourth_byte_that_is_not_used_is_no_alpha(tmp_path):
    image = Image.new("RGBA", (32, 32), (10, 20, 30, 0))
    assert (read(encoded(image, "TGA"), tmp_path) == (10, 20, 30)).all()
    image.putpixel((0, 0), (10, 20, 30, 255))  # used, by one pixel
    pixels = read(encoded(image, "TGA"), tmp_path)
    assert pixels[0, 0].tolist() == [10, 20, 30]
    assert (pixels[1:] == 255).all()


@pytest.mark.parametrize("name", ALPHA)
def test_alpha_is_composited_on_white(name, tmp_path):
    if name == "La" and PILLOW < 13:
        pytest.skip("Pillow reads it since version 13")
    data, expected = ALPHA[name]
    pixels = read(data(), tmp_path)
    assert np.abs(pixels.astype(int) - expected).max() <= 1  # premultiplied: two roundings


def test_alpha_is_composited_before_resizing(tmp_path):
    """Hidden colors must not bleed: the transparent half is red, and no pixel may be reddish."""
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, :30] = (*RED, 0)
    pixels[:, 30:] = (0, 0, 0, 255)
    result = read(encoded(Image.fromarray(pixels), "PNG"), tmp_path)
    assert (result == result[:, :, :1]).all()


COLORS = {
    "CMYK": ("CMYK", (51, 102, 153, 64), "TIFF", (153, 115, 76)),  # (255 - c)(255 - k) / 255
    "CMYK in an Adobe JPEG": ("CMYK", (0, 255, 255, 0), "JPEG", RED),  # stored inverted
    "YCbCr": ("YCbCr", (81, 90, 240), "TIFF", (238, 14, 14)),  # 81 + 1.402 * 112; 81 - ...
    "Lab": ("LAB", (138, 81 + 128, 70 + 128), "TIFF", RED),  # sRGB's red is 54.29 80.81 69.89
    "Lab gray": ("LAB", (136, 128, 128), "TIFF", (127, 127, 127)),  # L* 53.4 is 0.2129 of white
    "RGBX": ("RGBX", (10, 20, 30, 0), "TIFF", (10, 20, 30)),  # the fourth band is no alpha
    "bilevel": ("1", 1, "TIFF", WHITE),
    "gray": ("L", 100, "BMP", (100, 100, 100)),
}


@pytest.mark.parametrize("name", COLORS)
def test_color_modes_have_the_value_of_their_formula(name, tmp_path):
    if name == "YCbCr" and PILLOW < 13:
        pytest.skip("Pillow reads it, uncompressed, since version 13")
    mode, color, file_format, expected = COLORS[name]
    pixels = read(encoded(Image.new(mode, (32, 32), color), file_format), tmp_path)
    tolerance = 5 if mode == "LAB" else 1  # stored in whole units of L*, a*, b*
    assert np.abs(pixels.astype(int) - expected).max() <= tolerance


UPRIGHT = {2: NOISE[:, ::-1], 3: NOISE[::-1, ::-1], 4: NOISE[::-1], 5: NOISE.swapaxes(0, 1),
           6: np.rot90(NOISE, -1), 7: np.rot90(NOISE, 2).swapaxes(0, 1), 8: np.rot90(NOISE)}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied_once_in_every_format(orientation, tmp_path):
    exif = Image.Exif()
    exif[274] = orientation
    for file_format, options in (("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}),
                                 ("WEBP", {"lossless": True})):
        data = encoded(Image.fromarray(NOISE), file_format, exif=exif, **options)
        np.testing.assert_array_equal(read(data, tmp_path), UPRIGHT[orientation], file_format)
    left = Image.new("RGB", (32, 32), RED)
    left.paste(BLUE, (0, 0, 16, 8))
    expected = read(encoded(left, "JPEG", quality=95), tmp_path)
    rotated = {6: np.rot90(expected, -1), 8: np.rot90(expected), 3: np.rot90(expected, 2)}
    if orientation in rotated:
        jpeg = read(encoded(left, "JPEG", quality=95, exif=exif), tmp_path)
        np.testing.assert_array_equal(jpeg, rotated[orientation])


def test_exif_orientation_of_16_bit_gray_and_of_alpha(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    gray = read(encoded(Image.fromarray(RAMP), "PNG", exif=exif), tmp_path, 256)
    np.testing.assert_array_equal(gray[..., 0], np.rot90(np.round(RAMP / 257), -1))
    half = Image.new("RGBA", (32, 32), (0, 0, 0, 255))
    half.paste((0, 0, 0, 0), (0, 0, 32, 16))
    pixels = read(encoded(half, "PNG", exif=exif), tmp_path)
    assert pixels[0, :, 0].tolist() == [0] * 16 + [255] * 16  # the top is now on the right


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(file_format, tmp_path):
    frames = [Image.new("RGB", (32, 32), color) for color in (RED, BLUE)]
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], duration=40)
    assert len(list(ImageSequence.Iterator(Image.open(io.BytesIO(data))))) == 2
    assert np.abs(read(data, tmp_path).astype(int) - RED).max() <= 2  # WebP is lossy


def fits(bits, data):
    cards = ["SIMPLE  = T", f"BITPIX  = {bits}", "NAXIS   = 2", "NAXIS1  = 2", "NAXIS2  = 1", "END"]
    return "".join(card.ljust(80) for card in cards).ljust(2880).encode() + data.ljust(2880, b"\0")


PAGES = [Image.new("L", (32, 32), gray) for gray in (0, 255)]
PCX = encoded(PAGES[0], "PCX")


@pytest.mark.parametrize(("data", "reason"), ids=kind_of, argvalues=[
    (encoded(Image.new("F", (32, 32), 0.5), "TIFF"), "mode F in TIFF"),
    (encoded(Image.new("I", (32, 32), 70000), "TIFF"), "mode I in TIFF"),
    (b"Pf 2 1 -1.0\n" + struct.pack("<2f", 0, 1), "mode F in PPM"),
    (tiff(2, 16, struct.pack("<2h", -1, 1), sample_format=2), "mode I in TIFF"),
    (tiff(2, 8, struct.pack("2b", -1, 1), sample_format=2), "signed mode L in TIFF"),
    (fits(16, struct.pack(">2h", -1, 1)), "mode I;16 in FITS"),
    (png(1, 16, 2, bytes([1, 2, 3, 4, 5, 6]), (b"tRNS", bytes([1, 2, 3, 4, 5, 6]))), "16-bit RGB"),
    (encoded(PAGES[0], "TIFF", save_all=True, append_images=PAGES[1:]), "2 pages"),
    (struct.pack("<4I", 0x3ADE68B1, 16, 16 + len(PCX), 0) + 2 * PCX, "2 pages"),  # DCX
])
def test_pixels_without_a_certain_value_are_refused_with_a_reason(data, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        read(data, tmp_path)
    small_tree(tmp_path)
    (tmp_path / "train/ant/odd").write_bytes(data)
    assert reason in error_of(tmp_path)
    assert "train/ant/odd" in error_of(tmp_path)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "BMP"])
@pytest.mark.parametrize("side", [32, 20, 61])
def test_plain_images_are_what_one_bilinear_resize_makes_them(file_format, side, tmp_path):
    data = encoded(Image.fromarray(NOISE).resize((side, side + 3)), file_format)
    image = Image.open(io.BytesIO(data))
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
    result = read(data, tmp_path)
    assert (result.dtype, result.shape) == (np.uint8, (32, 32, 3))
    np.testing.assert_array_equal(result, expected)


def test_an_image_of_the_right_size_is_not_touched(tmp_path):
    data = encoded(Image.fromarray(NOISE), "PNG")
    np.testing.assert_array_equal(read(data, tmp_path), NOISE)
    files = ["train/bee/1", "test/ant/1", "test/bee/1"]
    files += [f"train/ant/{i}" for i in range(image_folder.CHUNK - 2)]  # one more than a chunk
    tree = read_tree(make_tree(tmp_path, files, data))
    for channel in range(3):
        for images in (tree.train_images, tree.test_images):
            assert (images[:, channel] == NOISE[:, :, channel]).all()


# ---- what is read -------------------------------------------------------------------------------


def test_subfolders_are_read_and_files_sorted_by_their_path_as_text(tmp_path):
    names = ["a.ppm", "a/b.ppm", "a-b.ppm", "B.ppm", "a/b/c.ppm", "é.ppm", "z.ppm", "a0.ppm"]
    files = [f"train/ant/{n}" for n in names] + ["train/bee/x.ppm", "test/ant/y", "test/bee/z"]
    tree = read_tree(make_tree(tmp_path, files))
    in_order = ["B.ppm", "a-b.ppm", "a.ppm", "a/b.ppm", "a/b/c.ppm", "a0.ppm", "z.ppm", "é.ppm"]
    assert tree.train_images[:, 0, 0, 0].tolist() == [*(names.index(n) for n in in_order), 8]
    assert tree.train_labels.tolist() == [0] * 8 + [1]
    assert tree.classes == ("ant", "bee")
    assert (tree.train_labels.dtype, tree.test_labels.dtype) == (np.int64, np.int64)
    assert tree.test_images.shape == (2, 3, 32, 32)
    assert tree.test_images[:, 2].max() == 7  # the third channel


NAMES = st.text("aZé0-_ 界", min_size=1, max_size=3).filter(str.strip)
PATHS = st.tuples(NAMES, st.lists(NAMES, max_size=2), NAMES).map(
    lambda t: "/".join([t[0], *t[1], t[2] + ".ppm"]))


@SHORT
@given(st.lists(PATHS, min_size=1, max_size=12, unique=True), st.booleans())
def test_any_tree_is_read_whole_in_the_order_of_its_paths(paths, nfd):
    classes = sorted({path.split("/")[0] for path in paths} | {"x", "y"})
    every = paths + [f"{name}/extra.ppm" for name in classes]
    form = "NFD" if nfd else "NFC"
    train = [unicodedata.normalize(form, f"train/{path}") for path in every]
    with tempfile.TemporaryDirectory() as folder:
        top = make_tree(Path(folder), train)
        make_tree(top, [f"test/{name}/one.ppm" for name in classes])
        tree = read_tree(top)
    expected = [(c, p[len(c) + 1:], every.index(p)) for c in classes
                for p in every if p.startswith(c + "/")]
    expected.sort()
    assert tree.classes == tuple(classes)
    assert tree.train_images[:, 0, 0, 0].tolist() == [position for _, _, position in expected]
    assert [tree.classes[label] for label in tree.train_labels] == [c for c, _, _ in expected]
    assert tree.test_labels.tolist() == list(range(len(classes)))


def test_hidden_entries_are_left_out_wherever_they_are(tmp_path):
    small_tree(tmp_path)
    for name in (".git/x", ".DS_Store", "ant/.DS_Store", "ant/.thumbs/x.png", "bee/a/.hidden"):
        make_tree(tmp_path / "train", [name], b"no image")
    assert len(read_tree(tmp_path).train_images) == 4


class WithAttributes:
    """An entry as Windows' os.scandir gives it: its stat() has attributes."""

    def __init__(self, entry):
        self.entry = entry
        self.name, self.path = entry.name, entry.path
        self.is_dir, self.is_file, self.is_symlink = entry.is_dir, entry.is_file, entry.is_symlink

    def stat(self, follow_symlinks=True):
        hidden = stat.FILE_ATTRIBUTE_HIDDEN | stat.FILE_ATTRIBUTE_SYSTEM
        attributes = hidden if self.name.endswith((".db", ".ini")) else stat.FILE_ATTRIBUTE_ARCHIVE
        return types.SimpleNamespace(st_file_attributes=attributes)


def test_what_windows_hides_is_left_out(tmp_path, monkeypatch):
    """Its Explorer writes Thumbs.db and desktop.ini into folders of images, and shows neither."""
    small_tree(tmp_path)
    for name in ("Thumbs.db", "desktop.ini", "ant/Thumbs.db", "bee/desktop.ini"):
        make_tree(tmp_path / "train", [name], b"no image")

    @contextlib.contextmanager
    def scandir(folder):
        with honest(folder) as entries:
            yield [WithAttributes(entry) for entry in entries]

    honest = os.scandir
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        patch.setattr(sys, "platform", "win32")
        assert len(read_tree(tmp_path).train_images) == 4
    with pytest.raises(RunError, match="Thumbs.db"):  # elsewhere nothing hides them
        read_tree(tmp_path)


def test_links_to_files_and_folders_are_followed(tmp_path):
    small_tree(tmp_path / "data")
    make_tree(tmp_path / "store", ["more/deep/1.ppm", "2.ppm", "wasp/3.ppm"])
    (tmp_path / "data/train/ant/more").symlink_to(tmp_path / "store/more")
    (tmp_path / "data/train/ant/2.ppm").symlink_to(tmp_path / "store/2.ppm")
    for split in ("train", "test"):
        (tmp_path / "data" / split / "wasp").symlink_to(tmp_path / "store/wasp")
    tree = read_tree(tmp_path / "data")
    assert tree.classes == ("ant", "bee", "wasp")
    assert np.bincount(tree.train_labels).tolist() == [4, 2, 1]


def test_a_class_is_one_in_both_unicode_forms(tmp_path):
    nfc, nfd = "caf\xe9", "cafe\u0301"
    ligature = "\ufb01"  # which is not "fi" in these forms
    files = [f"train/{nfc}/1", f"train/{ligature}/1", f"test/{nfd}/1", f"test/{ligature}/1"]
    tree = read_tree(make_tree(tmp_path, files))
    assert tree.classes == (nfc, ligature)
    make_tree(tmp_path, [f"test/{nfc}/2"])
    assert "same name" in error_of(tmp_path)
    assert "caf\\xe9" in error_of(tmp_path)  # escaped: the two forms look the same


def test_a_second_call_sees_what_changed_and_nothing_is_written(tmp_path):
    small_tree(tmp_path)

    def listing():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    before = listing()
    assert read_tree(tmp_path).train_images[0, 0, 0, 0] == 0
    assert listing() == before
    (tmp_path / "train/ant/0.ppm").write_bytes(encoded(Image.new("RGB", (2, 2), (99, 0, 0)), "PPM"))
    assert read_tree(tmp_path).train_images[0, 0, 0, 0] == 99


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(("link", "target"), [
    ("train/ant/odd", "nowhere"), ("train/ant/odd", "train/ant/odd"), ("train/ant/odd", "/"),
    ("train/ant/odd", "train/ant"), ("train/ant/odd", "train/ant/in"),
    ("train/ant/in/odd", "train"), ("train/ant/odd", "/dev/zero")])
def test_a_link_to_no_file_or_to_what_is_read_already_is_named(link, target, tmp_path):
    small_tree(tmp_path)
    (tmp_path / "train/ant/in").mkdir()
    (tmp_path / link).symlink_to(tmp_path / target)
    assert "odd (" in error_of(tmp_path)


def unix_socket(name):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(name)


def text_file(name):
    Path(name).write_bytes(b"label,class")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes and sockets among its files")
@pytest.mark.parametrize(("folder", "make"), [
    ("train/ant", os.mkfifo), ("test", os.mkfifo), ("train/ant", unix_socket), ("train", text_file),
    ("test", text_file)])
def test_an_entry_that_cannot_be_read_is_named_and_does_not_block(folder, make, tmp_path,
                                                                  monkeypatch):
    monkeypatch.chdir(small_tree(tmp_path) / folder)  # the path of a socket may not be long
    make("odd")
    assert "odd (" in error_of(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="this system takes only names that are text")
@pytest.mark.parametrize("name", [b"train/caf\xe9/x", b"test/ant/\xff", b"test/a\x7f/x",
                                  b"train/ant/a\nb/x", b"train/ant/ ", b"train/\x1b[31m/x",
                                  b"train/bee/\xed\xb3\xa9.png", "test/a/b\u2028".encode(),
                                  "test/a/b\u2029".encode()])
def test_names_that_are_no_text_are_refused_before_anything_is_decoded(name, tmp_path, monkeypatch):
    top = small_tree(tmp_path)
    path = os.path.join(os.fsencode(top), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(encoded(Image.new("L", (2, 2)), "PPM"))
    monkeypatch.setattr(Image, "open", None)
    message = error_of(top)
    assert "not UTF-8 text" in message
    assert all(32 <= ord(character) < 127 for character in message)  # any locale prints it


@pytest.mark.skipif(sys.platform != "linux", reason="this system takes only names that are text")
def test_a_data_folder_whose_name_is_no_text_is_refused(tmp_path, monkeypatch):
    top = small_tree(Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"caf\xe9"))))
    assert "udce9" in error_of(top)
    monkeypatch.chdir(top)
    assert "its name is not UTF-8 text" in error_of(".")


def test_all_odd_entries_are_in_one_sentence_with_the_count(tmp_path):
    small_tree(tmp_path)
    for i in range(11):
        (tmp_path / f"test/stray{i:02}").write_bytes(b"")
    message = error_of(tmp_path)
    assert [f"stray{i:02} (" in message for i in range(11)] == [True] * 10 + [False]
    assert "and 1 more" in message


def test_every_bad_file_of_both_splits_is_in_one_sentence(tmp_path):
    small_tree(tmp_path)
    good = encoded(Image.fromarray(NOISE), "JPEG")
    for name, data in (("train/ant/empty.png", b""), ("train/ant/text.jpg", b"hello, world"),
                       ("train/bee/cut.jpg", good[: len(good) // 2]),
                       ("test/bee/float.tif", encoded(Image.new("F", (2, 2)), "TIFF"))):
        (tmp_path / name).write_bytes(data)
    message = error_of(tmp_path)
    assert message.startswith("4 files are not images")
    for part in ("empty.png (no image format", "text.jpg (no image format",
                 "cut.jpg (image file is truncated", "float.tif (mode F in TIFF has no known"):
        assert part in message
    make_tree(tmp_path, [f"train/ant/bad{i:02}" for i in range(15)], b"x")
    message = error_of(tmp_path)
    assert message.startswith("19 files are not images")
    assert "bad09" in message
    assert "bad10" not in message
    assert "and 9 more" in message


class PluginError(Exception):
    """What only one decoder knows."""


@pytest.mark.parametrize("error", [
    struct.error("unpack requires 4 bytes"), SyntaxError("not a PNG"), EOFError(), KeyError(273),
    Image.DecompressionBombError("too many pixels"), PluginError("first line\nsecond"),
    ZeroDivisionError("division"), AssertionError(), RecursionError("deep"),
    PermissionError(13, "Permission denied"), OSError(5, "Input/output error"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), TypeError("\x1b[31mred")])
def test_any_exception_of_a_decoder_becomes_the_sentence(error, tmp_path, monkeypatch):
    small_tree(tmp_path)
    right = Image.open

    def fails(path):
        if str(path).endswith("bee/1.ppm"):
            raise error
        return right(path)

    monkeypatch.setattr(Image, "open", fails)
    message = error_of(tmp_path)
    assert message.isprintable()
    assert message.count("bee/1.ppm (") == 2  # of train and of test


@pytest.mark.parametrize("where", ["image", "array"])
def test_lack_of_memory_is_a_sentence_with_a_way_out(where, tmp_path, monkeypatch):
    small_tree(tmp_path)

    def fails(*_, **__):
        raise MemoryError

    if where == "image":
        monkeypatch.setattr(Image, "open", fails)
    else:
        monkeypatch.setattr(image_folder.np, "empty", fails)
    message = error_of(tmp_path)
    assert "out of memory" in message
    assert "smaller" in message


def test_an_interrupt_stays_one(tmp_path, monkeypatch):
    def interrupts(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image, "open", interrupts)
    with pytest.raises(KeyboardInterrupt):
        read_tree(small_tree(tmp_path))


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    small_tree(tmp_path)
    make_tree(tmp_path, ["train/bee/private/x.ppm"])
    right = os.scandir

    def scandir(path):
        if str(path).endswith("private"):
            raise PermissionError(13, "Permission denied", path)
        return right(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert "train/bee/private (Permission denied)" in error_of(tmp_path)


CODECS = {"PNG": "zlib", "TIFF": "libtiff", "WEBP": "webp", "AVIF": "avif", "JPEG": "jpg",
          "JPEG2000": "jpg_2000", "GIF": None, "BMP": None, "ICO": None}


@pytest.mark.parametrize("file_format", CODECS)
def test_a_file_cut_in_half_is_named(file_format, tmp_path):
    if CODECS[file_format] and not features.check(CODECS[file_format]):
        pytest.skip(f"this Pillow has no {file_format}")
    data = encoded(Image.fromarray(NOISE), file_format)
    small_tree(tmp_path)
    (tmp_path / "test/ant/cut").write_bytes(data[: len(data) // 2])
    assert "test/ant/cut is not an image" in error_of(tmp_path)


@pytest.mark.parametrize(("file_format", "options"), [
    ("AVIF", {}), ("WEBP", {}), ("PNG", {}), ("JPEG2000", {}),
    ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "tiff_adobe_deflate"})])
def test_wiped_pixels_behind_a_good_header_are_named(file_format, options, tmp_path):
    if not features.check(CODECS[file_format]):
        pytest.skip(f"this Pillow has no {file_format}")
    data = bytearray(encoded(Image.fromarray(NOISE), file_format, **options))
    start = {"AVIF": data.find(b"mdat") + 4, "TIFF": 8}.get(file_format, 200)
    data[start : start + 700] = b"\xff" * 700
    Image.open(io.BytesIO(data))  # the header is still good
    small_tree(tmp_path)
    (tmp_path / "train/bee/wiped").write_bytes(data)
    assert "train/bee/wiped is not an image" in error_of(tmp_path)


@SHORT
@given(st.data())
def test_damaged_bytes_give_an_image_or_the_sentence(data):
    """Never another exception, a warning or a file name left out."""
    formats = [name for name in CODECS if not CODECS[name] or features.check(CODECS[name])]
    file_format = data.draw(st.sampled_from(formats))
    content = bytearray(encoded(Image.fromarray(NOISE[:8, :8]), file_format))
    changes = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255))
    for position, value in data.draw(st.lists(changes, min_size=1, max_size=8)):
        content[position] = value
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        small_tree(Path(folder))
        (Path(folder) / "train/ant/damaged").write_bytes(content)
        try:
            assert len(read_tree(Path(folder)).train_images) == 5
        except RunError as error:
            assert "train/ant/damaged is not an image" in str(error)


def test_a_very_large_image_is_read_without_a_warning_or_named(tmp_path, monkeypatch, capfd):
    small_tree(tmp_path)
    (tmp_path / "train/ant/0.ppm").write_bytes(encoded(Image.new("RGB", (30, 30), RED), "PNG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # 900 warn, above 1000 is an error
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert read_tree(tmp_path).train_images[0].max() == 255
    assert caught == []
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    assert "train/ant/0.ppm is not an image" in error_of(tmp_path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("files", "words"), [
    ([], ["train does not exist"]),
    (["train"], ["train is not a folder"]),
    (["train/a/1", "train/b/1"], ["test does not exist"]),
    (["train/a/1", "test/a/1"], ["at least two class folders", " a "]),
    (["train/a/1", "train/b/1", "test/a/1", "test/c/1"], ["b only in train", "c only in test"]),
    (["train/a/1", "train/b/.x", "test/a/1", "test/b/1"], ["train/b holds no image"]),
    (["train/a/1", "train/b/1", "test/a/1", "test/b/in/.x"], ["test/b holds no image"]),
    ([*(f"train/{i:02}/1" for i in range(15)), "test/00/1", "test/01/1"],
     ["02, 03, 04, 05, 06, 07, 08, 09, 10, 11 and 3 more only in train"]),
])
def test_another_form_of_tree_is_refused_by_name(files, words, tmp_path):
    message = error_of(make_tree(tmp_path, files))
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", ["nowhere", "a\0b", "loop", "\udce9", "x" * 300, "file"])
def test_a_data_folder_that_cannot_be_opened_is_one_sentence(name, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_bytes(b"")
    message = error_of(tmp_path / name)
    assert "does not exist" in message
    assert message.isprintable()


def test_reading_images_needs_no_torch():
    code = "import sys, image_folder; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(image_folder.__file__).parent)
