"""What must be the same in every part, in the order of the data's way: data and split, model, checkpoint,
evaluation, statistics, attacks, UMAP. (Perturbations are in perturbations.py, tables and plots in report.py.)

A line belongs here if changing it in one part alone would silently spoil the comparison between parts.
"""

import contextlib
import copy
import functools
import hashlib
import importlib.metadata
import itertools
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import update_bn

from arguments import RunError, UsageError, check_data_arguments
from perturbations import FAMILY, NO_SEVERITY, PERTURBATIONS, perturb, to_uint8  # noqa: F401

# ---- constants ------------------------------------------------------------------------------------------------------

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10's training pixels in [0,1]
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIZE = 32  # side of every image, pixels
HELD_OUT_FAMILIES = ("blur",)  # never used in training, in any part
SEEN_FAMILIES = tuple(dict.fromkeys(f for f in FAMILY.values() if f not in HELD_OUT_FAMILIES))
QUICK_PER_CLASS = 10
PARTS = ("part1", "part3", "part4", "part4_augmented")  # what trains a model, and what its files are called
FORMAT, VERSION = "small-data-robustness checkpoint", 1
META = {"part": str, "args": dict, "dataset": str, "classes": list, "outputs": int, "head": str, "split_hash": str,
        "epoch": int, "seed": int, "versions": dict, "command": str, "device": str, "amp": str, "metrics": dict}


def first_line(error):
    """What an exception says, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0]


# ---- seed, device, mixed precision ----------------------------------------------------------------------------------


def pick_device(name):
    """The torch.device that `name` stands for. Raises UsageError if this machine does not have it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name}: not usable on this machine ({first_line(error)}); try --device "
                         "auto") from None
    torch.backends.cudnn.benchmark = True  # nearly every batch has the same shape
    torch.backends.cudnn.allow_tf32 = False  # where mixed precision is off, as in attacks, float32 is meant
    return device


def seed_everything(seed, device):
    """Seeds torch's global generators (weights) and returns one on `device` for batches and augmentation."""
    torch.manual_seed(seed)
    return torch.Generator(device).manual_seed(seed)


class Amp:
    """Mixed precision: `with amp.autocast():` around the forward pass, `amp.step(loss, optimizer)` after it."""

    def __init__(self, mode, device):
        self.device, self.name = device, mode if mode != "auto" else fastest_precision(device)
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[self.name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.name == "fp16")

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def step(self, loss, optimizer):
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()


@functools.lru_cache
def fastest_precision(device):
    """ "bf16", "fp16" or "off". On a CPU it is measured in about 0.3 s: some have bf16 only in emulation, 4-16 times
    slower than float32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type != "cpu":
        return "off"
    with torch.random.fork_rng(devices=[]):  # so that the weights to come do not depend on --amp
        layer = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
        images = torch.rand(32, 64, SIZE, SIZE).to(memory_format=torch.channels_last)

    def seconds(enabled):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            layer(images).sum().backward()
        return time.perf_counter() - start

    rounds = [(seconds(True), seconds(False)) for _ in range(10)]  # in turn, so that other load meets both
    bf16, float32 = map(min, zip(*rounds, strict=True))
    return "bf16" if bf16 < 1.2 * float32 else "off"  # where the two are close, noise must not decide


# ---- data and split -------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """A data set, whole, on the device: images uint8 (N,3,32,32), labels int64 (N,)."""

    name: str  # as tables and plots call it
    classes: tuple
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


class Split(NamedTuple):
    """The training set's two halves, and the hash that names this split in every row and checkpoint."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    eval_images: torch.Tensor
    eval_labels: torch.Tensor
    hash: str


def stratified_split(labels, fraction=0.2, seed=0):
    """Splits positions class by class: exactly round(fraction * n_c) of the n_c members of every class c to train.

    labels: integers (N,), tensor or array.  fraction: in (0, 1).  seed: integer in [0, 2**32).
    Returns (train_idx, eval_idx): int64 CPU tensors, sorted, disjoint, together 0 … N-1. A pure function of its
    arguments on every platform (numpy's legacy generator, whose stream is frozen).
    Raises ValueError if the fraction leaves a class without a training or an evaluation image.
    """
    labels = np.asarray(torch.as_tensor(labels).cpu())
    random = np.random.RandomState(seed)
    train = np.zeros(len(labels), dtype=bool)
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        count = round(fraction * len(members))
        if not 0 < count < len(members):
            raise ValueError(f"a fraction of {fraction} of class {c}'s {len(members)} images leaves {count} for "
                             f"training and {len(members) - count} for evaluation; both must be at least 1")
        train[random.permutation(members)[:count]] = True
    return torch.from_numpy(np.flatnonzero(train)), torch.from_numpy(np.flatnonzero(~train))


