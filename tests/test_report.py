"""What a part reports, against scikit-learn or values worked by hand."""

import copy
import math
import os
import types
from dataclasses import replace

import common
import plots
import report
import storage
import terminal
from arguments import RunError, UsageError

import numpy as np
import pytest
import torch
from conftest import meta_of
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix, silhouette_score
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.preprocessing import normalize

CLASSES = ("ant", "bee", "cat")


def run_of(folder, sizes):
    args = {"resume": False, "no_umap": True, "umap_points": 10, "epochs": 0}
    return report.Run("part1", "cross-entropy", "part1", folder, "part1.pt", "0" * 12, "toy",
                      CLASSES, sizes, "abc", 0, args, "x", {}, torch.device("cpu"), "cpu", "off")


def predictions_of(counts, centers, generator):
    """A Prediction of counts[c] images of class c, around its center, with arbitrary logits."""
    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    features = centers[labels] + torch.randn(len(labels), 4, generator=generator)
    return common.Prediction(torch.randn(len(labels), 3, generator=generator), features, labels)


def fitted_heads(train, features):
    """{head: labels} by scikit-learn, fitted to the training images alone."""
    means = NearestCentroid().fit(normalize(train.features), train.labels).centroids_
    nearest = KNeighborsClassifier(6, metric="cosine", weights=lambda d: 1.001 - d / 1000)
    nearest.fit(train.features, train.labels)  # 6 images are in the smallest class
    mean, std = train.features.mean(0), train.features.std(0)
    probe = LogisticRegression(C=1 / (2 * 1e-3 * 30), max_iter=1000)  # metrics' penalty, 30 images
    probe.fit((train.features - mean) / std, train.labels)
    return {"class_means": cosine_similarity(features, means).argmax(1),
            "knn": nearest.predict(features), "probe": probe.predict((features - mean) / std)}


def test_heads_are_fitted_to_training_images_and_a_class_counts_its_own_images():
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(3, 4, generator=generator)
    counts = {"train": (15, 9, 6), "evaluation": (4, 6, 10), "test": (5, 2, 3)}
    predictions = {split: predictions_of(c, centers, generator) for split, c in counts.items()}
    train = predictions["train"]
    expected = {("train", "own", "accuracy"): accuracy_score(train.labels, train.logits.argmax(1))}
    for split in ("evaluation", "test"):
        logits, features, labels = predictions[split]
        heads = {"own": logits.argmax(1)} | fitted_heads(train, features)
        for head, predicted in heads.items():
            expected[split, head, "accuracy"] = accuracy_score(labels, predicted)
        shares = confusion_matrix(labels, heads["own"], normalize="true").diagonal()
        for name, share in zip(CLASSES, shares, strict=True):
            expected[split, "own", f"accuracy of {name}"] = share
    rows = report.clean_rows(run_of(None, {"test": 10}), predictions, 0)
    found = {(row["split"], row["head"], row["metric"]): row["value"] for row in rows
             if row["metric"].startswith("accuracy")}
    assert found == pytest.approx(expected)


def test_what_a_checkpoint_says_of_itself_is_of_clean_images():
    """Edited code may add test-time augmentation, as another condition of the same head."""
    labels = torch.zeros(10)
    run = run_of(None, {})
    rows = [report.accuracy_row(run, "test", condition, severity, "own", torch.arange(10) >= right,
                                labels)
            for condition, severity, right in (("clean", "", 7), ("mirrored", "", 9),
                                               ("clean", "0", 5))]
    assert report.headline(rows) == {"test": 0.7}


def test_images_that_are_right_keep_their_places():
    found = report.correct(torch.tensor([0, 1, 2, 0]), torch.tensor([0, 2, 2, 1]))
    assert found.tolist() == [True, False, True, False]


def test_an_epochs_loss_is_the_mean_of_its_steps_and_its_accuracy_of_its_images():
    right = torch.tensor([[2.0, 1.0], [1.0, 2.0]])  # of labels 0 and 1
    batches = [(1.0, right), (3.0, right[[0, 0]])]  # loss, logits
    labels = torch.tensor([0, 1])
    meter = terminal.EpochMeter(0, 1, batches, 2)
    for loss, logits in meter:
        meter.add(torch.tensor(loss), labels, logits)
    row = meter.finish(0.5, 10, types.SimpleNamespace(get_last_lr=lambda: [0.1]))
    assert row == {"epoch": 1, "loss": 2, "train_accuracy": 0.75, "eval_accuracy": 0.5,
                   "eval_n": 10, "lr": 0.1}


