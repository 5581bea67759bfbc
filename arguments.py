"""The command line that every part shares: arguments with their ranges, errors in one sentence."""

import argparse
import io
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

if sys.hexversion < 0x030A0000:  # macOS brings 3.9, and pip finds packages for it
    sys.exit(f"Python {sys.version.split()[0]} is too old: this code needs 3.10 or newer")

DATASETS = ("cifar10", "folder", "digits")
FROM_CHECKPOINT = ("dataset", "data_dir", "train_fraction", "split_seed", "seed", "quick", "amp")
QUICK_EPOCHS = 2
LABEL_SMOOTHING = 0.1  # of every loss that has it


class UsageError(Exception):
    """Wrong use: an argument or a file that cannot be what was meant. One sentence; exit code 2."""


class RunError(Exception):
    """A run that cannot go on: missing data, a full disk. One sentence; exit code 1."""


def first_line(error):
    """What an exception says, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0]


# ---- what a part's parser is made of ------------------------------------------------------------


def number(kind, low, high, low_open=False):
    """An argparse type: `kind` (int or float) within [low, high], or (low, high] if `low_open`.

    It refuses nan and infinity.
    """
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


def path(text):
    """An argparse type: a file or folder, ~ as the shell has it, which leaves it in --flag=~/x.

    Its separator is / on every system: records and checkpoints are read on others.
    """
    if not text.strip():  # of a variable that is not set; as a path it would be this folder
        raise argparse.ArgumentTypeError("the path is empty; give one, such as . for this folder")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise argparse.ArgumentTypeError(f"no home folder is known for {text!r}; write it out, or "
                                         f"give {f'./{text}'!r} for a name that begins so")
    return expanded.replace(os.sep, "/")


def new_parser(file, description):
    """The parser of the script `file`; prints every default, and its docstring as it is."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    return argparse.ArgumentParser(prog=Path(file).name, description=description,
                                   formatter_class=Formatter, allow_abbrev=False)


def add_shared(parser):
    """Adds what every part takes: data, split, seed, device, pictures."""
    add = parser.add_argument_group("shared by every part").add_argument
    add("--dataset", choices=DATASETS, default="cifar10",
        help="cifar10: torchvision's, found or downloaded; folder: DATA_DIR/{train,test}/CLASS/**; "
             "digits: scikit-learn's, offline, for demonstration")
    add("--data-dir", type=path, default="data", help="where the data set is, or is downloaded to")
    add("--results-dir", type=path, default="results", help="where every file is written")
    add("--train-fraction", type=number(float, 0, 1, low_open=True), default=0.2,
        help="share of each class's training images that is trained on; the rest is the "
             "evaluation split")
    add("--split-seed", type=number(int, 0, 2**32 - 1), default=0,
        help="seed of that split: the same in all parts")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0,
        help="seed of weights, batches, augmentation, UMAP")
    add("--batch-size", type=number(int, 2, 65536), default=64,  # 128: half the steps
        help="training images per batch (part 4: equally many of every class, at least two)")
    add("--device", default="auto",
        help="auto (cuda, else mps, else cpu), or a torch device such as cuda:1")
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto",
        help="mixed precision; auto: bf16 where the processor has it (on other CPUs a short trial "
             "decides), fp16 on older CUDA")
    add("--compile", action="store_true",
        help="torch.compile the network: half a minute once, then faster on GPUs and AMX CPUs")
    add("--umap-points", type=number(int, 50, 100_000), default=1000,
        help="images in each UMAP panel")
    add("--no-umap", action="store_true", help="draw no UMAP")
    add("--resume", action="store_true",
        help="continue after the last finished epoch (part 2: condition) of the same command")
    add("--quick", action="store_true",
        help="every code path in a minute or two: 10 images of each class, 2 epochs; all outputs "
             "are marked QUICK")


def add_recipe(parser):
    """Adds how every part trains: one recipe, so that parts differ only in what they study."""
    add = parser.add_argument_group("training, the same in every part").add_argument
    add("--epochs", type=number(int, 1, 100_000), default=15,  # 22 to 52 minutes a core, bf16
        help="passes over the training images")
    add("--lr", type=number(float, 0, 100, low_open=True), default=0.02,  # benchmarks/recipes.md
        help="peak learning rate of the one-cycle schedule: a step's length relative to a "
             "convolution's weights")
    add("--weight-decay", type=number(float, 0, 10), default=1e-3,
        help="L2 penalty on all weights except the convolutions', whose norm is fixed")
    add("--label-smoothing", type=number(float, 0, 0.9), default=LABEL_SMOOTHING,
        help="probability spread over all classes in the training target (not in the Angular loss)")