def split_data(data, fraction, seed):
    """The Split of `data`. Raises UsageError if the fraction leaves a class empty."""
    try:
        train, rest = stratified_split(data.train_labels, fraction, seed)
    except ValueError as error:
        raise UsageError(f"--train-fraction {fraction}: {error}") from None
    digest = hashlib.sha256(train.numpy())
    for tensor in data[2:]:  # a file that was renamed, added or changed makes it another split
        digest.update(tensor.cpu().numpy())
    train, rest = train.to(data.train_labels.device), rest.to(data.train_labels.device)
    return Split(data.train_images[train], data.train_labels[train],
                 data.train_images[rest], data.train_labels[rest], digest.hexdigest()[:12])


@functools.lru_cache(maxsize=1)  # parts 3 and 4 call part 2 in the same process
def load_data(dataset, data_dir, device, quick=False):
    """Loads a data set whole onto the device. Raises RunError with the ways out if it is not to be had."""
    name, classes, *arrays = {"cifar10": _load_cifar10, "folder": _load_folder, "digits": _load_digits}[dataset](
        Path(data_dir))
    train_images, train_labels, test_images, test_labels = map(torch.from_numpy, arrays)
    if quick:
        keep = [torch.cat([torch.where(labels == c)[0][:QUICK_PER_CLASS] for c in range(len(classes))])
                for labels in (train_labels, test_labels)]
        train_images, train_labels = train_images[keep[0]], train_labels[keep[0]]
        test_images, test_labels = test_images[keep[1]], test_labels[keep[1]]
        name += " (QUICK)"
    return Data(name, tuple(classes), train_images.to(device), train_labels.to(device),
                test_images.to(device), test_labels.to(device))


def _load_cifar10(data_dir):
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    archive = data_dir / CIFAR10.filename
    try:
        train, test = CIFAR10(data_dir, train=True, download=True), CIFAR10(data_dir, train=False)
    except Exception as error:  # no network, a cut connection, a page instead of the archive, a full disk
        if archive.exists() and not check_integrity(str(archive), CIFAR10.tgz_md5):
            with contextlib.suppress(OSError):
                archive.unlink()  # what does not pass the MD5 check must not be in the way of the next try
        raise RunError(
            f"CIFAR-10 is neither in {data_dir}/{CIFAR10.base_folder} nor could it be downloaded "
            f"({first_line(error)}). Ways out: put {CIFAR10.filename} into {data_dir}; or --dataset folder "
            f"with a tree {data_dir}/train/<class>/*, {data_dir}/test/<class>/*; or --dataset digits, which needs no "
            "download") from None
    arrays = [a for d in (train, test) for a in (d.data.transpose(0, 3, 1, 2).copy(), np.asarray(d.targets, np.int64))]
    return "CIFAR-10", train.classes, *arrays


def _load_folder(data_dir):
    from concurrent.futures import ThreadPoolExecutor

    from PIL import Image

    def read(path):
        try:
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise RunError(f"{path} is not an image that Pillow can read ({error}); repair or remove it") from None

    classes, arrays = None, []
    for split in ("train", "test"):
        folder = data_dir / split
        if not folder.is_dir():
            raise RunError(f"--dataset folder: {folder} does not exist; expected {data_dir}/train/<class>/* and "
                           f"{data_dir}/test/<class>/*; set --data-dir to the folder that holds train and test")
        found = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        classes = classes or found
        if found != classes or len(classes) < 2:
            raise RunError(f"{folder} has the class folders {found}; expected at least two, the same in train and "
                           f"test (train has {classes})")
        files = [[p for p in sorted((folder / c).iterdir()) if p.is_file() and not p.name.startswith(".")]
                 for c in classes]
        empty = [c for c, paths in zip(classes, files, strict=True) if not paths]
        if empty:
            raise RunError(f"{folder}/{empty[0]} holds no image; every class needs some in train and in test")
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside the interpreter lock
            images = np.stack(list(pool.map(read, sum(files, []))))
        arrays += [images.transpose(0, 3, 1, 2).copy(), np.repeat(np.arange(len(classes)), [len(f) for f in files])]
    name = {"cifar10-jpg": "CIFAR-10 (JPEG copy)"}.get(data_dir.resolve().name, f"folder {data_dir.resolve().name}")
    return name, classes, *arrays


def _load_digits(data_dir):
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = np.uint8(digits.images * (255 / 16))  # (1797,8,8), values 0-16
    images = np.stack([np.asarray(Image.fromarray(d).convert("RGB").resize((SIZE, SIZE))) for d in small])
    images, labels = images.transpose(0, 3, 1, 2).copy(), digits.target.astype(np.int64)
    train, test = stratified_split(labels, 0.8, seed=0)
    return "digits", [str(c) for c in range(10)], images[train], labels[train], images[test], labels[test]


