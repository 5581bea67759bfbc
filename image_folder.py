"""Reads a data set from image files, DIR/train/<class>/** and DIR/test/<class>/**.

Every file that is not hidden is read, or named in an error. Nothing is cached or written.
"""

import os
import stat
import sys
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from arguments import RunError

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

BACKGROUND = (255, 255, 255)  # white: what shows through where an image is transparent
NAMED = 10  # how many are named in one error; the others are counted
PLAIN_MODES = ("1", "L", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
ALPHA_MODES = ("LA", "La", "RGBA", "RGBa", "P", "PA")  # the colors of a palette may have alpha
GRAY16_MODES = ("I;16", "I;16B", "I;16L", "I;16N")
GRAY16_FORMATS = ("PNG", "PPM", "TIFF", "JPEG2000")  # here they mean 0 to 65535; FITS's are signed
CHUNK = 16  # images for one task of a thread
PAGED_FORMATS = ("TIFF", "DCX")  # their frames are pages, not an animation
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT = 258, 262, 339  # tags
NOT_TEXT = {"Cs", "Cc", "Zl", "Zp"}  # Unicode categories: surrogates, control, line separators


class Tree(NamedTuple):
    """A data set: images uint8 (N,3,size,size), labels int64 (N,), positions in `classes`."""

    classes: tuple[str, ...]
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


# ---- one image ----------------------------------------------------------------------------------


def read_image(path, size=32):
    """The image in a file: uint8 array (size,size,3), RGB.

    EXIF orientation is applied. Alpha, or a color that is declared transparent, is composited on
    BACKGROUND. 16-bit gray is divided by 257, rounded; Pillow itself drops the lower byte of
    16-bit color. An animation gives its first frame. Color profiles are not applied. Another size
    is resized last, bilinearly.
    Raises ValueError for what has no certain 8-bit value (pages; signed, 32-bit or float gray);
    any exception of Pillow's decoder passes through.
    """
    with Image.open(path) as image:
        if image.format in PAGED_FORMATS and image.n_frames > 1:
            raise ValueError(f"{image.n_frames} pages; save each as a file")
        transparent = _transparent_color(image)
        image.load()
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        rgb = _to_rgb(image, transparent)
    if orientation != 1:
        rgb.getexif()[ExifTags.Base.Orientation] = orientation
        rgb = ImageOps.exif_transpose(rgb)
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(rgb)


def _transparent_color(image):
    """What a gray or RGB image that is not loaded yet declares transparent, or None."""
    color = image.info.get("transparency")
    if color is None or image.format != "PNG":
        return color
    rawmode = image.tile[0][3]  # Pillow leaves this color in the file's bits
    if rawmode == "RGB;16B":
        raise ValueError("16-bit RGB with a transparent color; convert it to 8 bits")
    return color * {"L;2": 85, "L;4": 17}.get(rawmode, 1)


def _to_rgb(image, transparent):
    """A loaded image as 8-bit RGB of the same size."""
    tiff = image.tag_v2 if image.format == "TIFF" else {}
    signed = bool(tiff) and 2 in np.atleast_1d(tiff.get(TIFF_SAMPLE_FORMAT, 1))  # -1 reads as 255
    if image.mode in PLAIN_MODES and not signed:
        image.info.pop("transparency", None)  # convert() would look for it in vain, and warn
        rgb = image.convert("RGB")
        if transparent is None:
            return rgb
        pixels = np.array(rgb)
        pixels[(pixels == transparent).all(axis=-1)] = BACKGROUND
        return Image.fromarray(pixels)
    if image.mode in ALPHA_MODES:
        rgba = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        if image.format in ("BMP", "TGA") and rgba.getextrema()[3] == (0, 0):
            return rgba.convert("RGB")  # a fourth byte that the writer left unused
        white = Image.new("RGBA", rgba.size, BACKGROUND)
        return Image.alpha_composite(white, rgba).convert("RGB")
    gray16 = image.mode in GRAY16_MODES or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if gray16 and image.format in GRAY16_FORMATS:
        values = np.asarray(image).astype(np.int32)  # in this machine's byte order
        top = 2 ** tiff.get(TIFF_BITS, (16,))[0] - 1  # some TIFFs have 12 bits
        gray = ((values * 255 + top // 2) // top).astype(np.uint8)
        if tiff and tiff.get(TIFF_PHOTOMETRIC, 0) == 0:  # "white is zero"
            gray = 255 - gray
        if transparent is not None:
            gray[values == transparent] = BACKGROUND[0]
        return Image.fromarray(gray).convert("RGB")
    kind = f"{'signed ' if signed else ''}mode {image.mode} in {image.format}"
    raise ValueError(f"{kind} has no known range; convert it to 8 or 16 bits")


# ---- names and sentences ------------------------------------------------------------------------


def text_of(name):
    """A name on disk as Unicode NFC text, read as UTF-8 whatever the locale of this process."""
    text = os.fsencode(name).decode("utf-8", "surrogateescape")
    return unicodedata.normalize("NFC", text)


def _is_text(name):
    return bool(name.strip()) and NOT_TEXT.isdisjoint(map(unicodedata.category, name))


def _shown(text):
    """A path or a message as it can be printed: escaped if it is not text."""
    text = str(text)
    return text if _is_text(text) else ascii(text)


def _reason(error):
    """What an exception says, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "no image format that Pillow knows"
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return _shown(text.splitlines()[0][:120])


def _named(items, joint="; "):
    """The first items, and the count of the others."""
    others = len(items) - NAMED
    return joint.join(items[:NAMED]) + (f" and {others} more" if others > 0 else "")


# ---- the tree -----------------------------------------------------------------------------------


def read_tree(data_dir, size=32):
    """Reads DIR/train/<class>/** and DIR/test/<class>/** whole.

    data_dir: path of DIR.  size: side of the images, pixels.
    Returns a Tree. Classes are in the order of their names, the images of a class in that of
    their POSIX paths below the class folder; both compared as Unicode NFC text, by code point.
    Symbolic links are followed. A name that begins with a dot is hidden, with all below it, and
    on Windows what has that attribute, such as Explorer's Thumbs.db and desktop.ini.
    Raises RunError, one sentence, for another form of tree, names that are not text, entries that
    are neither file nor folder, files that read_image refuses (all of them), and lack of memory.
    """
    data_dir, problems = Path(data_dir), []
    train = _find_classes(data_dir, "train", problems)
    test = _find_classes(data_dir, "test", problems)
    name = text_of(os.path.basename(os.path.realpath(data_dir)))  # tables call the data set by it
    if name and not _is_text(name):
        problems.insert(0, f"{ascii(str(data_dir))} (its name is not UTF-8 text)")
    if problems:
        raise RunError(f"--dataset folder: {_named(problems)}; rename, move or remove what is "
                       "named here: only hidden files are left out")
    _check_classes(data_dir, train, test)
    classes = tuple(sorted(train))
    paths = [path for split in (train, test) for c in classes for path in split[c]]
    images = _read_images(paths, size)
    labels = np.arange(len(classes), dtype=np.int64)
    train_labels = np.repeat(labels, [len(train[c]) for c in classes])
    test_labels = np.repeat(labels, [len(test[c]) for c in classes])
    n = len(train_labels)
    return Tree(classes, images[:n], train_labels, images[n:], test_labels)


def _find_classes(data_dir, split, problems):
    """The sorted file paths of every class in DIR/split, by class name; adds to `problems`."""
    top, folders = data_dir / split, {}
    if not os.path.isdir(top):
        what = "is not a folder" if os.path.exists(top) else "does not exist"
        where = _shown(data_dir)
        raise RunError(f"--dataset folder: {_shown(top)} {what}; expected {where}/train/<class>/* "
                       f"and {where}/test/<class>/*; set --data-dir to the folder that holds "
                       "train and test")
    for entry in _entries(top, problems):
        kind, name = _kind(entry), text_of(entry.name)
        if kind == "file":
            problems.append(f"{_shown(entry.path)} (in no class folder)")
        elif kind != "folder":
            problems.append(f"{_shown(entry.path)} ({kind})")
        elif name in folders:
            problems.append(f"{ascii(entry.path)} (in Unicode NFC the same name as another)")
        else:
            folders[name] = entry.path
    return {name: _find_files(folder, problems) for name, folder in folders.items()}


def _find_files(folder, problems):
    """The paths of all files below a class folder, sorted; adds to `problems`."""
    found = []
    to_do = [(folder, "")]
    seen = {os.path.realpath(folder)}
    while to_do:
        here, above = to_do.pop()
        for entry in _entries(here, problems):
            kind, name = _kind(entry), above + text_of(entry.name)
            if kind == "file":
                found.append((name, entry.path))
            elif kind != "folder":
                problems.append(f"{_shown(entry.path)} ({kind})")
            elif _leads_back(entry.path, here, seen):
                problems.append(f"{_shown(entry.path)} (a link to what is read already)")
            else:
                to_do.append((entry.path, name + "/"))
    return [path for _, path in sorted(found)]


def _leads_back(folder, parent, seen):
    """Whether a folder is in `seen`, or above its parent (a link to /); if not, it is seen now."""
    real = os.path.realpath(folder)
    if real in seen or Path(real) in Path(os.path.realpath(parent)).parents:
        return True
    seen.add(real)
    return False


def _entries(folder, problems):
    """What a folder holds that is not hidden, by name; adds other names to `problems`."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        problems.append(f"{_shown(folder)} ({_reason(error)})")
        return []
    named = []
    for entry in entries:
        if _is_hidden(entry):
            continue
        if _is_text(text_of(entry.name)):
            named.append(entry)
        else:
            problems.append(f"{ascii(entry.path)} (its name is not UTF-8 text)")
    return named


def _is_hidden(entry):
    if sys.platform == "win32":  # where this costs no call
        attributes = entry.stat(follow_symlinks=False).st_file_attributes
        if attributes & stat.FILE_ATTRIBUTE_HIDDEN:
            return True
    return entry.name.startswith(".")


def _kind(entry):
    """ "folder", "file", or what else an entry is. Opens nothing: a pipe would block."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        entry.stat()  # raises if it is a link that leads nowhere
    except OSError as error:
        return f"a broken link: {_reason(error)}" if entry.is_symlink() else _reason(error)
    return "neither file nor folder"


def _check_classes(data_dir, train, test):
    """Raises RunError unless both have the same classes, at least two, and images of each."""
    where = f"--dataset folder: {_shown(data_dir)}"
    only = []
    for split, ours, theirs in (("train", train, test), ("test", test, train)):
        names = sorted(ours.keys() - theirs.keys())
        if names:
            only.append(f"{_named(names, ', ')} only in {split}")
    if only:
        raise RunError(f"{where} has the class folders {' and '.join(only)}; expected the same in "
                       "train and test; add, rename or remove folders")
    if len(train) < 2:
        raise RunError(f"{where} has {', '.join(train) or 'no class folder'} in train and test; "
                       "expected at least two class folders; add one for each class")
    empty = [f"{split}/{name}" for split, classes in (("train", train), ("test", test))
             for name in sorted(classes) if not classes[name]]
    if empty:
        raise RunError(f"{where}: {_named(empty, ', ')} holds no image, or only hidden ones; every "
                       "class needs some in train and in test; add images, or remove the class")


def _read_images(paths, size):
    """All images: uint8 (N,3,size,size). Raises RunError with every file that cannot be read."""

    def read(start):
        for position in range(start, min(start + CHUNK, len(paths))):
            try:
                images[position] = read_image(paths[position], size).transpose(2, 0, 1)
            except MemoryError:
                raise MemoryError(f"at {_shown(paths[position])}") from None
            except Exception as error:  # decoders raise whatever they like
                reasons[position] = _reason(error)

    reasons = {}  # position: why it is not read
    Image.init()  # two threads that load decoders at the same time can miss one
    try:
        images = np.empty((len(paths), 3, size, size), np.uint8)
        with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
            warnings.simplefilter("ignore")  # about size or metadata, without the file's name
            list(pool.map(read, range(0, len(paths), CHUNK)))  # Pillow decodes outside the lock
    except MemoryError as error:
        raise RunError(f"--dataset folder: out of memory with {len(paths)} images ({error}); make "
                       "the images smaller or fewer, or close other programs") from None
    bad = sorted(reasons)
    if len(bad) == 1:
        raise RunError(f"{_shown(paths[bad[0]])} is not an image that Pillow can read "
                       f"({reasons[bad[0]]}); repair or remove it")
    if bad:
        named = _named([f"{_shown(paths[position])} ({reasons[position]})" for position in bad])
        raise RunError(f"{len(bad)} files are not images that Pillow can read: {named}; repair or "
                       "remove them")
    return images
