"""Where images come from: CIFAR-10, a tree of image files, scikit-learn's digits, CIFAR-10-C.

Everything is read into arrays on the CPU, or refused in one sentence; no file changes.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import checkpoints
import image_folder
from arguments import RunError, UsageError, first_line

import numpy as np

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                   "truck")
JPEG_COPY = "CIFAR-10 (JPEG copy)"  # whose training images have been compressed already
SIZE = 32  # side of every image, pixels
DIGITS_SIZE = 16  # of scikit-learn's digits, which are 8×8: a demonstration in minutes


class Data(NamedTuple):
    """A data set, whole: images uint8 (N,3,S,S), labels int64 (N,).

    Arrays as they are read here, tensors on the device as `common.load_data` gives them.
    """

    name: str  # as tables and plots call it
    classes: tuple
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    repeated: int = 0  # test images that are in the training set, too, byte for byte


def cifar10(data_dir):
    """CIFAR-10 in `data_dir`, as torchvision reads it, unpacked or downloaded if need be.

    Raises RunError with the ways out if it is not available.
    """
    from torchvision.datasets import CIFAR10

    data_dir = Path(data_dir)
    folder = data_dir / CIFAR10.base_folder
    try:
        if not folder.exists():
            data_dir.mkdir(parents=True, exist_ok=True)
            unpack_cifar10(data_dir)
        train = CIFAR10(data_dir, train=True)
        test = CIFAR10(data_dir, train=False)
    except Exception as error:  # no network, a page instead of the archive, a full disk
        damaged = folder.exists() and isinstance(error, RuntimeError)  # torchvision's, by MD5
        way = f"remove {folder} and put" if damaged else "put"
        raise RunError(
            f"CIFAR-10 in {folder} cannot be used ({first_line(error)}). Ways out: {way} "
            f"{CIFAR10.filename} into {data_dir}; or --dataset folder with a tree "
            f"{data_dir}/train/<class>/**, {data_dir}/test/<class>/**; or --dataset digits, which "
            "needs no download") from None
    return Data("CIFAR-10", tuple(train.classes), channels_first(train.data),
                np.array(train.targets), channels_first(test.data), np.array(test.targets))


@checkpoints.one_at_a_time
def unpack_cifar10(data_dir):
    """Unpacks the user's archive, or downloads one, into data_dir; runs at once take turns."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity, extract_archive

    folder = data_dir / CIFAR10.base_folder
    archive = data_dir / CIFAR10.filename
    incoming = data_dir / ".cifar10-incoming"  # ours: what is cut off is not taken for the data
    if folder.exists():  # another run was first
        return
    try:
        if not archive.exists():
            CIFAR10(incoming, download=True)
        elif check_integrity(str(archive), CIFAR10.tgz_md5):
            extract_archive(str(archive), str(incoming))
        else:
            raise ValueError(f"{archive} is incomplete or damaged, its MD5 is not CIFAR-10's: "
                             "remove or replace it")
        checkpoints.replace(incoming / CIFAR10.base_folder, folder)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def folder(data_dir):
    """The image files of DIR/train/<class>/** and DIR/test/<class>/**, resized to 32×32."""
    tree = image_folder.read_tree(Path(data_dir), SIZE)
    name = image_folder.text_of(Path(data_dir).resolve().name)
    jpeg_copy = name == "cifar10-jpg" and tuple(tree.classes) == CIFAR10_CLASSES
    name = JPEG_COPY if jpeg_copy else f"folder {name}"
    return Data(name, *tree)


def digits():
    """scikit-learn's 1,797 handwritten digits (8×8) as RGB images of 16×16, a fifth for testing."""
    from PIL import Image
    from sklearn.datasets import load_digits

    bundled = load_digits()
    images = []
    for digit in np.uint8(bundled.images * (255 / 16)):  # (1797,8,8), values 0-16
        image = Image.fromarray(digit).convert("RGB").resize((DIGITS_SIZE, DIGITS_SIZE))
        images.append(np.asarray(image))
    images = channels_first(np.stack(images))
    labels = bundled.target
    test = np.zeros(len(labels), bool)
    for c in range(10):
        test[np.flatnonzero(labels == c)[::5]] = True
    train = ~test
    return Data("digits", tuple("0123456789"), images[train], labels[train], images[test],
                labels[test])


def channels_first(images):
    """uint8 (N,S,S,3) as (N,3,S,S), a copy."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


class Corrupted(NamedTuple):
    """One severity of a published corruption: images uint8 (n,3,32,32), labels int64 (n,)."""

    name: str
    severity: str
    images: np.ndarray
    labels: np.ndarray


def cifar10c(folder, classes):
    """CIFAR-10-C's own files in `folder`: an iterator of Corrupted.

    Each <corruption>.npy holds uint8 (5n,32,32,3), severity after severity, labels.npy the 5n
    labels, 0 to 9 (n is 10,000 in the published set).  All are checked now, and their pixels read
    as they are asked for.
    Raises UsageError if that is not what is there, or if the model's `classes` are not CIFAR-10's.
    """
    folder = Path(folder)
    if tuple(classes) != CIFAR10_CLASSES:
        raise UsageError("--cifar10c: needs a checkpoint of CIFAR-10's ten classes in their order, "
                         f"found {classes}")
    corruptions = {}
    path = folder / "labels.npy"
    try:
        labels = np.lib.format.open_memmap(path, mode="r")
        if labels.dtype.kind not in "iu" or labels.ndim != 1 or len(labels) % 5 or not len(labels):
            raise ValueError(f"{labels.dtype} {labels.shape}")
        if labels.min() < 0 or labels.max() > 9:
            raise ValueError(f"from {labels.min()} to {labels.max()}")
        for path in sorted(folder.glob("[!.]*.npy")):
            if path.name == "labels.npy":
                continue
            pixels = np.lib.format.open_memmap(path, mode="r")
            if pixels.shape != (len(labels), SIZE, SIZE, 3) or pixels.dtype != np.uint8:
                raise ValueError(f"{pixels.dtype} {pixels.shape}")
            corruptions[path.stem] = pixels
        if not corruptions:
            raise ValueError("no corruption is beside it")
    except Exception as error:  # numpy parses a damaged header as Python
        raise UsageError(f"--cifar10c {folder}: not CIFAR-10-C's files ({path.name}: "
                         f"{first_line(error)}); expected <corruption>.npy of uint8 "
                         "(5n, 32, 32, 3) and labels.npy of 5n labels, 0 to 9") from None
    return _corrupted(corruptions, labels.astype(np.int64))


def _corrupted(corruptions, labels):
    n = len(labels) // 5
    for name, pixels in corruptions.items():
        for level in range(5):
            block = slice(level * n, (level + 1) * n)
            yield Corrupted(f"cifar10c {name}", str(level + 1), channels_first(pixels[block]),
                            labels[block])