def cifar10c(folder, classes, device):
    """CIFAR-10-C's own files in `folder`, checked now, read as they are asked for.

    Each <corruption>.npy holds uint8 (5n,32,32,3), severity after severity, labels.npy the 5n labels (n is 10,000 in
    the published set). Returns an iterator of (corruption, severity, images uint8 (n,3,32,32), labels int64 (n,)).
    Raises UsageError if that is not what is there, or if the model's `classes` are not CIFAR-10's.
    """
    folder = Path(folder)
    if tuple(classes) != CIFAR10_CLASSES:
        raise UsageError(f"--cifar10c: needs a checkpoint of CIFAR-10's ten classes in their order, found {classes}")
    try:
        labels = np.load(folder / "labels.npy", allow_pickle=False).astype(np.int64)
        corruptions = {path.stem: np.load(path, mmap_mode="r", allow_pickle=False)
                       for path in sorted(folder.glob("*.npy")) if path.name != "labels.npy"}
        for name, pixels in corruptions.items():
            if pixels.shape != (len(labels), SIZE, SIZE, 3) or pixels.dtype != np.uint8:
                raise ValueError(f"{name}.npy is {pixels.dtype} {pixels.shape}")
        if not corruptions or len(labels) % 5:
            raise ValueError(f"{len(corruptions)} corruptions and {len(labels)} labels")
    except (OSError, ValueError) as error:
        raise UsageError(f"--cifar10c {folder}: not CIFAR-10-C's files ({error}); expected <corruption>.npy of uint8 "
                         "(5n, 32, 32, 3) and labels.npy of 5n labels") from None
    return ((f"cifar10c {name}", severity + 1, torch.from_numpy(pixels[block].transpose(0, 3, 1, 2).copy()).to(device),
             torch.from_numpy(labels[block]).to(device))
            for name, pixels in corruptions.items()
            for severity, block in enumerate(np.split(np.arange(len(labels)), 5)))


def to_float(images):
    """uint8 (B,3,H,W) as float32 in [0,1], in the channels_last layout that convolutions are fastest in."""
    return images.contiguous(memory_format=torch.channels_last).float() / 255


def batches(images, labels, batch_size, generator):
    """One shuffled epoch of (images, labels) slices; a last, smaller batch is left out (other images every epoch)."""
    order = torch.randperm(len(images), generator=generator, device=images.device)
    for i in range(steps_per_epoch(len(images), batch_size)):
        batch = order[i * batch_size : (i + 1) * batch_size]
        yield images[batch], labels[batch]


def balanced_batches(images, labels, batch_size, generator):
    """Like `batches`, with the same number of every class in random order, as losses on pairs need it."""
    order = torch.randperm(len(images), generator=generator, device=images.device)
    members = [order[labels[order] == c] for c in labels.unique()]
    each = images_of_each(len(members), len(images), batch_size)  # of a small class, images come again
    for i in range(balanced_steps(labels, batch_size)):
        turn = torch.arange(i * each, (i + 1) * each, device=images.device)
        batch = torch.cat([m[turn % len(m)] for m in members])
        batch = batch[torch.randperm(len(batch), generator=generator, device=images.device)]  # `augment` counts on it
        yield images[batch], labels[batch]


