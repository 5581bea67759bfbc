"""Files: complete or absent, read without executing anything; training state, resume, locks."""

import contextlib
import functools
import hashlib
import os
import time
import warnings
import zipfile
from pathlib import Path

from arguments import RunError, UsageError, first_line

import torch

FORMAT = "small-data-robustness checkpoint"
VERSION = 2  # 2: rows, checkpoints and states are identified by the hash of their weights
NO_EFFECT = {"resume", "results_dir", "data_dir", "device", "umap_points", "no_umap", "no_part2"}
NO_EFFECT_PART2 = {*NO_EFFECT, "checkpoint", "batch_size"}  # a checkpoint is known by its weights
ANEW = "leave --resume out to start anew"  # the way out of a state that does not fit
TESTED_WEIGHTS = "--checkpoint with the weights"  # in the identity of part 2's runs


# ---- complete or absent -------------------------------------------------------------------------


@contextlib.contextmanager
def atomic(path):
    """Yields a temporary path beside `path` that replaces it when the block ends well.

    The temporary file always has the same name: what a killed run left is overwritten by the next.
    Raises RunError if the file cannot be written; what was there before is then still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        replace(temporary, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; what was there before is "
                       "unchanged; fix this, or choose another directory, and start again (a part: "
                       "with --resume)") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def replace(source, target):
    """Moves a file or folder of ours; tries for a second where Windows refuses it.

    There a virus scanner, the indexer or OneDrive open for a moment what was just written.
    """
    for seconds in (0.05, 0.1, 0.2, 0.4, 0.8):
        try:
            return source.replace(target)
        except PermissionError as error:
            if getattr(error, "winerror", None) not in (5, 32):  # access denied, sharing violation
                raise
        time.sleep(seconds)
    return source.replace(target)


def remove(paths, why):
    """Removes files of ours that are there, and says so in one line. A failure costs nothing."""
    removed = []
    for path in paths:
        try:
            if path.is_file():
                path.unlink()
                removed.append(path.name)
        except OSError as error:
            print(f"{path} should be removed {why}, but cannot be ({error.strerror or error})")
    if removed:
        print(f"Removed {why}: {', '.join(removed)}")


def write(path, content):
    """Writes a dict of plain values and tensors, complete or not at all.

    Raises UsageError for what `read` would refuse, such as the numbers that numpy returns.
    """
    with atomic(path) as temporary:
        try:
            torch.save({"format": FORMAT, "version": VERSION} | content, temporary)
        except RuntimeError as error:  # torch's zip writer reports a full disk so
            raise OSError(f"disk full, or file too large ({first_line(error)})") from None
        refused = torch.serialization.get_unsafe_globals_in_checkpoint(temporary)
        if refused:
            raise UsageError(f"{path} could not be read again, since a value in it is of "
                             f"{sorted(refused)[0]}; give plain values and tensors, such as "
                             "float(x) for a number of numpy's")


def read(path, device, way_out="expected one that a training part wrote"):
    """The dict that `write` wrote. Nothing in the file is executed.

    Raises UsageError, with the way out, for whatever is not such a file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what is refused below
            content = torch.load(path, map_location=device, weights_only=True)
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        if damaged:
            raise ValueError(damaged)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such checkpoint; a training part writes it, such as: "
                         "python part1_baseline.py") from None
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged or hostile file can fail anywhere in torch.load
        raise UsageError(f"{path}: not a checkpoint of this project, or damaged "
                         f"({type(error).__name__}); {way_out}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f"{path}: not a checkpoint of this project; {way_out}")
    if content.get("version") != VERSION:
        raise UsageError(f"{path}: checkpoint version {content.get('version')}, this code reads "
                         f"version {VERSION}; use the code that wrote it, or train again")
    return content


def weights_hash(model):
    """A short hash of a model's weights and batch statistics; of None, "none"."""
    if model is None:
        return "none"
    sha = hashlib.sha256()
    for tensor in model.state_dict().values():
        sha.update(tensor.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:12]


# ---- locks: one writer for the files of a part --------------------------------------------------

LOCKS = {}  # path -> open file, of this process


def lock(folder, name):
    """Locks the files of one part for this process, until `releases_locks` gives them back.

    Raises UsageError if another process has the lock. Where the file system has no locks (some
    network drives), it warns once and goes on.
    """
    path = Path(folder) / f".{name}.lock"
    if path in LOCKS:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)  # stays open until it is released
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror or error}; choose another "
                       "--results-dir") from None
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise UsageError(f"another run is writing {folder}/{name}.*; wait for it, or give another "
                         "--results-dir") from None
    except (ImportError, OSError) as error:  # Windows, a network drive
        if not LOCKS:
            print(f"{folder}: no file locks here ({first_line(error)}); start no second run on the "
                  "same results")
    LOCKS[path] = file


@contextlib.contextmanager
def releases_locks():
    """Decorates a part's `main`: the outermost call gives all locks back, however it ends."""
    outermost = not LOCKS
    try:
        yield
    finally:
        while outermost and LOCKS:
            os.close(LOCKS.popitem()[1])


def one_at_a_time(work):
    """Decorates work(folder, …): runs that reach the same folder at the same time take turns.

    So the last of several parts that end together sees the files of all. The folder itself is
    locked; where the file system has no locks, nobody waits.
    """

    @functools.wraps(work)
    def in_turn(folder, *rest):
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(ImportError, OSError):
                import fcntl

                opened = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, opened)
                fcntl.flock(opened, fcntl.LOCK_EX)
            return work(folder, *rest)

    return in_turn


