"""How a part starts, resumes and ends: the record of its run, its rows, its files."""

import contextlib
import functools
import hashlib
import importlib.metadata
import math
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import canvas
import checkpoints
import common
import metrics
import network
import plots
import storage
import terminal
from arguments import RunError, UsageError, first_line, pasted
from metrics import percent

import numpy as np
import torch
import torch.nn.functional as F

# what tables and figures call the parts: an edited loss or recipe needs another name here
LABELS = {"part1": "cross-entropy", "part3": "augmented", "part3_crop_flip": "crop and flip",
          "part4": "Angular", "part4_augmented": "Angular, augmented",
          "part4_proxies": "Angular + proxies",
          "part4_proxies_augmented": "Angular + proxies, augmented"}
LOSSES = {"angular": "Angular", "arcface": "ArcFace", "cosface": "CosFace",
          "sphereface": "SphereFace"}
FIGURES = {"_history.png": "learning curve", "_confusion.png": "confusion matrix",
           "_umap.png": "UMAP of unseen images"}  # of a training
ROBUSTNESS_FIGURES = {
    "_severities.png": "accuracy by severity", "_examples.png": "perturbed images",
    "_fgsm.png": "accuracy under attack", "_adversarial.png": "attacked images",
    "_umap.png": "UMAP of clean, perturbed and attacked images"}
# in the order of their removal: the last ones say of which weights all are
ROBUSTNESS_FILES = (*ROBUSTNESS_FIGURES, "_umap.npz", "_state.pt", "_correct.npz", ".json", ".csv")
OUR_CODE = ":(glob)[!.]*.py"  # the Python files beside this one, for git
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "cleverhans", "umap-learn")


# ---- the run ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run of a part: where its files are, and what all its rows have in common."""

    part: str  # whose model it is about: one of common.PARTS
    label: str  # what tables and figures call that model: its loss and its training images
    name: str  # what its files are called: "part1", "part2", "part3_robustness" …
    folder: Path
    checkpoint: str
    weights: str  # hash of the tested weights; "" until they are there
    dataset: str
    classes: tuple
    sizes: dict  # images of training, evaluation, test
    split_hash: str
    seed: int
    args: dict
    command: str
    versions: dict
    device: torch.device
    device_name: str
    amp: str

    def path(self, ending):
        return self.folder / f"{self.name}{ending}"

    def record(self):
        """The run as plain values, for its checkpoint and its JSON file."""
        values = asdict(self)
        for name in ("folder", "name", "label"):
            del values[name]
        values["classes"] = list(self.classes)
        values["device"] = values.pop("device_name")
        return values


def label(part, args):
    """What a part's model is called: its loss and its training images.

    From the part's name alone where a record or checkpoint, which anybody can edit, says no more.
    """
    try:
        loss = args.get("loss", "angular")
        text = LABELS[part].replace("Angular", LOSSES.get(loss, loss))  # a student's own as it is
        families = args.get("families")
        if part == "part3" and families and set(families) != set(common.SEEN_FAMILIES):
            text += f": {', '.join(families)}"
        return text
    except (KeyError, TypeError):
        return LABELS[part]


def start(args, part, data, split, device, amp, weights="", meta=None):
    """The Run of a part, its files locked; prints the header.

    weights, meta: of the checkpoint that part 2 tests; its rows have the label and seed of these.

    Raises UsageError if the results directory holds another study's results, or a file that has the
    name of a part's but was not written by one; RunError if it cannot be written to.
    """
    if not (part in common.PARTS and part in LABELS and part in plots.PART_COLORS):
        raise UsageError(f"no part is called {part!r}; add your own to common.PARTS, "
                         "report.LABELS, plots.PART_COLORS and, with the parts that it is compared "
                         "with, comparison.REFERENCES")
    folder = Path(args.results_dir)
    values = {key: value for key, value in vars(args).items() if key != "command"}
    sizes = {"training": len(split.train_labels), "evaluation": len(split.eval_labels),
             "test": len(data.test_labels)}
    name = storage.robustness_name(part) if meta else part
    checkpoint = Path(args.checkpoint if meta else folder / f"{part}.pt").as_posix()
    trained = meta or {"args": values, "seed": args.seed}
    run = Run(part, label(part, trained["args"]), name, folder, checkpoint, weights, data.name,
              data.classes, sizes, split.hash, trained["seed"], values, pasted(args.command),
              versions() | {"script": args.command[1]},  # a copy of it may be in the same commit
              device, device_name(device), amp.name)
    for row in storage.read_all(folder):
        if (row["dataset"], row["split_hash"]) != (run.dataset, run.split_hash):
            renamed = row["split_hash"] == run.split_hash
            raise UsageError(f"{folder} holds results on {row['dataset']}, split "
                             f"{row['split_hash']}; this run is on {run.dataset}, split "
                             f"{run.split_hash}{' (the same data, renamed)' if renamed else ''}; "
                             "give another --results-dir, or move the old results away")
    for each in common.PARTS:  # what is damaged is said now, not by the comparison at the end
        for file in (each, storage.robustness_name(each)):
            storage.read_record(folder, file)
            storage.read_correct(folder, file)
    checkpoints.lock(folder, name)
    tell_what_is_replaced(run)
    numbers = ", ".join(f"{n:,} {what}" for what, n in sizes.items())
    print(f"{name}: {data.name}, {len(data.classes)} classes; images: {numbers}; split "
          f"{split.hash}, seed {run.seed}\ndevice {run.device_name}; mixed precision {amp.name}",
          flush=True)
    return run