def images_of_each(classes, n, batch_size):
    """How many images of each class a balanced batch holds: two or more, together at most `batch_size` and n."""
    return max(2, min(batch_size, n) // classes)


def steps_per_epoch(n, batch_size):
    return max(1, n // batch_size)


def balanced_steps(labels, batch_size):
    """Steps in an epoch of `balanced_batches`, whose batches may be smaller or larger than `batch_size`."""
    classes = len(labels.unique())
    return steps_per_epoch(len(labels), classes * images_of_each(classes, len(labels), batch_size))


def perturbation_names(names):
    """The perturbations that `names` stands for, each once. Raises UsageError with the known ones."""
    if "all" in names:
        return list(PERTURBATIONS)
    for name in names:
        if name not in PERTURBATIONS:
            raise UsageError(f"--perturbations: no perturbation is called {name!r}; there are all, "
                             + ", ".join(PERTURBATIONS))
    return list(dict.fromkeys(names))


def check_same_data(path, meta, run):
    """Raises UsageError if a checkpoint was trained on another data set or split than this run's."""
    for key, what in (("classes", "classes"), ("split_hash", "data or split")):
        if meta[key] != run[key]:
            raise UsageError(f"{path} was trained on the {what} {meta[key]}, this run has {run[key]}; leave out "
                             "--dataset, --data-dir, --train-fraction, --split-seed and --quick to use its own")


# ---- model ----------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Pixels in [0,1] to logits: normalization, torchvision's ResNet18 for small images, a head.

    forward: float (B,3,H,W) in [0,1] → logits (B,C).  The backbone's state_dict loads with strict=True into
    torchvision's resnet18(num_classes=outputs) with a 3×3 stem and no max-pool (He et al. 2016, for CIFAR).
    """

    def __init__(self, outputs, head=None):
        from torchvision.models import resnet18

        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))
        self.backbone = resnet18(num_classes=outputs)
        self.backbone.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.backbone.maxpool = nn.Identity()
        self.head = head or nn.Identity()

    def outputs(self, images):
        """The backbone's last layer: logits in parts 1 and 3, the embedding (B,D) in part 4."""
        return self.backbone((images - self.mean) / self.std)

    def forward(self, images):
        return self.head(self.outputs(images))


class ClassMeans(nn.Module):
    """Logits as scale × cosine to class means (`means` (C,D)), set after training, or learned as centers in it."""

    def __init__(self, classes, dim, learned=False):
        super().__init__()
        self.learned = learned
        self.means = nn.Parameter(torch.zeros(classes, dim))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def fit(self, embeddings, labels):
        """Sets the means, unless they are learned, and the scale in 1, 2 … 64 of the least label-smoothed cross-entropy
        (part 1's loss) on these embeddings: finite even where all are classified right, so that gradients survive."""
        if not self.learned:
            self.means.copy_(class_means(embeddings, labels, len(self.means)))
        self.scale.fill_(1)
        cosines, scales = self(embeddings), torch.arange(1.0, 65.0, device=labels.device)
        losses = torch.stack([F.cross_entropy(s * cosines, labels, label_smoothing=0.1) for s in scales])
        self.scale.copy_(scales[losses.argmin()])

    def forward(self, embeddings):
        with torch.autocast(embeddings.device.type, enabled=False):  # bf16 would tie close classes
            return self.scale * F.normalize(embeddings.float(), dim=1) @ F.normalize(self.means, dim=1).T


def class_means(embeddings, labels, classes):
    """L2-normalized means (C,D) of the L2-normalized rows (N,D) of each of `classes` classes."""
    one_hot = F.one_hot(labels, classes).to(embeddings)
    return F.normalize(one_hot.T @ F.normalize(embeddings, dim=1), dim=1)


class Average:
    """The average of a model's weights in which step t weighs as t to the `power`: 3 gives half of the weight to the
    last sixth of the steps, 24 to the last 3 %.

    (Polynomial-decay averaging, Shamir & Zhang 2013.) As in stochastic weight averaging (Izmailov et al. 2018) its
    batch statistics are its own: they are measured on the training images, uint8 (N,3,H,W). torch's AveragedModel
    would make the host wait for the device in every step.
    """

    def __init__(self, model, images, amp, power):
        self.module, self.images, self.amp, self.power = copy.deepcopy(model), images, amp, power
        self.steps = 0

    @torch.no_grad()
    def update(self, model):
        self.steps += 1
        torch._foreach_lerp_([*self.module.parameters()], [*model.parameters()],
                             (self.power + 1) / (self.steps + self.power))

    def measured(self, n=None):
        """The averaged model, its batch statistics measured on n training images, evenly spread (None: on all)."""
        images = self.images[spread(len(self.images), n or len(self.images)).to(self.images.device)]
        turns = max(1, len(images) // 64)  # in strides, so that every batch holds every class
        with self.amp.autocast():
            update_bn((to_float(images[turn::turns]) for turn in range(turns)), self.module)
        return self.module

    def state_dict(self):
        return {"module": self.module.state_dict(), "steps": self.steps}

    def load_state_dict(self, state):
        self.module.load_state_dict(state["module"])
        self.steps = state["steps"]


def compile_backbone(model, device):
    """Compiles the backbone when it is first called. Raises UsageError where torch.compile does not work."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # no C++ compiler, no Triton, a Python that is too new, ...
        raise UsageError(f"--compile: torch.compile does not work here ({first_line(error)}); leave it out") from None
    model.backbone.compile()  # in place: the names in its state_dict stay as they are


class Prediction(NamedTuple):
    """What one pass over N images gives, float32: logits (N,C), and the backbone's features (N,512)."""

    logits: torch.Tensor
    features: torch.Tensor


@torch.no_grad()
def folded(model):
    """A copy for inference, with every batch norm folded into the convolution before it: the same function, faster."""
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        for conv, norm in itertools.pairwise(list(module._modules)):
            if isinstance(module._modules[norm], nn.BatchNorm2d):
                module._modules[conv] = fuse_conv_bn_eval(module._modules[conv], module._modules[norm])
                module._modules[norm] = nn.Identity()
    return model


@torch.no_grad()
def predict(model, images, amp, batch_size=None):
    """Logits and backbone features of uint8 or float images (N,3,H,W) in one pass, in eval mode."""
    batch_size = batch_size or (64 if images.device.type == "cpu" else 1024)  # suits the caches
    features, model = [], folded(model)
    model.backbone.avgpool.register_forward_hook(lambda *call: features.append(call[2].flatten(1).float()))
    with amp.autocast():  # around the loop: it casts the weights once
        logits = [model(to_float(batch) if batch.dtype == torch.uint8 else batch).float()
                  for batch in images.split(batch_size)]
    return Prediction(torch.cat(logits), torch.cat(features))


def predict_splits(model, split, data, amp):
    """The Prediction and the labels of each of the three sets, all of it."""
    return {"train": (predict(model, split.train_images, amp), split.train_labels),
            "evaluation": (predict(model, split.eval_images, amp), split.eval_labels),
            "test": (predict(model, data.test_images, amp), data.test_labels)}


def watch(model, split, amp, n=500):
    """Accuracy on n evaluation images, for the learning curve: too few to choose by, enough to see a failure."""
    some = spread(len(split.eval_labels), n)
    return accuracy(predict(model, split.eval_images[some], amp).logits, split.eval_labels[some])


def spread(total, n):
    """min(n, total) positions evenly spread over `total`: of every class, whether or not the set is in their order."""
    return torch.linspace(0, total - 1, min(n, total)).round().long()


@contextlib.contextmanager
def eval_mode(model):
    """Eval mode inside, the former mode outside."""
    training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(training)


# ---- files: complete or absent --------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic(path):
    """Yields a temporary path beside `path` that replaces it when the block ends well, and is removed when not."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        os.close(handle)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; choose another --results-dir") from None
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; what was there before still stands") from None
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, model, meta):
    """Writes what `load_checkpoint` reads, complete or not at all."""
    _save(path, {"format": FORMAT, "version": VERSION, "meta": meta, "model": model.state_dict()})


def load_checkpoint(path, device):
    """Reads a training part's checkpoint: (model in eval mode on `device`, meta).

    meta holds plain values: part, args, dataset, classes, outputs, head, split_hash, epoch, seed, versions, device,
    metrics. Nothing in the file is ever executed. Raises UsageError for whatever is not such a file.
    """
    content = _load(path, device)
    try:
        meta = content["meta"]
        check_meta(meta)
        with torch.device("meta"):  # no memory and no random weights: those of the file take their place
            head = ClassMeans(len(meta["classes"]), meta["outputs"]) if meta["head"] == "class_means" else None
            model = Model(meta["outputs"], head)
        expected = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        if any(t.dtype != expected.get(name) or not t.isfinite().all() for name, t in content["model"].items()):
            raise ValueError("weights that are not finite or of another type")
        model.load_state_dict(content["model"], strict=True, assign=True)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UsageError(f"{path}: does not hold this model ({type(error).__name__}: {first_line(error)}); write it "
                         "anew with the part that made it") from None
    return model.to(device, memory_format=torch.channels_last).eval(), meta


def check_meta(meta):
    """Raises KeyError, TypeError or ValueError for what no training part writes."""
    for key, kind in META.items():
        if type(meta[key]) is not kind:
            raise TypeError(f"{key} is {meta[key]!r}")
    if meta["part"] not in PARTS or meta["head"] not in ("none", "class_means") or meta["outputs"] < 1:
        raise ValueError(f"part {meta['part']!r}, head {meta['head']!r}, {meta['outputs']} outputs")
    if len(meta["classes"]) < 2 or any(type(name) is not str for name in meta["classes"]):
        raise ValueError(f"classes {meta['classes']}")
    if meta["head"] == "none" and meta["outputs"] != len(meta["classes"]):
        raise ValueError(f"{meta['outputs']} outputs for {len(meta['classes'])} classes")
    check_data_arguments(meta["args"])


def part1_beside(folder, meta, device):
    """Part 1's model in a results directory, for another part's checkpoint; None where there is none that fits."""
    path = Path(folder) / "part1.pt"
    if meta["part"] == "part1":
        return None
    try:
        model, theirs = load_checkpoint(path, device)
        if theirs["split_hash"] == meta["split_hash"]:
            return model
        reason = f"{path} is of another data set or split"
    except UsageError as error:
        reason = error
    print(f"Part 1's adversarial images are not tried: {reason}")
    return None


def digest(model):
    """A short hash of a model's weights; of None, "none"."""
    if model is None:
        return "none"
    sha = hashlib.sha256()
    for tensor in model.state_dict().values():
        sha.update(tensor.cpu().numpy().tobytes())
    return sha.hexdigest()[:12]


def read_meta(path):
    """The meta of a checkpoint that may be missing: None then."""
    return _load(path, "cpu")["meta"] if Path(path).exists() else None


def _save(path, content):
    with atomic(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # torch's zip writer reports a full disk so
            raise OSError(first_line(error)) from None


def _load(path, device):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what is refused below
            content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such checkpoint; a training part writes it, such as: "
                         "python part1_baseline.py") from None
    except Exception as error:  # a damaged or hostile file can fail anywhere in torch.load
        raise UsageError(f"{path}: not a checkpoint of this project, or damaged ({type(error).__name__}); expected a "
                         "file that a training part wrote") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f"{path}: not a checkpoint of this project; expected a file that a training part wrote")
    if content.get("version") != VERSION:
        raise UsageError(f"{path}: checkpoint version {content.get('version')}, this code reads version {VERSION}; "
                         "use the code that wrote it, or train again")
    return content


# ---- training: state, resume, history -------------------------------------------------------------------------------

NO_EFFECT = {"resume", "results_dir", "data_dir", "device", "umap_points", "no_umap", "no_part2"}  # on weights


def save_state(path, run, epoch, history, parts, generator):
    """Saves a whole training after `epoch` finished epochs. parts: name → object with a state_dict."""
    _save(path, {"format": FORMAT, "version": VERSION, "identity": identity(run, generator.device), "epoch": epoch,
                 "history": history, "parts": {name: part.state_dict() for name, part in parts.items()},
                 "generator": generator.get_state(), "torch_rng": torch.get_rng_state()})


def identity(run, device):
    """Whatever a resumed run must have in common with its first half, by the flag that sets it."""
    flags = {"--" + name.replace("_", "-"): value for name, value in run["args"].items() if name not in NO_EFFECT}
    return flags | {"--amp": run["amp"], "--device": device.type, "--data-dir with the data": run["split_hash"]}


def check_identity(path, before, now):
    """Raises UsageError if a resumed run's identity differs from its first half's."""
    for flag, value in now.items():
        had = before.get(flag)
        if had != value:
            give = f"leave {flag} out" if had in (None, False) else f"give {flag}" + f" {had}" * (had is not True)
            raise UsageError(f"--resume: the run in {path} had {flag} {had}, this one has {value}; {give}, or leave "
                             "--resume out to start anew")


def resume(path, run, parts, generator):
    """Where a training starts: (finished epochs, history), with the state that `save_state` left if run has --resume.

    Without --resume an old state is removed, so that no later --resume takes it for this training's. Raises UsageError
    if an argument that changes the result differs from the saved run's, or if the state does not fit this code.
    """
    if not run["args"]["resume"] or not Path(path).exists():
        Path(path).unlink(missing_ok=True)
        return 0, []
    content = _load(path, "cpu")
    check_identity(path, content["identity"], identity(run, generator.device))
    try:
        for name, part in parts.items():
            part.load_state_dict(content["parts"][name])
    except (KeyError, RuntimeError, ValueError) as error:
        raise UsageError(f"--resume: the run in {path} was one of other code, its state does not fit "
                         f"({first_line(error)}); leave --resume out to start anew") from None
    generator.set_state(content["generator"].cpu())
    torch.set_rng_state(content["torch_rng"])
    print(f"Resumed after epoch {content['epoch']}")
    return content["epoch"], content["history"]


def save_finished(path, identity, done):
    """Saves the conditions that part 2 has finished. done: (name, severity) → tensors."""
    _save(path, {"format": FORMAT, "version": VERSION, "identity": identity, "done": list(done.items())})


def finished(path, run, identity, device):
    """The conditions that `save_finished` left, if run has --resume, else none. Raises UsageError as `resume` does."""
    if not run["args"]["resume"] or not Path(path).exists():
        Path(path).unlink(missing_ok=True)
        return {}
    content = _load(path, device)
    check_identity(path, content["identity"], identity)
    print(f"Resumed after {len(content['done'])} conditions")
    return {tuple(key): value for key, value in content["done"]}


class Epoch:
    """Iterates over an epoch's batches with a progress bar and sums what the history needs, without device syncs."""

    def __init__(self, number, epochs, batches, steps):
        from tqdm import tqdm

        self.row = {"epoch": number + 1}
        self.bar = tqdm(batches, f"epoch {number + 1:3d}/{epochs}", steps, leave=False, unit="batch",
                        disable=not sys.stderr.isatty())
        self.loss = self.correct = self.seen = self.steps = 0

    def __iter__(self):
        start = time.perf_counter()
        for batch in self.bar:
            yield batch
            if not self.bar.disable and self.steps % 10 == 0:  # syncs with the device, only where a person watches
                self.bar.set_postfix_str(f"loss {self.loss / self.steps:.3f}, accuracy {self.correct / self.seen:.3f}, "
                                         f"{self.seen / (time.perf_counter() - start):.0f} images/s")
        self.loss = float(self.loss) / self.steps
        self.rate = self.seen / (time.perf_counter() - start)
        if not math.isfinite(self.loss):
            raise RunError(f"the loss became {self.loss} in epoch {self.row['epoch']}; try a lower --lr or --amp off")

    def add(self, loss, logits, labels):
        """Counts one batch. logits (B,C) may be None where the loss has none."""
        self.loss, self.steps, self.seen = self.loss + loss.detach(), self.steps + 1, self.seen + len(labels)
        self.correct = self.correct + ((logits.detach().argmax(1) == labels).sum() if logits is not None else math.nan)

    def finish(self, accuracy, scheduler):
        """The history row; prints it. accuracy: of the averaged weights on a part of the evaluation split."""
        train_accuracy = float(self.correct) / self.seen
        train = f"train {train_accuracy:.3f}  " if math.isfinite(train_accuracy) else ""
        print(f"epoch {self.row['epoch']:3d}  loss {self.loss:6.3f}  {train}"
              f"evaluation {accuracy:.3f}  {self.rate:6.0f} images/s", flush=True)
        return self.row | {"loss": self.loss, "train_accuracy": train_accuracy, "eval_accuracy": accuracy,
                           "lr": scheduler.get_last_lr()[0]}


def describe(args, part, data, split, device, amp):
    """What every row of a part's table has in common, and what its checkpoint records about the run."""
    packages = ("torch", "torchvision", "numpy", "cleverhans", "umap-learn")
    versions = {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()}
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True,
                         text=True, check=False) if shutil.which("git") else None
    if git and git.returncode == 0:
        versions["commit"] = git.stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {platform.machine()}"
    sizes = {"training": len(split.train_labels), "evaluation": len(split.eval_labels), "test": len(data.test_labels)}
    return {"part": part, "args": vars(args), "command": " ".join(sys.argv), "dataset": data.name, "sizes": sizes,
            "classes": list(data.classes), "split_hash": split.hash, "seed": args.seed, "versions": versions,
            "device": name, "amp": amp.name}


# ---- statistics -----------------------------------------------------------------------------------------------------


def wilson_interval(correct, n, z=1.959964):
    """95 % score interval of a proportion (Wilson 1927).

    correct, n: counts, 0 <= correct <= n, n > 0.  z: normal quantile.
    Returns (low, high), fractions in [0, 1].  Raises ValueError outside these ranges.
    """
    if not 0 <= correct <= n or n <= 0:
        raise ValueError(f"{correct} of {n} is not a proportion: expected 0 <= correct <= n and n > 0")
    share, z2 = correct / n, z * z / n
    center = (share + z2 / 2) / (1 + z2)
    half = z * math.sqrt(share * (1 - share) / n + z2 / (4 * n)) / (1 + z2)
    return (center - half if correct > 0 else 0.0), (center + half if correct < n else 1.0)  # exact at the ends


def mcnemar(correct_a, correct_b):
    """Two-sided exact p-value of McNemar's test (1947) that two models err equally often on the same images.

    correct_a, correct_b: booleans (N,) of the same images.  Returns a p-value in (0, 1].
    """
    from scipy.stats import binomtest

    only_a = int((correct_a & ~correct_b).sum())
    only_b = int((correct_b & ~correct_a).sum())
    return binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0


def holm(p_values):
    """Holm's step-down correction (1979): p-values (M,) adjusted for the M tests of one table."""
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values)
    adjusted = np.maximum.accumulate(p_values[order] * (len(order) - np.arange(len(order))))
    result = np.empty_like(adjusted)
    result[order] = np.minimum(adjusted, 1)
    return result