# ---- training state and resume ------------------------------------------------------------------


def flag(name):
    """What messages call an argument: its flag; the shares are a constant."""
    if name == "shares":
        return "SHARES (part3_augmented.py)"
    return f"--{name.replace('_', '-')}"


def spelled(value):
    """An argument's value as the command line has it; 2.0 as 2, since records have either."""
    if isinstance(value, list | tuple):
        return " ".join(map(spelled, value)) or "none"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def no_effect(args):
    """The arguments of a run (a dict) that do not change its results."""
    return NO_EFFECT_PART2 if "checkpoint" in args else NO_EFFECT


def identity(run):
    """What a resumed run must have in common with its first half, by the flag that sets it."""
    flags = {"--amp": run.amp, "--device": run.device.type,
             "--data-dir with the data": run.split_hash}
    for name, value in run.args.items():
        if name not in no_effect(run.args) and name not in ("amp", "cifar10c"):
            flags[flag(name)] = value
    if "checkpoint" in run.args:  # part 2; of CIFAR-10-C its pixels count, by condition
        flags |= {TESTED_WEIGHTS: run.weights, "--umap-points": run.args["umap_points"]}
    return flags


def check_identity(path, before, now):
    """Raises UsageError if a resumed run's identity differs from its first half's."""
    for name, value in now.items():
        had = before.get(name)
        if had != value:
            raise UsageError(f"--resume: the run in {path} had {name} {spelled(had)}, this one has "
                             f"{spelled(value)}; set it back, or {ANEW}")


def tell_other_versions(path, before, versions):
    """One line for each version of code or package that a resumed run did not begin with.

    From then on `versions` holds both, for the record.
    """
    for name, had in before.items():
        now = versions.get(name, "unknown")
        if had == now or had.endswith(f", then {now}"):
            versions[name] = had
        else:
            print(f"{path} was begun with {name} {had} and continues with {now}; leave --resume "
                  "out to start anew")
            versions[name] = f"{had}, then {now}"


def save_state(run, history, parts, generator):
    """Saves a training after an epoch. parts: name → object with a state_dict."""
    states = {name: part.state_dict() for name, part in parts.items()}
    write(run.path("_state.pt"), {
        "identity": identity(run), "versions": run.versions, "history": history, "parts": states,
        "generator": generator.get_state(), "torch_rng": torch.get_rng_state()})


def resume(run, parts, generator):
    """The history of a training so far: after the state of `save_state` with --resume, else [].

    Without --resume an old state stays until the first epoch's replaces it; if it was unfinished,
    one line says so. Raises UsageError if an argument that changes the result differs from the
    saved run's, or if the state does not fit this code.
    """
    if not goes_on(run, "history"):
        return []
    with state_of(run, "cpu") as content:
        for name, part in parts.items():
            part.load_state_dict(content["parts"][name])
        generator.set_state(content["generator"].cpu())
        torch.set_rng_state(content["torch_rng"])
        history = list(content["history"])
    print(f"Resumed after epoch {len(history)}")
    return history


def save_finished(run, finished):
    """Saves the conditions that part 2 has finished: {(name, severity, …): values}."""
    write(run.path("_state.pt"), {"identity": identity(run), "versions": run.versions,
                                  "finished": list(finished.items())})


def resume_finished(run):
    """What `save_finished` saved, with --resume, else {}. Raises as `resume`."""
    if not goes_on(run, "finished"):
        return {}
    with state_of(run, run.device) as content:
        finished = {tuple(key): tuple(value) for key, value in content["finished"]}
    print(f"Resumed after {len(finished)} conditions")
    return finished


@contextlib.contextmanager
def state_of(run, device):
    """Yields the run's state, its tensors on the device; merges its versions into the run's.

    Raises UsageError if it is of other arguments or data, or does not fit what is done with it.
    """
    path = run.path("_state.pt")
    content = read(path, device, ANEW)
    try:
        check_identity(path, content["identity"], identity(run))
        yield content
        tell_other_versions(path, content.get("versions", {}), run.versions)
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise UsageError(f"--resume: the run in {path} was made by other code, its state does not "
                         f"fit ({first_line(error)}); {ANEW}") from None


def tested_weights(path):
    """{the weights that an interrupted part 2 tested}; empty where no state names them."""
    try:
        return {read(path, "cpu")["identity"][TESTED_WEIGHTS]}
    except (UsageError, KeyError, TypeError):
        return set()


def goes_on(run, key):
    """Whether to continue a run's state: it is there, and --resume is given.

    Says so where there is none to continue, or where an unfinished one will be replaced.
    key: the list in the state that says how far it came: of epochs, or of conditions.
    """
    path = run.path("_state.pt")
    if not path.exists():
        if run.args["resume"]:
            print(f"--resume: no {path} to continue, so this run starts anew")
        return False
    if run.args["resume"]:
        return True
    epochs = run.args.get("epochs")  # part 2 has none
    try:
        done = len(read(path, "cpu")[key])
    except (UsageError, KeyError, TypeError):
        print(f"{path} is not a state that this code can continue; it will be replaced")
        return False
    if not epochs or done < epochs:
        what = f"{done} of {epochs} epochs" if epochs else f"{done} conditions"
        print(f"{path}: an unfinished run ({what} done) will be replaced; to continue it instead, "
              "stop now and add --resume")
    return False
