"""Images per second of the usual training loop, of ours, and of the bare model step, side by side.

    python benchmarks/throughput.py

(a) usual: float32, NCHW, a DataLoader with two workers and PIL transforms, as most public scripts.
(b) ours:  the pipelines of part 1 and part 3.
(c) bare:  the same model step on one fixed batch, without any data pipeline: the ceiling of (b).
(d) compiled: ours with --compile, its compilation not counted (--no-compile leaves it out).
In batches of 128, as the usual scripts train, and of 64, as ours do.
They take turns; a figure is the median over the rounds. Random images serve: speed does not
depend on them.
Prints the table and writes it to benchmarks/results/<machine>.md.
"""

import argparse
import itertools
import platform
import re
import statistics
import sys
import time
import unittest.mock
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import arguments
import common
import muon
import network
import storage
from part3_augmented import augment

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms

FLOP = 3.34e9  # of a training step, an image: ResNet18 with a 3×3 stem, forward and backward


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    count = arguments.number(int, 1, 10_000_000)
    parser.add_argument("--rounds", type=count, default=3, help="turns of every contestant")
    parser.add_argument("--images", type=count, help="images a turn (1,024; 20,480 on CUDA)")
    parser.add_argument("--umap-points", type=arguments.number(int, 50, 100_000), default=10_000)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--batch-sizes", type=count, nargs="+", default=[128, 64])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True,
                        help="time --compile, which not every machine can, as (d)")
    args = parser.parse_args()
    args.device = common.pick_device(args.device)
    args.images = args.images or (20_480 if args.device.type == "cuda" else 1024)
    for size in args.batch_sizes:
        if args.images % size:  # the contestants would not do the same work
            parser.error(f"{args.images} images are no whole number of batches of {size}; give "
                         "--images a multiple of every one of --batch-sizes")
    return args


class Pictures(torch.utils.data.Dataset):
    """Training images (N,3,H,W), each transformed by itself on the CPU, as usual scripts do."""

    def __init__(self, images, labels, steps):
        self.arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        self.labels = labels.tolist()
        self.transform = transforms.Compose(steps)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.arrays[i])), self.labels[i]