def calibration_error(logits, labels, bins=15):
    """Expected calibration error (Guo et al. 2017): Σ n_b/n · |accuracy_b - confidence_b| over equal-width bins.

    logits (N,C), labels (N,).  Returns a fraction in [0, 1].
    """
    confidence, predicted = logits.softmax(1).max(1)
    which = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, device=logits.device)
    gap.index_add_(0, which, (predicted == labels).float() - confidence)
    return (gap.abs().sum() / len(labels)).item()


def accuracy(logits, labels):
    return (logits.argmax(1) == labels).float().mean().item()


def knn_predict(train_features, train_labels, features, k=20, not_itself=False):
    """Labels (N,) by majority of the k training features of highest cosine; ties go to the nearer neighbours.

    not_itself: leaves out training feature i for feature i, where the two stand for the same image.
    """
    train_features, features = F.normalize(train_features, dim=1), F.normalize(features, dim=1)
    classes, result = int(train_labels.max()) + 1, []
    for start in range(0, len(features), 2048):
        similarity = features[start : start + 2048] @ train_features.T
        if not_itself:
            similarity[torch.arange(len(similarity)), torch.arange(start, start + len(similarity))] = -2
        near = similarity.topk(min(k, len(train_features) - not_itself))
        votes = F.one_hot(train_labels[near.indices], classes) * (1 + 1e-3 * near.values.unsqueeze(2))
        result.append(votes.sum(1).argmax(1))
    return torch.cat(result)


