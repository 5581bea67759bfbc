"""One recipe: parts 1, 3 and 4 train in the same way but for what each is about."""

import difflib
import inspect

import part1_baseline
import part3_augmented
import part4_angular

import pytest

THEIR_OWN = {"families", "no_part2", "loss", "alpha_deg", "proxies", "margin", "scale", "augment",
             "shares", "command"}  # arguments


@pytest.mark.parametrize(("part", "flags"), [
    (part3_augmented, []), (part3_augmented, ["--families", "none"]), (part4_angular, []),
    (part4_angular, ["--augment"]), (part4_angular, ["--proxies"])])
def test_every_part_has_part_1s_defaults(part, flags):
    part1 = vars(part1_baseline.parse_args([]))
    ours = vars(part.parse_args(flags))
    assert {"epochs", "batch_size", "lr", "weight_decay", "label_smoothing"} <= set(part1)
    for name, value in part1.items():
        if name not in THEIR_OWN:
            assert ours[name] == value, name
    assert set(ours) - set(part1) <= THEIR_OWN
    assert ours["epochs"] <= 30


PART3 = """\
+step = scheduler.last_epoch
+images = augment(images, generator, step, args.families)"""
PART4 = """\
-batches = common.batches(split.train_images, split.train_labels, args.batch_size, generator)
+batches = common.balanced_batches(split.train_images, split.train_labels, args.batch_size,
+generator)
+if args.augment:
+images = augment(images, generator, step=scheduler.last_epoch)
-logits = model(images)
-loss = F.cross_entropy(logits, labels, label_smoothing=args.label_smoothing)
+embeddings = model.outputs(images)
+loss = criterion(embeddings.float(), labels)
-meter.add(loss, labels, logits)
+meter.add(loss, labels)
+fit_head(averaged, few, amp)"""


@pytest.mark.parametrize(("part", "allowed"), [(part3_augmented, PART3), (part4_angular, PART4)])
def test_the_training_differs_from_part_1s_in_these_lines_alone(part, allowed):
    changes = difflib.ndiff(training(part1_baseline), training(part))
    found = [line[0] + line[2:] for line in changes if line[0] in "+-"]
    assert sorted(found) == sorted(allowed.splitlines())


def training(part):
    """The lines of a part's main from its optimizer to the end of its loop, but for comments."""
    source = inspect.getsource(part.main)
    lines = [line.split("  # ")[0].strip() for line in source.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("optimizer ="))
    end = next(i for i, line in enumerate(lines) if line.startswith("history.append"))
    assert end - start > 25
    return lines[start : end + 1]
