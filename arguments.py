"""Arguments that every part shares, with their ranges. Imports no torch, so that --help answers at once."""

import argparse
import math
import shlex
import sys

DATASETS = ("cifar10", "folder", "digits")
FROM_CHECKPOINT = ("dataset", "data_dir", "train_fraction", "split_seed", "seed", "quick", "amp")
QUICK_EPOCHS = 2


class UsageError(Exception):
    """Wrong use: an argument or a file that cannot be what was meant. One sentence; exit code 2."""


class RunError(Exception):
    """A run that cannot go on: missing data, a full disk, a loss that is not finite. One sentence; exit code 1."""


def number(kind, low, high, low_open=False):
    """An argparse type: `kind` (int or float) within [low, high], or (low, high] if `low_open`. Refuses nan and inf."""
    interval = f"{'(' if low_open else '['}{low}, {high}]"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (low_open and value == low):  # a nan fails every comparison
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} in {interval}")
        return value

    return parse


def new_parser(description):
    """A parser that prints every default, and the module docstring as it was written."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    return argparse.ArgumentParser(description=description, formatter_class=Formatter, allow_abbrev=False)


def add_shared(parser):
    """Adds what every part takes: data, split, seed, device, pictures."""
    group = parser.add_argument_group("shared by every part")
    add = group.add_argument
    add("--dataset", choices=DATASETS, default="cifar10", help="cifar10: torchvision's, found or downloaded; "
        "folder: DATA_DIR/{train,test}/CLASS/*; digits: scikit-learn's, offline, for demonstration")
    add("--data-dir", default="data", help="where the data set is, or is downloaded to")
    add("--results-dir", default="results", help="where every file is written")
    add("--train-fraction", type=number(float, 0, 1, low_open=True), default=0.2,
        help="share of every class of the training set that is trained on; the rest is the evaluation split")
    add("--split-seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of that split: the same in all parts")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of weights, batches, augmentation, UMAP")
    add("--batch-size", type=number(int, 2, 65536), default=64, help="training images per batch (part 4: "
        "rounded to as many of every class, at least two)")
    add("--device", default="auto", help="auto (cuda, else mps, else cpu), or a torch device such as cuda:1")
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto",
        help="mixed precision; auto: bf16 unless a short trial shows it clearly slower, fp16 on older CUDA, off")
    add("--umap-points", type=number(int, 50, 100_000), default=1000, help="images in each UMAP panel")
    add("--no-umap", action="store_true", help="draw no UMAP")
    add("--resume", action="store_true", help="continue after the last finished epoch (part 2: condition) of the "
        "same command")
    add("--quick", action="store_true", help="every code path in a minute or two: 10 images of each class, 2 epochs; "
        "all outputs are marked QUICK")


def add_training(parser, epochs, lr, weight_decay):
    """Adds what every training part takes; its recipe's values are the part's own."""
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1, 100_000), default=epochs, help="passes over the training images")
    add("--lr", type=number(float, 0, 100, low_open=True), default=lr, help="peak learning rate of the one-cycle")
    add("--weight-decay", type=number(float, 0, 10), default=weight_decay, help="L2 penalty of SGD, on all weights")
    add("--compile", action="store_true", help="torch.compile the network: a minute once, then steps that "
        "may be faster (hardly on a CPU)")


def add_no_part2(parser):
    """Lets a part that ends by calling part 2 leave that out."""
    parser.add_argument("--no-part2", action="store_true", help="do not perturb and attack the test images afterwards "
                        "(part2_robustness.py --checkpoint does it later)")


def from_checkpoint(parser):
    """Lets a part that tests a checkpoint take the arguments of FROM_CHECKPOINT from it, where they are not given."""
    for action in parser._actions:
        if action.dest in FROM_CHECKPOINT:
            action.default = argparse.SUPPRESS
            action.help += " (default: as the checkpoint was trained)"


def check_data_arguments(values):
    """Raises ValueError or KeyError unless `values`, from a file, holds FROM_CHECKPOINT as the command line allows."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_shared(parser)
    if type(values["quick"]) is not bool:
        raise ValueError("quick is not true or false")
    for name in set(FROM_CHECKPOINT) - {"quick"}:
        try:
            parsed = parser.parse_args([f"--{name.replace('_', '-')}={values[name]}"])
        except argparse.ArgumentError as error:
            raise ValueError(str(error)) from None
        if getattr(parsed, name) != values[name]:
            raise ValueError(f"{name} is {values[name]!r}")


def parse(parser, argv):
    """The parsed arguments, with --quick applied."""
    args = parser.parse_args(argv)
    if "epochs" in args and args.quick:
        args.epochs = min(args.epochs, QUICK_EPOCHS)
    return args


def passed_on(args):
    """The arguments that parts 3 and 4 hand on to part 2, as a command line."""
    return ["--results-dir", args.results_dir, "--batch-size", str(args.batch_size), "--device", args.device, "--amp",
            args.amp, "--umap-points", str(args.umap_points), *["--no-umap"] * args.no_umap,
            *["--resume"] * args.resume]


def run(main):
    """Runs a part from the command line: a UsageError or RunError becomes one sentence and exit code 2 or 1."""
    try:
        main()
    except (UsageError, RunError) as error:
        print(f"{sys.argv[0]}: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        command = shlex.join(sys.argv + ["--resume"] * ("--resume" not in sys.argv))
        print(f"\nInterrupted. What is finished is kept; to continue: python {command}", file=sys.stderr)
        sys.exit(130)