def probe_predict(train_features, train_labels, features, l2=1e-3):
    """Labels (N,) by a linear probe: multinomial logistic regression on standardized training features (M,D)."""
    mean, std = train_features.mean(0), train_features.std(0) + 1e-6
    x = (train_features - mean) / std
    weight = torch.zeros(x.shape[1], int(train_labels.max()) + 1, device=x.device, requires_grad=True)
    bias = torch.zeros(weight.shape[1], device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight + bias, train_labels) + l2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return ((features - mean) / std @ weight + bias).argmax(1)


# ---- attacks (cleverhans) -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def attack_mode(model):
    """Eval mode, float32, and no gradients for the parameters; all as it was afterwards, their .grad included."""
    wanted = [p.requires_grad for p in model.parameters()]
    device = next(model.parameters()).device.type
    with eval_mode(model), torch.autocast(device, enabled=False):
        model.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, flag in zip(model.parameters(), wanted, strict=True):
                parameter.requires_grad_(flag)


def fgsm(model, images, labels, eps, norm=np.inf, targeted=False):
    """Fast gradient method (Goodfellow et al. 2015), by cleverhans, away from the given labels, or towards them.

    images: float32 (B,3,H,W) in [0,1].  labels: int64 (B,), the true ones; the targets if `targeted`.  eps: in pixel
    units of [0,1].  norm: inf or 2.  Returns float32 (B,3,H,W) in [0,1], detached; the model's mode and gradients stay
    as they were.
    """
    return (images.float() + eps * fgsm_direction(model, images.float(), labels, norm, targeted)).clamp(0, 1)