def add_no_part2(parser):
    """Lets a part that ends by calling part 2 leave that out."""
    parser.add_argument("--no-part2", action="store_true",
                        help="do not perturb and attack the test images afterwards "
                             "(part2_robustness.py --checkpoint does it later)")


def leave_to_checkpoint(parser):
    """Leaves the arguments of FROM_CHECKPOINT out of the result where they are not given."""
    for action in parser._actions:
        if action.dest in FROM_CHECKPOINT:
            action.default = argparse.SUPPRESS
            action.help += " (default: as the checkpoint was trained)"


def take_from_checkpoint(args, meta):
    """Takes what the command line leaves open from the checkpoint: data, split, seed, precision.

    Then applies --quick, which may be the checkpoint's: few images are attacked.
    """
    for name in FROM_CHECKPOINT:
        if name not in args:  # not given on the command line
            setattr(args, name, meta["args"][name])
    if args.amp == "auto":
        args.amp = meta["amp"]  # what it was trained with, not what is fastest here and now
    if args.quick:
        args.attack_images = min(50, args.attack_images)
        args.audit_images = 10  # the fewest that it takes


def check_data_arguments(values):
    """Raises ValueError or KeyError unless a file's `values` are what the command line allows."""
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
    """The parsed arguments, with --quick applied, and `command`: its words."""
    words = sys.argv[1:] if argv is None else [str(word) for word in argv]
    for word in words:
        if "\0" in word or word != word.encode(errors="replace").decode():
            parser.error(f"argument {ascii(word)} is not text here; rename the file or folder, or "
                         "set PYTHONUTF8=1")
        if word.startswith("--") and word.endswith("=--"):  # argparse would leave no value at all
            parser.error(f"argument {word.removesuffix('=--')}: -- is not a value; give one")
    args = parser.parse_args(words)
    if "epochs" in args and args.quick:
        args.epochs = min(args.epochs, QUICK_EPOCHS)
    args.command = ["python", parser.prog, *words]
    return args


def pasted(words):
    """A command as one line for this system's shell: Windows' cmd knows no single quotes."""
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def passed_on(args):
    """The arguments that parts 3 and 4 hand on to part 2, as a command line."""
    words = ["--results-dir", args.results_dir, "--device", args.device, "--umap-points",
             str(args.umap_points)]
    words += [f"--{name.replace('_', '-')}" for name in ("no_umap", "resume", "compile")
              if getattr(args, name)]
    return words


# ---- errors in one sentence ---------------------------------------------------------------------

INTERRUPTED = "Interrupted. What is finished is kept; to continue: "


def run(main):
    """Runs a part from the command line: what stops it becomes one sentence and an exit code.

    2: wrong use.  1: a run that failed.  130: Ctrl-C.  Only bugs print a traceback.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: nobody reads it
            setattr(sys, name, io.StringIO())
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that has no ± or é
    try:
        main()
        sys.stdout.flush()
    except UsageError as error:
        leave(error, 2)
    except RunError as error:
        leave(error, 1)
    except KeyboardInterrupt:
        print("\n" + INTERRUPTED + resuming_command(), file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        leave("the program that read the output has ended; to continue: " + resuming_command(), 1)
    except (MemoryError, OSError, RuntimeError) as error:
        sentence = explained(error)
        if not sentence:
            raise
        leave(sentence, 1)


def leave(sentence, code):
    print(f"{sys.argv[0]}: error: {sentence}", file=sys.stderr)
    sys.exit(code)


def explained(error):
    """One sentence about an error of the machine; None for what must be a bug."""
    text = first_line(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return (f"{where}{error.strerror or text}; what is finished is kept; once this is fixed, "
                f"continue: {resuming_command()}")
    words = ("out of memory", "allocate memory", "ALLOC_FAILED")
    if isinstance(error, MemoryError) or any(word in text for word in words):
        return (f"out of memory ({text[:100]}); try a smaller --batch-size (training), fewer "
                "--umap-points or --attack-images, or --device cpu; what is finished is kept, "
                "--resume continues it")
    return None


def resuming_command():
    words = ["python", *sys.argv]
    if Path(sys.argv[0]).name.startswith("part") and "--resume" not in words:  # others have none
        words.append("--resume")
    return pasted(words)


def answer_ctrl_c_during_imports(kind, error, trace):
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("\n" + INTERRUPTED + resuming_command(), file=sys.stderr, flush=True)
    os._exit(130)


starting = Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent
if starting and "IPython" not in sys.modules:  # a part, and not by a notebook's %run
    sys.excepthook = answer_ctrl_c_during_imports
    os.environ.pop("MPLBACKEND", None)  # a notebook's, of a package that .venv may not have
