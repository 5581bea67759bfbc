"""What must be the same in every part, in the order in which data passes through it.

Seed, device, mixed precision; data, split, batches; averaged weights; prediction; checkpoints;
UMAP. The names of network.py, attacks.py and perturbations.py that others need are here, too.
A line belongs here if changing it in one part alone would silently spoil the comparison of parts.
"""

import copy
import functools
import hashlib
import itertools
import time
import warnings
from typing import NamedTuple

import checkpoints
import datasets
import network
from arguments import DATASETS, UsageError, check_data_arguments, first_line
from attacks import UnitLogits, fgsm, fgsm_direction, pgd
from datasets import Data
from network import EMBEDDING_DIM, ClassMeans, Model, empty_model, layout
from perturbations import FAMILY, NO_SEVERITY, PERTURBATIONS, perturb

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import update_bn

# ---- constants ----------------------------------------------------------------------------------

HELD_OUT_FAMILIES = ("blur",)  # never used in training, in any part
SEEN_FAMILIES = tuple(dict.fromkeys(f for f in FAMILY.values() if f not in HELD_OUT_FAMILIES))
QUICK_PER_CLASS = 10
PARTS = ("part1", "part3", "part3_crop_flip", "part4", "part4_augmented", "part4_proxies",
         "part4_proxies_augmented")  # what trains a model, and what its files are called
META = {"part": str, "weights": str, "args": dict, "dataset": str, "classes": list, "head": str,
        "split_hash": str, "epoch": int, "seed": int, "versions": dict, "command": str,
        "device": str, "amp": str, "metrics": dict}  # what a checkpoint says of itself


# ---- seed, device, mixed precision --------------------------------------------------------------


def pick_device(name):
    """The torch.device that `name` stands for; sets how it computes. Raises UsageError for none."""
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # a device's module may not even be importable
        raise UsageError(f"--device {name}: not usable on this machine ({first_line(error)[:100]});"
                         " try --device cpu") from None
    torch.backends.cudnn.benchmark = True  # nearly every batch has the same shape
    torch.backends.cudnn.allow_tf32 = False  # without --amp, float32 is meant
    torch.backends.cuda.matmul.allow_tf32 = False  # as by default, but not in NVIDIA's containers
    return device


def seed_everything(seed, device):
    """Seeds torch's global generators (weights) and returns one on `device` for the batches."""
    torch.manual_seed(seed)
    return torch.Generator(device).manual_seed(seed)


class Amp:
    """Mixed precision: `with amp.autocast():` around the forward pass, then `amp.step`."""

    def __init__(self, mode, device):
        self.device = device
        self.name = mode if mode != "auto" else fastest_precision(device)
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[self.name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.name == "fp16")

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def step(self, loss, optimizer):
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()


@functools.lru_cache
def fastest_precision(device):
    """ "bf16", "fp16" or "off". Timed on CPUs without bf16: some emulate it, much slower."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if device.type != "cpu":
        return "off"
    if network.AMX or network.CPU.get("avx512_bf16"):
        return "bf16"  # timed beside other work, float32 has seemed faster here, which it is not
    with torch.random.fork_rng(devices=[]):  # so that the weights to come do not depend on --amp
        layer = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
        images = torch.rand(16, 64, 16, 16).to(memory_format=torch.channels_last)

    def seconds(enabled):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            layer(images).sum().backward()
        return time.perf_counter() - start

    seconds(True), seconds(False)  # the first calls prepare what the later ones use
    bf16 = float32 = float("inf")
    for _ in range(10):  # in turn, so that other load meets both
        bf16 = min(bf16, seconds(True))
        float32 = min(float32, seconds(False))
        if not 0.7 < bf16 / float32 < 2:  # clear
            break
    return "bf16" if bf16 < 1.2 * float32 else "off"  # where they are close, noise must not decide


# ---- data and split -----------------------------------------------------------------------------


class Split(NamedTuple):
    """The training set's two parts, and the hash that names this split in every row."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    eval_images: torch.Tensor
    eval_labels: torch.Tensor
    hash: str