@pytest.fixture
def clock(monkeypatch):
    """A list of one number, the seconds that have passed."""
    seconds = [0.0]
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: seconds[0])
    return seconds


def test_the_time_of_a_run_is_estimated_without_its_first_two_steps(clock, capsys):
    weight = torch.ones((), requires_grad=True)
    for epoch, said in ((0, "about 20 min for 600 steps"), (1, "")):
        meter = terminal.EpochMeter(epoch, 2, range(300), 300)
        for batch in meter:
            clock[0] += 2 if epoch or batch > 1 else 102
            meter.add(weight * 3, torch.zeros(16, dtype=torch.long))
        assert capsys.readouterr().out.strip() == said
        assert not meter.loss.requires_grad  # else every step's graph stays in memory
        clock[0] += 1000  # the evaluation
        row = meter.finish(0.5, 10, types.SimpleNamespace(get_last_lr=lambda: [0.1]))
        assert math.isnan(row["train_accuracy"])
        line = capsys.readouterr().out
        assert line.split() == ["epoch", str(epoch + 1), "loss", "3.000", "evaluation", "0.500",
                                "of", "10", "8" if epoch else "6", "images/s"]


def test_the_time_of_part_2_is_estimated_from_its_first_condition(clock, capsys):
    for estimate in (True, False):
        for _ in terminal.timed(range(5), estimate):
            clock[0] += 30
        said = "about 2 min for the other 4 conditions, then the attacks\n"
        assert capsys.readouterr().out == (said if estimate else "")
    stages = terminal.Clock()
    for stage, seconds in (("training", 70), ("tests", 5)):
        clock[0] += seconds
        stages.stop(stage)
    assert stages.stages == [("training", "70"), ("tests", "5")]


@pytest.mark.parametrize(("batches", "refused"), [(8, True), (9, False), (10, True)])
def test_an_epoch_has_as_many_batches_as_the_schedule_has_steps(batches, refused):
    """Not with a batch size of its own, or a last, smaller batch."""
    meter = terminal.EpochMeter(0, 3, range(batches), 9)
    if refused:
        with pytest.raises(UsageError, match=f"an epoch had {batches} batches, but steps is 9"):
            list(meter)
    else:
        assert len(list(meter)) == 9


@pytest.mark.parametrize("parts", [0, 1, 4])
def test_the_time_is_estimated_of_batches_in_parts(clock, capsys, parts):
    """As gradient accumulation counts them: several losses of a batch."""
    meter = terminal.EpochMeter(0, 2, range(300), 300)
    for _ in meter:
        clock[0] += 2
        for _ in range(parts):
            meter.add(torch.tensor(3.0), torch.zeros(4, dtype=torch.long))
    assert capsys.readouterr().out == "about 20 min for 600 steps\n"


@pytest.mark.parametrize("loss", [3.0, math.nan, math.inf])
def test_an_epoch_that_a_student_breaks_off_is_counted_and_checked(loss):
    meter = terminal.EpochMeter(0, 1, [None] * 9, 9)
    for _ in meter:
        meter.add(torch.tensor(loss), torch.tensor([0]))
        if meter.steps == 2:
            break
    scheduler = types.SimpleNamespace(get_last_lr=lambda: [0.1])
    if not math.isfinite(loss):
        with pytest.raises(RunError, match=f"the loss became {loss} in epoch 1"):
            meter.finish(0.5, 10, scheduler)
    else:
        assert meter.finish(0.5, 10, scheduler)["loss"] == 3


def test_a_bar_waits_for_the_first_batch_that_a_student_counts(monkeypatch):
    shown = []
    monkeypatch.setattr(terminal, "progress", lambda batches, *_, **__: Bar(batches, shown))
    meter = terminal.EpochMeter(0, 1, range(4), 4)
    for batch in meter:
        if batch > 0:  # as after `if bad: continue`
            meter.add(torch.tensor(3.0), torch.tensor([0]))
    assert shown == ["loss 3.000"]


class Bar:
    """A progress bar where a person watches."""

    disable = False

    def __init__(self, items, shown):
        self.items = items
        self.total = len(items)
        self.set_postfix_str = shown.append

    def __iter__(self):
        return iter(self.items)


def test_mixed_labels_count_as_the_class_of_the_largest_share():
    logits = torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, 2.0]])
    meter = terminal.EpochMeter(0, 1, [None, None], 2)
    for labels in (torch.tensor([[0.6, 0.4, 0.0], [0.6, 0.0, 0.4]]),
                   torch.tensor([[0.4, 0.3, 0.3], [0.1, 0.0, 0.9]])):
        meter.add(torch.tensor(1.0), labels, logits)
    assert (int(meter.correct), meter.images) == (3, 4)