def tell_what_is_replaced(run):
    """One line if the run will replace results that were made with other arguments."""
    record = storage.read_record(run.folder, run.name)
    resumed = run.args["resume"] and run.path("_state.pt").exists()
    if resumed or not record or not run.path(".csv").exists():
        return
    before = record["args"] | {"amp": record.get("amp")}
    now = run.args | {"amp": run.amp}
    differing = [f"{checkpoints.flag(name)} {checkpoints.spelled(before[name])}"
                 for name in sorted(before.keys() & now.keys() - checkpoints.no_effect(now))
                 if checkpoints.spelled(before[name]) != checkpoints.spelled(now[name])]
    if run.weights and record["weights"] != run.weights:  # part 2 knows them before it begins
        differing.append(f"the weights {record['weights']}")
    made_by = {"commit": "unknown", "script": run.versions["script"]} | record["versions"]
    differing += [f"the {what} {checkpoints.spelled(made_by[name])}"
                  for name, what in (("commit", "code"), ("script", "script"))
                  if made_by[name] != run.versions[name]]
    if differing:
        print(f"{run.path('.csv')}, made with {', '.join(differing)}, and what belongs to it will "
              "be replaced; to keep it, stop now and give another --results-dir")


@functools.cache  # of when this process asked first: code that is edited later does not run in it
def versions():
    """{package: version} of what computes, with Python's and the commit.

    Where the Python files differ from the commit, or there is no commit, a hash of them follows.
    """
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    found["python"] = platform.python_version()
    tracked = git("ls-files", "--", OUR_CODE)  # nothing inside another project's repository
    found["commit"] = git("describe", "--always") if tracked else ""
    if not found["commit"] or git("status", "--porcelain", "--", OUR_CODE):
        sha = hashlib.sha256()
        files = Path(__file__).parent.glob("[!.]*.py")
        for path in sorted(files, key=lambda path: path.name):  # Windows sorts paths otherwise
            code = path.read_bytes().replace(b"\r\n", b"\n")  # as git may check it out there
            sha.update(path.name.encode() + code)
        found["commit"] = f"{found['commit'] or 'none'}-dirty-{sha.hexdigest()[:7]}"
    return found


def git(*words):
    """What git says of this checkout; "" without one."""
    folder = Path(__file__).resolve().parent
    checkout = any((above / ".git").exists() for above in (folder, *folder.parents))
    if not checkout or not shutil.which("git"):  # macOS's git may be but an offer to install it
        return ""
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, encoding="utf-8",
                          errors="replace", check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device}, {platform.machine()}"


# ---- rows ---------------------------------------------------------------------------------------


def row(run, split, condition, severity, head, metric, value, n, interval=("", "")):
    """One fact. value and interval are fractions where the metric is an accuracy."""
    return {"part": run.part, "dataset": run.dataset, "split": split, "condition": condition,
            "severity": str(severity), "head": head, "metric": metric, "value": value,
            "ci_low": interval[0], "ci_high": interval[1], "n": n, "seed": run.seed,
            "split_hash": run.split_hash, "checkpoint": run.checkpoint, "weights": run.weights}


def accuracy_row(run, split, condition, severity, head, predicted, labels, metric="accuracy"):
    """The accuracy of predicted labels (N,) with its Wilson interval."""
    n = len(labels)
    if n == 0:
        raise UsageError(f"{metric} on the {split} images has no image left to count; edited code "
                         "that tests fewer must take some of every class, as common.evenly_spaced "
                         "does of sorted ones")
    correct = int((predicted == labels).sum())
    return row(run, split, condition, severity, head, metric, correct / n, n,
               metrics.wilson_interval(correct, n))