def fgsm_direction(model, images, labels, norm=np.inf, targeted=False, batch_size=128):
    """The step of `fgsm` for eps 1 before clipping. It does not depend on eps: one gradient serves a whole sweep.

    Its norm is 1, or 0 for an image whose gradient is zero everywhere. Shapes as in `fgsm`.
    """
    from cleverhans.torch.attacks.fast_gradient_method import fast_gradient_method

    steps = []
    with attack_mode(model):
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            step = fast_gradient_method(model, x, 1.0, norm, y=y, targeted=targeted).detach() - x
            if norm == np.inf:
                step = step.sign()  # x + 1 - x is not 1 to the last bit
            else:  # cleverhans shortens the step where the gradient of the batch's mean loss is below 1e-6
                length = step.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                step = torch.where(length > 0, step / length, 0)
            steps.append(step)
    return torch.cat(steps)


def pgd(model, images, labels, eps, norm=np.inf, steps=10, batch_size=128):
    """Projected gradient descent (Madry et al. 2018), by cleverhans: `steps` steps of 2.5 * eps / steps, but at most
    eps, that start at the image itself.

    Arguments and result as in `fgsm`.
    """
    from cleverhans.torch.attacks.projected_gradient_descent import projected_gradient_descent

    adversarial = []
    with attack_mode(model):
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            adversarial.append(projected_gradient_descent(
                model, x, eps, min(eps, 2.5 * eps / steps), steps, norm, clip_min=0.0, clip_max=1.0, y=y,
                rand_init=False, sanity_checks=False).detach())  # the checks fail on CUDA (cleverhans#1248)
    return torch.cat(adversarial)