def crop_and_flip(size):
    return [transforms.RandomCrop(size, size // 8), transforms.RandomHorizontalFlip()]


def now(device):
    """Seconds, when the device has done all that it was asked for."""
    torch.zeros((), device=device).item()
    return time.perf_counter()


def main():
    args = parse_args()
    device = args.device
    amp, off = common.Amp("auto", device), common.Amp("off", device)
    generator = common.seed_everything(0, device)
    n = args.images
    images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(n) % 10

    def model(fast):
        net = common.Model(10).to(device)
        if fast:
            net = net.to(memory_format=common.layout(device))
            dtype = amp.dtype or torch.float32
            return net, muon.Muon(net, 0.02, momentum=0.9, weight_decay=1e-3, dtype=dtype)
        return net, torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)

    slow_net, slow_optimizer = model(False)
    fast_net, fast_optimizer = model(True)
    compiled_net, compiled_optimizer = model(True)
    if args.compile:
        common.compile_backbone(compiled_net, device)
    inference = common.Inference(fast_net)
    compiled_inference = common.Inference(fast_net, args.compile)
    average = common.WeightAverage(fast_net, power=12)
    on_device, y_device = images.to(device), labels.to(device)
    step_number = itertools.count()

    def usual(training, perturbed):
        slow_net.train(training)
        torch.backends.cudnn.allow_tf32 = True  # PyTorch's default, which the usual loop leaves
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            if training:
                slow_optimizer.zero_grad()
                loss = F.cross_entropy(slow_net.backbone(x), y)
                loss.backward()
                slow_optimizer.step()
                loss.item()  # as the usual progress bar does
            else:
                with torch.no_grad():
                    slow_net.backbone(x)
        torch.backends.cudnn.allow_tf32 = False

    def step(net, optimizer, x, y):
        with amp.autocast():
            loss = F.cross_entropy(net(x), y, label_smoothing=0.1)
        amp.step(loss, optimizer)

    def train(net, optimizer, perturbed):
        net.train()
        for x, y in common.batches(on_device, y_device, size, generator):
            x = common.to_float(x)
            step(net, optimizer, augment(x, generator, next(step_number)) if perturbed else x, y)
            average.update(net)

    def ours(training, perturbed):
        if training:
            train(fast_net, fast_optimizer, perturbed)
        else:
            common.predict(inference, on_device, amp, batch_size=size)

    def compiled(training, perturbed):
        if training:
            train(compiled_net, compiled_optimizer, perturbed)
        else:
            common.predict(compiled_inference, on_device, amp, batch_size=size)

    def bare(training, perturbed):
        fixed = common.to_float(on_device[:size])
        if training:
            fast_net.train()
            for _ in range(n // size):
                step(fast_net, fast_optimizer, fixed, y_device[:size])
        else:
            with torch.no_grad(), amp.autocast():
                for _ in range(n // size):
                    inference(fixed)

    def seconds(work, *arguments):
        start = now(device)
        work(*arguments)
        return now(device) - start

    work = [("training, part 1", True, False), ("training, part 3", True, True),
            ("inference", False, False)]
    contestants = {"usual (a)": usual, "ours (b)": ours, "bare step (c)": bare}
    titles = ["b / a", "b / c"]
    if args.compile:
        contestants["compiled (d)"] = compiled
        titles.append("d / b")
    lines = [f"| | batch | {' | '.join([*contestants, *titles])} |",
             f"| --- |{' ---: |' * (1 + len(contestants) + len(titles))}"]
    trained = 0
    for size in args.batch_sizes:
        for title, *what in work:
            training, perturbed = what
            steps = crop_and_flip(32) if perturbed else []
            steps += [transforms.ToTensor(), transforms.Normalize(network.MEAN, network.STD)]
            loader = torch.utils.data.DataLoader(Pictures(images, labels, steps), size, training,
                                                 num_workers=2, persistent_workers=True)
            for contestant in contestants.values():  # starts the loader's workers, too
                contestant(*what)
            times = [[seconds(c, *what) for c in contestants.values()] for _ in range(args.rounds)]
            rates = [n / statistics.median(t) for t in zip(*times, strict=True)]
            a, b, c, *d = rates
            ratios = [b / a, b / c, *(rate / b for rate in d)]
            cells = [f"{rate:.0f}" for rate in rates] + [f"{ratio:.2f}" for ratio in ratios]
            lines.append(f"| {title} | {size} | {' | '.join(cells)} |")
            trained = max(trained, b) if training else trained

    fast_net.train()
    with_amx = []
    without = []
    for _ in range(2 * args.rounds):  # in turn; batches of the last size
        for times, amx in ((with_amx, network.AMX), (without, False)):
            with unittest.mock.patch.object(network, "AMX", amx):
                times.append(seconds(bare, True, False))
    lines += ["", f"Bare step, batches of {size}: {n / statistics.median(with_amx):.0f} images/s; "
              f"{n / statistics.median(without):.0f} without `network.SideBySide`."]

    def median(work, *arguments):
        return statistics.median(seconds(work, *arguments) for _ in range(args.rounds))

    rate = n / median(common.predict, fast_net, on_device, amp)
    lines += ["", "| test-time work | images/s | against inference |", "| --- | ---: | ---: |"]
    block, speeds = on_device[:500], {}  # what `perturb` makes at a time
    for name in common.PERTURBATIONS:
        common.perturb(block, name, 3)
        speeds[name] = len(block) / median(common.perturb, block, name, 3)
        lines.append(f"| {name.replace('_', ' ')} | {speeds[name]:.0f} | {rate / speeds[name]:.1%} "
                     "of its time |")
    mean = statistics.mean(rate / speed for speed in speeds.values())
    lines.append(f"| all of them | | {mean:.1%} of its time |")
    few, y = common.to_float(on_device[:128]), y_device[:128]
    common.fgsm_direction(fast_net, few, y)  # imports cleverhans
    exact = len(few) / median(common.predict, fast_net, few, off)
    fgsm = len(few) / median(common.fgsm_direction, fast_net, few, y)
    lines += [f"| inference, float32 | {exact:.0f} | |",
              f"| FGSM direction, float32 | {fgsm:.0f} | |"]
    points = args.umap_points
    features = torch.randn(points, 512, device=device)
    features += 3 * torch.randn(10, 512, device=device)[torch.arange(points) % 10]
    cold, warm = (seconds(common.umap_coordinates, features, 0) for _ in range(2))
    name = f"{torch.get_num_threads()} cores, {processor()}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=amp.dtype or torch.float32)
    b = torch.randn_like(a)
    peak = 2 * side**3 / min(seconds(torch.matmul, a, b) for _ in range(5))
    text = "\n".join([
        f"# {name}", "",
        f"torch {torch.__version__}, numpy {np.__version__}, mixed precision {amp.name}, "
        f"medians of {args.rounds} rounds of {n:,} images.", "", *lines, "",
        f"UMAP of {points:,} × 512: {cold:.1f} s cold, {warm:.1f} s warm. "
        f"Training at up to {trained:.0f} images/s is "
        f"{trained * FLOP / 1e12:.2f} TFLOP/s, {trained * FLOP / peak:.0%} of the "
        f"{peak / 1e12:.2f} TFLOP/s that a matrix product of {side} reaches in the same precision.",
        ""])
    print(text)
    path = args.output / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.md"
    storage.write_text(path, text)
    print(f"Written to {path}")


def processor():
    """The processor's name and family, as Linux tells them."""
    facts = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            facts[key.strip()] = value.strip()
        model = re.sub(r"\((R|TM)\)| Processor", "", facts["model name"])
        return f"{model} family {facts['cpu family']} model {facts['model']}"
    except (OSError, KeyError):
        return platform.machine()


if __name__ == "__main__":
    arguments.run(main)