def clean_rows(run, predictions, repeated):
    """Everything that is measured on unperturbed images.

    predictions: {"train" | "evaluation" | "test": Prediction}.  The heads class_means, knn and
    probe are fitted on the training images' 512-d features, the same way in every part, to separate
    the loss from the head.  repeated: test images that are in the training set, too.
    """
    train = predictions["train"]
    means = metrics.class_means(train.features, train.labels, len(run.classes))
    k = metrics.neighbours_for(train.labels)
    rows = [accuracy_row(run, "train", "clean", "", "own", train.logits.argmax(1), train.labels)]
    for split in ("evaluation", "test"):
        logits, features, labels = predictions[split]
        predicted = logits.argmax(1)
        heads = {"own": predicted,
                 "class_means": (F.normalize(features, dim=1) @ means.T).argmax(1),
                 "knn": metrics.knn_predict(train.features, train.labels, features, k),
                 "probe": metrics.probe_predict(train.features, train.labels, features)}
        for head, found in heads.items():
            rows.append(accuracy_row(run, split, "clean", "", head, found, labels))
        rows.append(row(run, split, "clean", "", "own", "calibration_error",
                        metrics.calibration_error(logits, labels), len(labels)))
        for c, name in enumerate(run.classes):
            mine = labels == c
            rows.append(accuracy_row(run, split, "clean", "", "own", predicted[mine], labels[mine],
                                     f"accuracy of {name}"))
    rows.append(row(run, "test", "clean", "", "", "images of the training set, too", repeated,
                    run.sizes["test"]))
    return rows


def correct(predicted, labels):
    """Which images are classified right, as booleans (N,): what tests on the same images need."""
    return (predicted == labels).cpu().numpy()


def headline(rows):
    """The clean accuracies of a checkpoint's own head, as its meta keeps them; the first counts."""
    found = {}
    for r in rows:
        if (r["condition"], r["head"], r["metric"]) == ("clean", "own", "accuracy"):
            found.setdefault(r["split"], r["value"])
    return found


# ---- states and files of a run ------------------------------------------------------------------


def resume(run, state, generator):
    """The history of a training so far, its state loaded; [] without --resume.

    Records what no argument says: the optimizer with its numbers, and the schedule's class.
    Raises UsageError also for a network that part 2 could not test.
    """
    network.check_rebuilt(state["model"], len(run.classes))
    optimizer, scheduler = state.get("optimizer"), state.get("scheduler")
    settings = []
    for name, value in getattr(optimizer, "defaults", {}).items():
        if value is not None and value is not False:
            settings.append(f"{name} {value:g}" if type(value) is float else f"{name} {value}")
    run.versions["optimizer"] = (f"{type(optimizer).__name__} ({', '.join(settings)}) with "
                                 f"{type(scheduler).__name__}")
    history = checkpoints.resume(run, state, generator)
    if history and history[-1]["epoch"] != len(history):
        raise UsageError(f"--resume: {run.path('_state.pt')} has {len(history)} rows of history "
                         f"for {history[-1]['epoch']} epochs, by whose number the training goes "
                         f"on; let every epoch have one, and {checkpoints.ANEW}")
    return history


def retire(run):
    """Removes part 2's results of a part's earlier weights, by their exact names, and says so."""
    name = storage.robustness_name(run.part)
    tested = {row["weights"] for row in storage.read_table(run.folder / f"{name}.csv")}
    record, images = storage.read_record(run.folder, name), storage.read_correct(run.folder, name)
    if record:
        tested.add(record["weights"])
    if images:
        tested.add(images.weights)
    tested -= {run.weights}
    begun = checkpoints.tested_weights(run.folder / f"{name}_state.pt") - {run.weights}
    if tested or begun:
        endings = ROBUSTNESS_FILES if tested else ("_state.pt",)
        checkpoints.remove([run.folder / f"{name}{ending}" for ending in endings],
                           f"as results of earlier weights {', '.join(sorted(tested | begun))}")


def write_results(run, rows, figures, images, part1="none", pixels=None):
    """Writes the run's record, rows {ending: rows} and images; removes an earlier run's figures.

    All is written, and flushed by each writer's own `atomic`, before anything is replaced or
    removed: a full disk leaves what was there.
    """
    with contextlib.ExitStack() as at_the_end:

        def temporary(ending):
            return at_the_end.enter_context(checkpoints.atomic(run.path(ending)))

        storage.write_record(temporary(".json"), run)
        storage.write_correct(temporary("_correct.npz"), run, images, part1, pixels)
        for ending, some in rows.items():
            storage.write_rows(temporary(ending), some)
        remove_figures(run, figures)