def stratified_split(labels, fraction=0.2, seed=0):
    """Splits positions class by class: round(fraction * n_c) of every class c's n_c to train.

    labels: integers (N,), tensor or array.  fraction: in (0, 1).  seed: integer in [0, 2**32).
    Returns (train_idx, eval_idx): int64 CPU tensors, sorted, disjoint, together 0 … N-1.  A pure
    function of its arguments on every platform (numpy's legacy generator, whose stream is frozen).
    Raises ValueError if the fraction leaves a class without a training or an evaluation image.
    """
    labels = np.asarray(torch.as_tensor(labels).cpu())
    random = np.random.RandomState(seed)
    train = np.zeros(len(labels), dtype=bool)
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        count = round(fraction * len(members))
        if not 0 < count < len(members):
            raise ValueError(f"a fraction of {fraction} of class {c}'s {len(members)} images "
                             f"leaves {count} for training and {len(members) - count} for "
                             "evaluation; both must be at least 1")
        train[random.permutation(members)[:count]] = True
    return torch.from_numpy(np.flatnonzero(train)), torch.from_numpy(np.flatnonzero(~train))


def split_data(data, fraction, seed):
    """The Split of `data`. Raises UsageError if it or the fraction leaves a class empty."""
    for what, labels in (("training", data.train_labels), ("test", data.test_labels)):
        found = labels.unique().tolist()
        if found != list(range(len(data.classes))):
            raise UsageError(f"the {what} images have the labels {found}, but there are "
                             f"{len(data.classes)} classes; a class that is taken out must be "
                             "taken out of names, images and labels, and those after it renumbered")
    try:
        train, rest = stratified_split(data.train_labels, fraction, seed)
    except ValueError:
        raise UsageError(f"--train-fraction {fraction}: {too_small(data, fraction)}") from None
    sha = hashlib.sha256(train.numpy())
    for tensor in (data.train_images, data.train_labels, data.test_images, data.test_labels):
        sha.update(tensor.cpu().numpy())  # a file that was renamed or changed makes another split
    train = train.to(data.train_labels.device)
    rest = rest.to(data.train_labels.device)
    split = Split(data.train_images[train], data.train_labels[train],
                  data.train_images[rest], data.train_labels[rest], sha.hexdigest()[:12])
    repeated = count_repeated(split.train_images.cpu().numpy(), split.eval_images.cpu().numpy())
    if repeated:
        print(f"warning: {repeated:,} of {len(rest):,} evaluation images are also among the images "
              "trained on, byte for byte; they measure memorization, not generalization")
    return split


def too_small(data, fraction):
    """Which class a fraction leaves empty, and the fractions that would work."""
    counts = data.train_labels.bincount(minlength=len(data.classes)).tolist()
    n = min(counts)
    found = (f"class {data.classes[counts.index(n)]!r} has {n} training images, of which it leaves "
             f"{round(fraction * n)} to train on and {n - round(fraction * n)} to evaluate")
    if n < 2:
        return f"{found}; every class needs at least two"
    low = 0.5 / n + 1e-4  # round() gives 1 from here on
    return f"{found}; {low:.4f} to {1 - low:.4f} leave at least one of each"


def load_data(dataset, data_dir, device, quick=False):
    """Loads a data set whole onto the device, anew at every call: the disk may have changed.

    Raises RunError with the ways out if it is not available, UsageError for another name.
    """
    if dataset == "cifar10":
        arrays = datasets.cifar10(data_dir)
    elif dataset == "folder":
        arrays = datasets.folder(data_dir)
    elif dataset == "digits":
        arrays = datasets.digits()
    else:
        raise UsageError(f"no data set is called {dataset!r}; expected one of "
                         f"{', '.join(DATASETS)}")
    name = arrays.name
    train = np.arange(len(arrays.train_labels))
    test = np.arange(len(arrays.test_labels))
    if quick:
        name += " (QUICK)"
        train = first_of_each(arrays.train_labels)
        test = first_of_each(arrays.test_labels)
    repeated = count_repeated(arrays.train_images[train], arrays.test_images[test])
    if repeated:
        print(f"warning: {repeated:,} of {len(test):,} test images are also in the training set, "
              "byte for byte; those that are trained on measure memorization, not generalization")
    return Data(name, arrays.classes,
                torch.from_numpy(arrays.train_images[train]).to(device),
                torch.from_numpy(arrays.train_labels[train]).long().to(device),
                torch.from_numpy(arrays.test_images[test]).to(device),
                torch.from_numpy(arrays.test_labels[test]).long().to(device), repeated)


def first_of_each(labels):
    """The positions of the first images of every class: all that --quick uses."""
    found = [np.flatnonzero(labels == c)[:QUICK_PER_CLASS] for c in np.unique(labels)]
    return np.concatenate(found)


def count_repeated(train_images, test_images):
    """How many test images are byte for byte a training image."""
    known = {image.tobytes() for image in train_images}
    return sum(image.tobytes() in known for image in test_images)


# ---- batches ------------------------------------------------------------------------------------


