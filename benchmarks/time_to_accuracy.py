"""Accuracy over training images and over minutes: part 3's training against the usual one.

    python benchmarks/time_to_accuracy.py --dataset cifar10

usual: as most public CIFAR scripts train (kuangliu/pytorch-cifar): batches of 128, learning rate
       0.1 with a cosine schedule, weight decay 5e-4, float32, NCHW, a DataLoader with two workers,
       random crop and flip.
ours:  part3_augmented.py itself, with its perturbations, mixed precision and averaged weights.

Both train on the same images, in turn, an epoch or two each, so that other load meets both. After
every epoch both are tested on the same images of the evaluation split; that is not counted, part
3's own learning curve is. Writes time_to_accuracy.csv, .md and .png to --output.
"""

import argparse
import contextlib
import sys
import tempfile
import unittest.mock
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import arguments
import canvas
import checkpoints
import common
import part3_augmented
import report
import storage

import torch
import torch.nn.functional as F
from throughput import Pictures, crop_and_flip, now, processor
from torchvision import transforms

EVALUATED = 10_000  # images of the evaluation split, at most
TITLES = {"usual": "usual: pytorch-cifar's recipe, cosine over its epochs", "ours": "ours: part 3"}
COLORS = {"usual": "#D55E00", "ours": "#0072B2"}
MARKERS = {"usual": "s", "ours": "o"}


def parse_args():
    """Where to write, and part 3's arguments: --epochs, --dataset, --data-dir, --device ..."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results",
                        help="directory of the results; all other arguments are part 3's")
    parser.add_argument("--usual-epochs", type=arguments.number(int, 1, 100_000), default=30,
                        help="of the usual training")
    args, others = parser.parse_known_args()
    return args, part3_augmented.parse_args(others), others


def train_usual(split, classes, seed, epochs, device):
    """Yields the network after every epoch."""
    torch.manual_seed(seed)
    model = common.Model(classes).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    steps = [*crop_and_flip(split.train_images.shape[-1]), transforms.ToTensor()]
    loader = torch.utils.data.DataLoader(Pictures(split.train_images, split.train_labels, steps),
                                         128, shuffle=True, num_workers=2)
    for _ in range(epochs):
        model.train()
        for images, labels in loader:
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()  # as the usual progress bar does
        scheduler.step()
        yield model


class TrainedError(Exception):
    """Ends part 3 after its last epoch, before it tests."""


def measure(recipe, usual_epochs, words):
    """A row for every epoch of both trainings, and what they are of."""
    device = common.pick_device(recipe.device)
    data = common.load_data(recipe.dataset, recipe.data_dir, device, recipe.quick)
    split = common.split_data(data, recipe.train_fraction, recipe.split_seed)
    some = common.evenly_spaced(len(split.eval_labels), EVALUATED)
    usual = train_usual(split, len(data.classes), recipe.seed, usual_epochs, device)
    amp = common.Amp(recipe.amp, device)
    minutes = dict.fromkeys(COLORS, 0.0)
    rows = []

    def test(name, epoch, model):
        logits = common.predict(model, split.eval_images[some], amp).logits
        accuracy = common.accuracy(logits, split.eval_labels[some])
        rows.append({"training": name, "epoch": epoch, "images": epoch * len(split.train_labels),
                     "minutes": minutes[name], "accuracy": accuracy})
        print(f"{name:5}  epoch {epoch:3d}  {minutes[name]:7.2f} min  {accuracy:.3f}", flush=True)

    def save_state(run, history, state, generator):  # in place of checkpoints'
        nonlocal start
        minutes["ours"] += (now(device) - start) / 60
        epoch = len(history)
        test("ours", epoch, state["average"].for_evaluation(split.train_images, amp))
        before = (epoch - 1) * usual_epochs // recipe.epochs
        for usual_epoch in range(before + 1, epoch * usual_epochs // recipe.epochs + 1):
            start = now(device)
            torch.backends.cudnn.allow_tf32 = True  # PyTorch's default, which the usual loop leaves
            model = next(usual)
            torch.backends.cudnn.allow_tf32 = False
            minutes["usual"] += (now(device) - start) / 60
            test("usual", usual_epoch, model)
        if epoch == recipe.epochs:
            raise TrainedError
        start = now(device)

    with (tempfile.TemporaryDirectory() as folder, contextlib.suppress(TrainedError),
          unittest.mock.patch.object(checkpoints, "save_state", save_state)):
        start = now(device)
        part3_augmented.main([*words, "--results-dir", folder, "--no-part2"])
    caption = (f"{data.name}: {len(split.train_labels):,} training images, tested on {len(some):,} "
               f"of the evaluation split. {machine(device)}, "
               f"{torch.get_num_threads()} threads, mixed precision of ours: {amp.name}, torch "
               f"{torch.__version__}. One training each.")
    return rows, caption


def machine(device):
    return report.device_name(device) if device.type == "cuda" else processor()


def markdown(rows, caption):
    """The table, and when ours is as accurate as the usual training is at its end."""
    lines = ["# Time to accuracy", "", caption, "",
             "| training | epoch | images | minutes | accuracy % |",
             "| --- | ---: | ---: | ---: | ---: |"]
    lines += [f"| {row['training']} | {row['epoch']} | {row['images']:,} | {row['minutes']:.2f} | "
              f"{100 * row['accuracy']:.1f} |" for row in rows]
    last = [row for row in rows if row["training"] == "usual"][-1]
    text = f"The usual training ends at {last['accuracy']:.1%}; ours does not reach it."
    for row in rows:
        if row["training"] == "ours" and row["accuracy"] >= last["accuracy"]:
            text = (f"The usual training ends at {last['accuracy']:.1%}; ours is there in "
                    f"{row['minutes'] / last['minutes']:.0%} of its time.")
            break
    return "\n".join([*lines, "", text, ""])


@canvas.guarded
def draw(path, rows, caption):
    figure = canvas.new_figure(2.8)
    by_images, by_minutes = figure.subplots(1, 2, sharey=True)
    handles = []
    for name, color in COLORS.items():
        mine = [row for row in rows if row["training"] == name]
        accuracy = [100 * row["accuracy"] for row in mine]
        look = {"color": color, "marker": MARKERS[name], "markersize": 3}
        handles += by_images.plot([row["images"] / 1000 for row in mine], accuracy, **look)
        by_minutes.plot([row["minutes"] for row in mine], accuracy, **look)
    by_images.set(xlabel="training images (thousands)", ylabel="evaluation accuracy (%)")
    by_minutes.set(xlabel="minutes of training")
    for axes in (by_images, by_minutes):
        axes.grid(True)
    canvas.legend(figure, handles, [TITLES[name] for name in COLORS])
    canvas.save(figure, path, caption)


def main():
    args, recipe, words = parse_args()
    output = args.output
    rows, caption = measure(recipe, args.usual_epochs, words)
    storage.write_rows(output / "time_to_accuracy.csv", rows)
    storage.write_text(output / "time_to_accuracy.md", markdown(rows, caption))
    draw(output / "time_to_accuracy.png", rows, caption)
    print(markdown(rows, caption))


if __name__ == "__main__":
    arguments.run(main)