def remove_figures(run, endings):
    """Removes an earlier run's figures: a run that is killed later leaves none beside its table."""
    if run.args["no_umap"]:
        checkpoints.remove([run.path("_umap.npz"), run.path("_umap.png")],
                           "since --no-umap makes no new ones")
    for ending in (*endings, "_umap.npz"):
        with contextlib.suppress(OSError):
            run.path(ending).unlink(missing_ok=True)


# ---- a run of part 2 ----------------------------------------------------------------------------


def start_test(args, model, meta, data, split, device, amp):
    """The Run of part 2 on a checkpoint, its own files and the tested part's locked.

    Raises UsageError if the data are not those of the checkpoint, or if the results directory holds
    this part with other weights.
    """
    for key, what, ours in (("classes", "classes", list(data.classes)),
                            ("split_hash", "data or split", split.hash)):
        if meta[key] != ours:
            raise UsageError(f"{args.checkpoint} was trained on the {what} {meta[key]}, this run "
                             f"has {ours}; leave out --dataset, --data-dir, --train-fraction, "
                             "--split-seed and --quick to use its own; an edit of the data belongs "
                             "in common.load_data, which all parts call")
    part = meta["part"]
    weights = checkpoints.weights_hash(model)
    checkpoints.lock(args.results_dir, part)  # no training may replace it from here on
    table = Path(args.results_dir) / f"{part}.csv"
    for row in storage.read_table(table):
        if row["weights"] != weights:
            raise UsageError(f"{table} is of the weights {row['weights']}, but {args.checkpoint} "
                             f"holds {weights}; give another --results-dir, or end the training "
                             f"of {part} with --resume first")
    return start(args, part, data, split, device, amp, weights, meta)


def check_network(path, meta, clean):
    """Raises UsageError if the model is not as accurate as when its checkpoint was written.

    Code that was edited since may make another network of the same weights.
    """
    then = meta["metrics"].get("test")
    now = common.accuracy(clean.logits, clean.labels)
    rounding = 0.02 + 2 / len(clean.labels)  # as another device or precision might make
    if then is not None and abs(now - then) > rounding:
        raise UsageError(f"{path}: test accuracy was {percent(then)} % when it was written "
                         f"and is {percent(now)} % with this code; undo what was edited "
                         "since (the network, its input, a precision), or train again")


def part1_beside(folder, meta, device):
    """Part 1's model in a results directory, for another part's checkpoint; None without one."""
    path = Path(folder) / "part1.pt"
    if meta["part"] == "part1":
        return None
    try:
        model, theirs = common.load_checkpoint(path, device)
        if (theirs["part"], theirs["split_hash"]) == ("part1", meta["split_hash"]):
            return model
        reason = f"{path} is of another part, data set or split"
    except UsageError as error:
        reason = error
    print(f"No transfer attack with part 1's adversarial images: {reason}")
    return None


# ---- what every training part does after its loop -----------------------------------------------


def finish(run, model, predictions, history, repeated):
    """Writes all the files of a training part, the hardest to replace first; returns its rows.

    Checkpoint, record and tables, then figures, none of which can end the run.
    """
    ended = history[-1]["epoch"] if history else 0  # edited code may have rows of some epochs only
    if ended != run.args["epochs"]:
        run.versions["stopped"] = f"after epoch {ended} of {run.args['epochs']}"
        print(f"stopped {run.versions['stopped']}; the record says so")
    model = saved_before(run, model) or model
    sizes = {"training": len(predictions["train"].labels),  # of edited code maybe not the split's
             "evaluation": len(predictions["evaluation"].labels),
             "test": len(predictions["test"].labels)}
    run = replace(run, weights=checkpoints.weights_hash(model), sizes=sizes)
    rows = clean_rows(run, predictions, repeated)
    common.save_checkpoint(run.path(".pt"), model, run.record() | {
        "head": network.head_of(model), "epoch": ended, "metrics": headline(rows)})
    test, evaluation = predictions["test"], predictions["evaluation"]
    panels = []
    for split, title in (("evaluation", "evaluation split, clean"), ("test", "test set, clean")):
        some = common.evenly_spaced(run.sizes[split], run.args["umap_points"])
        features = predictions[split].features[some]
        labels = predictions[split].labels[some]
        panels.append(Panel(title, split, "clean", "", features, labels, features))
    measured = umap_rows(run, panels)
    rows += measured
    epochs = [{"dataset": run.dataset, "seed": run.seed, "eval_n": values["eval_n"]} | values
              for values in history]
    write_results(run, {".csv": rows, "_history.csv": epochs}, FIGURES, {
        "evaluation/clean/": correct(evaluation.logits.argmax(1), evaluation.labels),
        "test/clean/": correct(test.logits.argmax(1), test.labels)})
    retire(run)
    plots.history(run.path("_history.png"), history, run, headline(rows)["evaluation"])
    plots.confusion(run.path("_confusion.png"), test.logits.argmax(1), test.labels, run)
    draw_umap(run, panels, measured)
    title = f"{run.part} ({run.label}): {ended} epochs"
    terminal.print_accuracies(title, rows)
    return rows