def to_float(images):
    """uint8 (B,3,H,W) as float32 in [0,1], channels_last, in which convolutions are fastest."""
    if images.dtype != torch.uint8:  # float images would become all but black
        raise ValueError(f"to_float takes uint8 images, found {images.dtype}")
    return images.contiguous(memory_format=torch.channels_last).float() / 255


def steps_per_epoch(n, batch_size):
    return max(1, n // batch_size)


def batches(images, labels, batch_size, generator):
    """One shuffled epoch of (images, labels) slices; a last, smaller batch is left out.

    That batch could hold one image, of which BatchNorm's statistics would be noise.  Fewer images
    than a batch are one batch.
    """
    order = torch.randperm(len(images), generator=generator, device=images.device)
    for i in range(steps_per_epoch(len(images), batch_size)):
        batch = order[i * batch_size : (i + 1) * batch_size]
        yield images[batch], labels[batch]


class Balance(NamedTuple):
    """How a balanced batch is made up: how many classes, and how many images of each."""

    classes: int
    each: int
    steps: int  # of an epoch


def balance(labels, batch_size):
    """The Balance of batches of at most `batch_size` images, but at least two of two classes.

    With more than batch_size / 2 classes a batch holds some of them, in turn.
    """
    classes = len(labels.unique())
    most = min(batch_size, len(labels))
    each = max(2, most // classes)
    some = max(2, min(classes, most // each))
    return Balance(some, each, steps_per_epoch(len(labels), some * each))


def balanced_batches(images, labels, batch_size, generator):
    """Like `batches`, with equally many images of each class of a batch, in random order."""
    device = images.device
    plan = balance(labels, batch_size)
    order = torch.randperm(len(images), generator=generator, device=device)
    members = [order[labels[order] == c] for c in labels.unique()]
    queue = []  # (class, `each` images of it); every class once before any comes again
    turn = 0
    while len(queue) < plan.steps * plan.classes:
        place = torch.arange(turn * plan.each, (turn + 1) * plan.each, device=device)
        shuffled = torch.randperm(len(members), generator=generator, device=device).tolist()
        not_full = queue[len(queue) // plan.classes * plan.classes :]  # the last batch so far
        begun = {c for c, _ in not_full}
        shuffled.sort(key=lambda c: c in begun)  # so that no class comes twice in it
        queue += [(c, members[c][place % len(members[c])]) for c in shuffled]  # small: come again
        turn += 1
    for i in range(plan.steps):
        batch = torch.cat([some for _, some in queue[i * plan.classes : (i + 1) * plan.classes]])
        mixed = torch.randperm(len(batch), generator=generator, device=device)  # for `augment`
        yield images[batch[mixed]], labels[batch[mixed]]


def evenly_spaced(total, n):
    """min(n, total) positions evenly spaced over `total`: sorted images give every class, too.

    By NumPy, in float64: the last bits of torch.linspace depend on the processor.
    """
    places = np.linspace(0, total - 1, min(n, total)).round()
    return torch.from_numpy(places.astype(np.int64))


def few_of(split):
    """A Split of few images, evenly spaced, on which the learning curve is measured.

    It costs at most a tenth of an epoch, which costs about three forward passes over the training
    images: forward and backward. Training images are of every class, since part 4 classifies by the
    means of all: of many small classes there are more.
    """
    n = len(split.train_labels)
    tenth = max(10, int(0.3 * n))  # forward passes of an image
    train = evenly_spaced(n, min(1000, 2 * tenth // 5))  # that part 4 passes twice
    for c in split.train_labels.unique():
        if c not in split.train_labels[train]:
            first = (split.train_labels == c).nonzero()[0]
            train = torch.cat([train, first.to(train.device)])
    some = evenly_spaced(len(split.eval_labels), min(500, tenth // 5))
    return Split(split.train_images[train], split.train_labels[train], split.eval_images[some],
                 split.eval_labels[some], split.hash)


def shares_of(shares, families):
    """What part 3 trains on, for its record: {perturbation: its family's share of 16 images}.

    shares: {family: of 16 images}.  Raises UsageError where they do not fit the families.
    """
    trained_on = [shares.get(family, 0) for family in families]
    if set(shares) - set(SEEN_FAMILIES) or sum(trained_on) > 16 or min(trained_on, default=1) <= 0:
        raise UsageError(f"SHARES in part3_augmented.py is {shares}, expected images of 16 for "
                         f"{', '.join(SEEN_FAMILIES)}: each above 0, together at most 16; to leave "
                         "a family out: --families, or common.HELD_OUT_FAMILIES")
    return {name: shares[family] for name, family in FAMILY.items() if family in families}


# ---- averaged weights, compilation --------------------------------------------------------------


class WeightAverage:
    """The average of a model's weights, in which step t has about the weight t to the `power`.

    A power of 12 gives half of the weight to the last twentieth of the steps, 3 to the last sixth
    (polynomial-decay averaging, Shamir & Zhang 2013).  As in stochastic weight averaging (Izmailov
    et al. 2018) its BatchNorm statistics are its own: estimated on training images.  torch's
    AveragedModel would make the host wait for the device in every step.
    """

    def __init__(self, model, power):
        self.model = copy.deepcopy(model)
        self.power = power
        self.steps = 0

    @torch.no_grad()
    def update(self, model):
        self.steps += 1
        share = (self.power + 1) / (self.steps + self.power)
        torch._foreach_lerp_([*self.model.parameters()], [*model.parameters()], share)

    def for_evaluation(self, images, amp):
        """The averaged model, its BatchNorm statistics estimated on images, uint8 (N,3,H,W).

        Not a copy: the next `update` changes it.
        """
        turns = max(1, len(images) // 64)  # in strides, so that every batch holds every class
        with amp.autocast():
            update_bn((to_float(images[turn::turns]) for turn in range(turns)), self.model)
        return self.model.eval()

    def state_dict(self):
        return {"model": self.model.state_dict(), "steps": self.steps}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.steps = state["steps"]


def compile_backbone(model, device, **options):
    """Compiles the backbone when it is first called. Raises UsageError where that does not work."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # no C++ compiler, no Triton, a Python that is too new, ...
        raise UsageError(f"--compile: torch.compile does not work here ({first_line(error)}); "
                         "leave it out") from None
    model.backbone.compile(options=options)  # in place: its state_dict keeps its names


# ---- prediction ---------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """One pass over N images: float32 logits (N,C), features (N,512), int64 labels (N,)."""

    logits: torch.Tensor
    features: torch.Tensor
    labels: torch.Tensor = None


@torch.no_grad()
def folded(model):
    """A faster copy for inference: each BatchNorm folded into its convolution, up to rounding."""
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        if type(module) not in (BasicBlock, Bottleneck, ResNet, nn.Sequential):
            continue  # an edited block may apply its layers in another order than it names them
        for conv, norm in itertools.pairwise(list(module._modules)):
            if (network.is_plain(module._modules[norm], nn.BatchNorm2d)
                    and network.is_plain(module._modules[conv], nn.Conv2d, network.SideBySide)):
                fused = fuse_conv_bn_eval(module._modules[conv], module._modules[norm])
                module._modules[conv] = fused
                module._modules[norm] = nn.Identity()
    return model


class Inference(nn.Module):
    """What `predict` makes of a model; made once where many predictions follow.

    forward: float (B,3,H,W) in [0,1] → logits (B,C), features (B,512), the last layer's input.
    compiled: through torch.compile, its weights as constants; equal up to rounding.
    """

    def __init__(self, model, compiled=False):
        super().__init__()
        self.model = folded(model)
        self.last = self.model.backbone.fc = KeepsInput(self.model.backbone.fc)
        if compiled:
            device = next(model.parameters()).device
            compile_backbone(self.model, device, freezing=True)

    def forward(self, images):
        logits = self.model(images)
        return logits, self.last.features


class KeepsInput(nn.Module):
    """A last layer that keeps the features it is given."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, features):
        self.features = features
        return self.layer(features)


@torch.no_grad()
def predict(model, images, amp, labels=None, batch_size=None):
    """The Prediction of uint8 or float images (N,3,H,W) in one pass, in eval mode.

    model: a Model, or the Inference made of it.
    """
    batch_size = batch_size or (80 if images.device.type == "cpu" else 1000)  # divide CIFAR-10's
    inference = model if isinstance(model, Inference) else Inference(model)
    features = []
    logits = []
    with amp.autocast():  # around the loop: it casts the weights once
        for batch in images.split(batch_size):
            if batch.dtype == torch.uint8:
                batch = to_float(batch)
            some_logits, some_features = inference(batch)
            logits.append(some_logits.float())
            features.append(some_features.float())
    return Prediction(torch.cat(logits), torch.cat(features), labels)


def predict_splits(model, split, data, amp):
    """{"train" | "evaluation" | "test": Prediction}, of all images, with their labels."""
    inference = Inference(model)
    return {"train": predict(inference, split.train_images, amp, split.train_labels),
            "evaluation": predict(inference, split.eval_images, amp, split.eval_labels),
            "test": predict(inference, data.test_images, amp, data.test_labels)}


def accuracy(logits, labels):
    """The share of images, logits (N,C), whose class is that of labels, integers (N,)."""
    if labels.shape != logits.shape[:1]:  # (N,1) would be compared with every image's class
        raise ValueError(f"logits {tuple(logits.shape)} need one label each, found labels "
                         f"{tuple(labels.shape)}")
    return (logits.argmax(1) == labels).float().mean().item()


def evaluation_accuracy(model, split, amp):
    """Accuracy on a split's evaluation images."""
    return accuracy(predict(model, split.eval_images, amp).logits, split.eval_labels)


# ---- checkpoints --------------------------------------------------------------------------------


def save_checkpoint(path, model, meta):
    """Writes what `load_checkpoint` reads, complete or not at all."""
    checkpoints.write(path, {"meta": meta, "model": model.state_dict()})


def load_checkpoint(path, device):
    """Reads a training part's checkpoint: (model in eval mode on `device`, meta).

    meta holds plain values, those of META among them.  Nothing in the file is ever executed.
    Raises UsageError for whatever is not such a file.
    """
    content = checkpoints.read(path, "cpu")  # a device that is not there is not called damage
    if "identity" in content:
        raise UsageError(f"{path}: the state of a run, which --resume continues; give the "
                         "checkpoint that a training writes at its end, such as results/part1.pt")
    try:
        meta = content["meta"]
        check_meta(meta)
        model = empty_model(meta["head"], len(meta["classes"]))
        expected = model.state_dict()
        differing = sorted(expected.keys() ^ content["model"].keys())
        if differing:
            raise ValueError("its weights are of another network than this code's: only one of "
                             f"the two has {differing[0]} ({len(differing)} names differ)")
        for name, tensor in content["model"].items():
            known = expected[name]
            fits = (tensor.dtype, tensor.shape) == (known.dtype, known.shape)
            if not fits or not tensor.isfinite().all():
                raise ValueError(f"{name} is not finite or of another type or shape")
        model.load_state_dict(content["model"], strict=True, assign=True)
        found = checkpoints.weights_hash(model)
        if found != meta["weights"]:
            raise ValueError(f"it was written with the weights {meta['weights']} and holds {found}")
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UsageError(f"{path}: does not hold this model ({type(error).__name__}: "
                         f"{first_line(error)}); write it again with the part that made "
                         "it") from None
    return model.to(device, memory_format=layout(device)).eval(), meta


def check_meta(meta):
    """Raises KeyError, TypeError or ValueError for what no training part writes."""
    for key, kind in META.items():
        if type(meta[key]) is not kind:
            raise TypeError(f"{key} is {meta[key]!r}")
    if meta["part"] not in PARTS or meta["head"] not in ("none", "class_means"):
        raise ValueError(f"part {meta['part']!r}, head {meta['head']!r}")
    if len(meta["classes"]) < 2 or any(type(name) is not str for name in meta["classes"]):
        raise ValueError(f"classes {meta['classes']}")
    if any(type(value) is not float for value in meta["metrics"].values()):
        raise ValueError(f"metrics {meta['metrics']}")
    check_data_arguments(meta["args"])


# ---- UMAP ---------------------------------------------------------------------------------------


def umap_coordinates(features, seed, neighbours=15):
    """UMAP (McInnes et al. 2018) of features (N,D) in one fit: float32 array (N,2).

    The same for the same seed and versions.  Exact neighbours come from one float64 matrix product
    a block, on the CPU: faster than umap-learn's search and its compilation, and on every device.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on import and on random_state, about threads
        import umap

        exact = features.cpu().double()
        exact = exact - exact.mean(0)
        neighbours = min(neighbours, len(exact))
        indices = []
        distances = []
        for block in exact.split(2048):
            distance = torch.cdist(block, exact)
            distance[distance < 1e-6 * distance.max()] = 0  # an image to itself, but for rounding
            near = distance.topk(neighbours, largest=False)
            indices.append(near.indices)
            distances.append(near.values.float())
        knn = torch.cat(indices).numpy(), torch.cat(distances).numpy(), None
        reducer = umap.UMAP(n_neighbors=neighbours, random_state=seed, precomputed_knn=knn,
                            n_epochs=200, force_approximation_algorithm=True)
        threads = torch.get_num_threads()
        try:
            return reducer.fit_transform(features.cpu().numpy())
        finally:
            torch.set_num_threads(threads)  # numba sets OpenMP's number, which is torch's, too