def test_figures_show_the_evaluation_accuracy_and_the_tests_confusion(tmp_path, monkeypatch,
                                                                      tiny_backbone):
    shown = []
    monkeypatch.setattr(plots, "history", lambda *args: shown.append(args[3]))
    monkeypatch.setattr(plots, "confusion",
                        lambda *args: shown.extend(values.tolist() for values in args[1:3]))
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    predicted = {"train": [0, 0, 0, 1, 1, 2], "evaluation": [0, 0, 0, 0, 0, 0],
                 "test": [0, 0, 1, 1, 1, 1]}
    predictions = {split: common.Prediction(torch.eye(3)[values], features, labels)
                   for split, values in predicted.items()}
    run = run_of(tmp_path, {"training": 6, "evaluation": 6, "test": 6})
    report.finish(run, common.Model(outputs=3), predictions, [{"epoch": 1, "eval_n": 6}], 0)
    assert shown == [0.5, [0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 2]]


def test_calibration_is_of_the_split_in_its_row():
    labels = torch.arange(3).repeat(4)
    features = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    sure = {"train": 0 * labels, "evaluation": labels[:9], "test": (labels[:6] + 1) % 3}
    predictions = {}  # a third, all and none are right
    for split, predicted in sure.items():
        n = len(predicted)
        predictions[split] = common.Prediction(50 * torch.eye(3)[predicted], features[:n],
                                               labels[:n])
    rows = report.clean_rows(run_of(None, {"test": 6}), predictions, 0)
    rows = [row for row in rows if row["metric"] == "calibration_error"]
    found = {row["split"]: row["value"] for row in rows}
    assert found == pytest.approx({"evaluation": 0, "test": 1})
    assert [row["n"] for row in rows] == [9, 6]


def test_right_images_and_maps_are_of_their_own_split(tmp_path, monkeypatch, tiny_backbone):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(4)
    predictions = {split: common.Prediction(
        torch.randn(12, 3, generator=generator),
        spread * torch.eye(3)[labels] + torch.randn(12, 3, generator=generator), labels)
        for split, spread in (("train", 1), ("evaluation", 5), ("test", 1))}
    shown = []
    for name in ("history", "confusion"):
        monkeypatch.setattr(plots, name, lambda *_: None)
    monkeypatch.setattr(report, "draw_umap", lambda run, panels, _: shown.extend(panels))
    run = run_of(tmp_path, {"training": 12, "evaluation": 12, "test": 12})
    rows = report.finish(run, common.Model(outputs=3), predictions, [{"epoch": 1, "eval_n": 6}], 0)
    assert [panel.title for panel in shown] == ["evaluation split, clean", "test set, clean"]
    some = np.linspace(0, 11, 10).round()
    widths = {row["split"]: row["value"] for row in rows if row["metric"].startswith("silhouette")}
    for split in ("evaluation", "test"):
        logits, features, _ = predictions[split]
        images = storage.read_correct(tmp_path, "part1").images[f"{split}/clean/"]
        assert images.tolist() == (logits.argmax(1) == labels).tolist()
        assert widths[split] == pytest.approx(silhouette_score(features[some], labels[some]))


def test_fewer_images_than_the_split_has_are_counted(tmp_path, monkeypatch, tiny_backbone):
    """As of code that tests on some of them only, to save time."""
    sizes = []
    monkeypatch.setattr(plots, "history", lambda path, history, run, _: sizes.append(run.sizes))
    monkeypatch.setattr(plots, "confusion", lambda *_: None)
    labels = torch.arange(3).repeat(20)
    features = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    predictions = {split: common.Prediction(torch.eye(3)[labels[:n]], features[:n], labels[:n])
                   for split, n in (("train", 30), ("evaluation", 12), ("test", 60))}
    run = run_of(tmp_path, {"training": 60, "evaluation": 240, "test": 60})
    history = [{"epoch": 1, "eval_n": 6}]
    report.finish(run, common.Model(outputs=3), predictions, history, 0)
    assert sizes == [{"training": 30, "evaluation": 12, "test": 60}]
    assert storage.read_record(tmp_path, "part1")["sizes"] == sizes[0]
    predictions["test"] = common.Prediction(*(values[labels < 2] for values in predictions["test"]))
    with pytest.raises(UsageError, match="accuracy of cat on the test images has no image left"):
        report.finish(run, common.Model(outputs=3), predictions, history, 0)