# ---- UMAP -----------------------------------------------------------------------------------------------------------


def umap_coordinates(features, seed, neighbours=15):
    """UMAP (McInnes et al. 2018) of features (N,D) in one fit: float32 array (N,2); the same for the same seed.

    Exact neighbours come from one float64 matrix product a block, on the features' device: faster than umap-learn's
    search and its compilation.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on import and on random_state, about threads
        import umap

        indices, distances, exact = [], [], features.double() - features.double().mean(0)
        for block in exact.split(2048):
            distance = torch.cdist(block, exact)
            distance[distance < 1e-6 * distance.max()] = 0  # of an image to itself: zero but for rounding
            near = distance.topk(min(neighbours, len(features)), largest=False)
            indices.append(near.indices.cpu())
            distances.append(near.values.float().cpu())
        knn = torch.cat(indices).numpy(), torch.cat(distances).numpy(), None
        reducer = umap.UMAP(n_neighbors=len(knn[0][0]), random_state=seed, precomputed_knn=knn, n_epochs=200,
                            force_approximation_algorithm=True)
        return reducer.fit_transform(features.cpu().numpy())


def silhouette(features, labels):
    """Mean silhouette width (Rousseeuw 1987) of features (N,D) under their classes, in [-1, 1]; nan if it has none."""
    from sklearn.metrics import silhouette_score

    if not 1 < len(labels.unique()) < len(labels):
        return math.nan
    return float(silhouette_score(features.cpu().numpy(), labels.cpu().numpy()))