def saved_before(run, model):
    """The model in the run's checkpoint, if a resumed training had ended in it; else None.

    BatchNorm's statistics have been estimated again since, and their last bits depend on how many
    threads sum them: part 2's results would be of other weights.
    """
    if not run.args["resume"]:
        return None
    try:
        saved, _ = common.load_checkpoint(run.path(".pt"), run.device)
    except UsageError:
        return None
    trained = dict(model.backbone.named_parameters())
    for name, weights in saved.backbone.named_parameters():
        if not torch.equal(weights, trained[name]):
            return None
    ours = model.state_dict()
    for name, tensor in saved.state_dict().items():  # BatchNorm's statistics, but for rounding
        if not torch.allclose(tensor.float(), ours[name].float(), rtol=1e-3, atol=1e-5):
            return None
    return saved


class Panel(NamedTuple):
    """One panel of a UMAP: features (n,512) of images with labels (n,), and of the same, clean."""

    title: str
    split: str
    condition: str
    severity: str
    features: torch.Tensor
    labels: torch.Tensor
    clean_features: torch.Tensor


def umap_rows(run, panels):
    """What the maps show, measured on the features themselves, where models can be compared.

    k-NN accuracy asks the nearest clean images of the panel except the image itself, with the same
    k in all panels; it is nan where the smallest class has one image.
    """
    k = min(metrics.neighbours_for(panel.labels, not_itself=True) for panel in panels)
    rows = []
    for panel in panels:
        place = (run, panel.split, panel.condition, panel.severity)
        dimensions = panel.features.shape[1]
        width = metrics.silhouette(panel.features, panel.labels)
        if k > 0:
            nearest = metrics.knn_predict(panel.clean_features, panel.labels, panel.features, k,
                                          not_itself=True)
            rows.append(accuracy_row(*place, "knn", nearest, panel.labels,
                                     f"{k}-NN accuracy in {dimensions}-d"))
        else:
            metric = f"k-NN in {dimensions}-d: a class has one image"
            rows.append(row(*place, "knn", metric, math.nan, len(panel.labels)))
        rows.append(row(*place, "", f"silhouette in {dimensions}-d", width, len(panel.labels)))
    return rows


def draw_umap(run, panels, measured):
    """One UMAP fit for all panels of a model: picture and coordinates. A failure costs only them.

    measured: the panels' `umap_rows`, two of each, for the titles.
    """
    if run.args["no_umap"]:
        return
    try:
        features = torch.cat([panel.features for panel in panels])
        coordinates = common.umap_coordinates(features, run.args["seed"])
    except Exception as error:  # numba and umap-learn raise whatever they like
        print(f"UMAP failed ({type(error).__name__}: {first_line(error)}); no picture is drawn, "
              "the numbers are not affected")
        return
    sizes = [len(panel.labels) for panel in panels]
    maps = np.split(coordinates, np.cumsum(sizes)[:-1])
    drawn = []
    for panel, points, neighbours, silhouette in zip(panels, maps, measured[::2], measured[1::2],
                                                     strict=True):
        found = []
        if math.isfinite(neighbours["value"]):
            found.append(f"{neighbours['metric'].split()[0]} {percent(neighbours['value'])} %")
        if math.isfinite(silhouette["value"]):
            found.append(f"silhouette {silhouette['value']:.2f}")
        title = f"{panel.title}\n{', '.join(found)}"
        drawn.append(plots.Panel(title, points, panel.labels.cpu().numpy()))
    try:
        with checkpoints.atomic(run.path("_umap.npz")) as temporary:
            np.savez_compressed(
                temporary, coordinates=coordinates, weights=run.weights,
                label=np.concatenate([panel.labels for panel in drawn]),
                panel=np.repeat([panel.title for panel in panels], sizes))
    except RunError as error:
        print(f"{canvas.reason(error)}; the tables are not affected")
    plots.umap(run.path("_umap.png"), drawn, run)