def test_epochs_without_a_row_of_history_count(tmp_path, monkeypatch, tiny_backbone):
    """As of code that evaluates every fifth epoch only."""
    for name in ("history", "confusion"):
        monkeypatch.setattr(plots, name, lambda *_: None)
    history = [{"epoch": 5, "eval_n": 6}, {"epoch": 10, "eval_n": 6}]
    labels = torch.arange(3).repeat(4)
    prediction = common.Prediction(torch.eye(3)[labels], torch.eye(3)[labels], labels)
    model = common.Model(outputs=3)
    for epochs, said in ((10, None), (15, "after epoch 10 of 15")):
        run = run_of(tmp_path, {})
        run.args["epochs"] = epochs
        report.finish(run, model, dict.fromkeys(("train", "evaluation", "test"), prediction),
                      history, 0)
        assert storage.read_record(tmp_path, "part1")["versions"].get("stopped") == said
    monkeypatch.setattr(report.checkpoints, "resume", lambda *_: history)
    with pytest.raises(UsageError, match="has 2 rows of history for 10 epochs"):
        report.resume(run, {"model": model}, None)


def test_the_file_of_a_map_says_which_point_is_of_which_panel(tmp_path, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(common, "umap_coordinates", lambda features, seed: features.numpy() + seed)
    monkeypatch.setattr(plots, "umap", lambda path, drawn, _: shown.extend(p.title for p in drawn))
    run = run_of(tmp_path, {})
    run = replace(run, args=run.args | {"no_umap": False, "seed": 7})
    features, labels = torch.arange(10.0).view(5, 2), torch.tensor([3, 1, 4, 1, 5])
    panels = [report.Panel(title, "test", title, "", features[some], labels[some], features[some])
              for title, some in (("clean", slice(0, 3)), ("noise", slice(3, 5)))]
    measured = []
    for k in (2, 3):
        measured += [{"metric": f"{k}-NN accuracy", "value": k / 10},
                     {"metric": "silhouette in 2-d", "value": k / 100}]
    report.draw_umap(run, panels, measured)
    assert shown == ["clean\n2-NN 20.0 %, silhouette 0.02", "noise\n3-NN 30.0 %, silhouette 0.03"]
    with np.load(tmp_path / "part1_umap.npz") as file:
        assert file["panel"].tolist() == 3 * ["clean"] + 2 * ["noise"]
        assert file["label"].tolist() == labels.tolist()
        assert np.array_equal(file["coordinates"], features + 7)

    def full(_):
        raise OSError(28, "disk full")

    monkeypatch.setattr(os, "fsync", full)
    report.draw_umap(run, panels, 4 * [{"metric": "2-NN", "value": 0.5}])
    [line] = capsys.readouterr().out.splitlines()  # not: what was there before is unchanged
    assert line.endswith("part1_umap.npz: disk full; the tables are not affected")


def test_printed_accuracies_have_their_interval_and_n(capsys):
    predicted = torch.arange(1000) >= 700
    run = run_of(None, {})
    row = report.accuracy_row(run, "test", "rotation", 3, "own", predicted, torch.zeros(1000))
    terminal.print_accuracies("title", [row, row | {"metric": "accuracy of ant"}])
    _, _, header, line = capsys.readouterr().out.splitlines()
    assert len(line) == len(header)  # aligned
    expected = ["rotation", "3", "test", "own", "70.0", "67.1", "-", "72.8", "1000"]
    assert line.split() == expected  # Wilson's interval


@pytest.mark.parametrize(("seconds", "said"), [
    (99, "99 s"), (150, "2 min"), (5400, "90 min"), (9000, "2.5 h")])
def test_a_duration_is_said_in_the_unit_of_a_person(seconds, said):
    assert terminal.duration(seconds) == said


@pytest.mark.parametrize(("name", "moved", "ended"), [
    ("backbone.bn1.running_mean", 1e-7, True), ("backbone.bn1.running_mean", 0.1, False),
    ("backbone.conv1.weight", 1e-7, False)])
def test_a_training_has_ended_in_a_checkpoint_of_its_very_weights(tmp_path, small_model, name,
                                                                  moved, ended):
    """BatchNorm's statistics, which are estimated again, may differ by rounding."""
    run = run_of(tmp_path, {})
    run.args["resume"] = True
    common.save_checkpoint(run.path(".pt"), small_model, meta_of(small_model))
    model = copy.deepcopy(small_model)
    model.state_dict()[name].add_(moved)
    found = report.saved_before(run, model)
    assert (found is not None) == ended
    if ended:
        saved = small_model.state_dict()
        assert all(torch.equal(saved[key], value) for key, value in found.state_dict().items())
