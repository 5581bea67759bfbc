"""One recipe: parts 1, 3 and 4 train in the same way but for what each is about."""

import copy
import difflib
import inspect
import json
import math
from typing import NamedTuple

import checkpoints
import common
import muon
import part1_baseline
import part2_robustness
import part3_augmented
import part4_angular
import report
import summary

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Tiny

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


@pytest.mark.parametrize(("part", "name"), [
    (part1_baseline, "part1"), (part2_robustness, "part2"), (part3_augmented, "part3"),
    (part4_angular, "part4")])
def test_defaults_are_those_of_the_published_results(part, name):
    path = ROOT / f"results/reference/seed1/{name}.json"
    published = json.loads(path.read_text(encoding="utf-8"))["args"]
    ours = vars(part.parse_args([]))
    asked_for = {"dataset", "data_dir", "results_dir", "split_seed", "seed", "compile", "resume",
                 "no_part2", "checkpoint", "severities"}
    for argument in published.keys() & ours.keys() - asked_for:
        assert json.loads(json.dumps(ours[argument])) == published[argument], argument


@pytest.mark.parametrize("seed", [0, 7])
def test_the_seed_is_of_the_weights_and_of_all_that_is_drawn(seed):
    generator = common.seed_everything(seed, torch.device("cpu"))
    expected = torch.rand(3, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(torch.rand(3, generator=generator), expected)


def test_a_step_forgets_the_gradients_of_the_step_before():
    weight = torch.nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.SGD([weight], 0.1)
    for _ in range(2):
        common.Amp("off", torch.device("cpu")).step(3 * weight, optimizer)
    assert weight.item() == pytest.approx(1 - 0.3 - 0.3)


def test_in_fp16_a_gradient_that_overflows_makes_no_step_and_halves_the_scale():
    weight = torch.nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.SGD([weight], 0.1)
    amp = common.Amp("fp16", torch.device("cpu"))
    scale = amp.scaler.get_scale()
    for factor, expected, times in ((3, 0.7, 1), (math.inf, 0.7, 0.5), (3, 0.4, 0.5)):
        amp.step(factor * weight, optimizer)
        assert weight.item() == pytest.approx(expected)
        assert amp.scaler.get_scale() == times * scale


PART3 = """\
+images = augment(images, generator, epoch * steps + meter.steps, args.families)"""
PART4 = """\
-batches = common.batches(split.train_images, split.train_labels, args.batch_size, generator)
+batches = common.balanced_batches(split.train_images, split.train_labels, args.batch_size,
+generator)
+if args.augment:
+images = augment(images, generator, epoch * steps + meter.steps)
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


# ---- a training of 15 steps, watched ------------------------------------------------------------


class Watched(muon.Muon):
    """The optimizer, which keeps every step's learning rate and gradients, and the weights."""

    def __init__(self, model, *args, **keywords):
        super().__init__(model, *args, **keywords)
        self.model = model
        self.rates = []
        self.gradients = []
        self.start = copy.deepcopy(model)
        self.weights = []  # after every step
        self.autocast = []  # whether it was on in a forward pass
        model.backbone.register_forward_pre_hook(
            lambda *_: self.autocast.append(torch.is_autocast_enabled("cpu")))

    def step(self):
        self.rates.append(self.param_groups[0]["lr"])
        self.gradients.append({name: weights.grad.clone() for name, weights
                               in self.model.named_parameters() if weights.grad is not None})
        super().step()
        self.weights.append({name: weights.detach().double()  # a copy
                             for name, weights in self.model.named_parameters()})


class Training(NamedTuple):
    """What is left of a training."""

    part: object  # the module
    batches: list  # (images, labels) of every step, as they were drawn
    optimizer: Watched
    model: common.Model  # the one that was tested
    images: torch.Tensor  # all that were trained on, float in [0,1]
    labels: torch.Tensor
    few: common.Split
    average: common.WeightAverage
    estimated_on: list  # images of every estimate of BatchNorm's statistics
    scored: list  # (model, images) after every epoch


def train(part, folder, *flags):
    """The Training of a part: 5 epochs of 3 batches of 4 images, turned over in augment's place."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 3, 16, 16), dtype=torch.uint8, generator=generator)
    labels = torch.arange(24) % 2
    data = common.Data("toy", ("ant", "bee"), images, labels, images[:2] ^ 1, labels[:2])
    states = []
    models = []
    estimated_on = []
    scored = []
    batches = []
    if part is not part1_baseline:
        flags = "--no-part2", *flags

    def noted(draw):
        def batches_of(*args):
            for batch in draw(*args):
                batches.append(batch)
                yield batch
        return batches_of

    estimate = common.WeightAverage.for_evaluation
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("torchvision.models.resnet18", Tiny)
        monkeypatch.setattr(muon, "Muon", Watched)
        monkeypatch.setattr(common, "load_data", lambda *_: data)
        for name in ("batches", "balanced_batches"):
            monkeypatch.setattr(common, name, noted(getattr(common, name)))
        monkeypatch.setattr(part3_augmented, "augment", lambda images, *_: images.flip(2))
        monkeypatch.setattr(checkpoints, "save_state", lambda *args: states.append(args[2]))
        monkeypatch.setattr(report, "finish", lambda run, model, *_: models.append(model) or [])
        monkeypatch.setattr(summary, "compare", lambda folder: None)
        monkeypatch.setattr(common.WeightAverage, "for_evaluation", lambda self, images, amp:
                            estimated_on.append(images) or estimate(self, images, amp))
        monkeypatch.setattr(common, "evaluation_accuracy", lambda model, split, amp:
                            scored.append((model, split.eval_images)) or 0.5)
        part.main(["--epochs", 5, "--batch-size", 4, "--train-fraction", 0.5, "--lr", 0.02,
                   "--weight-decay", 0.03, "--seed", 1, "--amp", "off", "--results-dir", folder,
                   *flags])
    split = common.split_data(data, 0.5, 0)
    return Training(part, batches, states[-1]["optimizer"], models[0], split.train_images / 255,
                    split.train_labels, common.few_of(split), states[-1]["average"], estimated_on,
                    scored)


def averaged(optimizer, name):
    """The average of a parameter's values after the steps t, which weigh nearly as t to the 12."""
    share = [float(math.prod(range(t, t + 12))) for t in range(1, 16)]
    values = [weights[name] for weights in optimizer.weights]
    total = sum(s * value for s, value in zip(share, values, strict=True))
    return (total / sum(share)).float()


@pytest.fixture(scope="module", params=[part1_baseline, part3_augmented, part4_angular])
def watched(request, tmp_path_factory):
    return train(request.param, tmp_path_factory.mktemp("results"))


def test_the_rate_warms_up_in_a_fifth_of_the_steps_and_falls_to_a_thousandth(watched):
    up = [0.1 + 0.9 * (1 - math.cos(math.pi * t / 2)) / 2 for t in range(2)]
    down = [0.001 + 0.999 * (1 + math.cos(math.pi * t / 12)) / 2 for t in range(13)]
    assert watched.optimizer.rates == pytest.approx([0.02 * share for share in up + down])


def test_every_part_starts_from_the_weights_of_its_seed(watched, tiny_backbone):
    torch.manual_seed(1)
    expected = common.Model(watched.model.backbone.fc.out_features).backbone
    for name, weights in watched.optimizer.start.backbone.named_parameters():
        assert torch.equal(weights, expected.get_parameter(name)), name


def test_every_step_goes_down_the_loss_of_a_batch_of_training_images_alone(watched):
    known = {image.numpy().tobytes(): label for image, label
             in zip(watched.images, watched.labels, strict=True)}
    model = copy.deepcopy(watched.optimizer.start).double().train()
    starts = [{}, *watched.optimizer.weights[:-1]]
    assert len(starts) == 15
    for before, gradients, (images, labels) in zip(starts, watched.optimizer.gradients,
                                                   watched.batches, strict=True):
        images = images / 255
        assert [known[image.numpy().tobytes()] for image in images] == labels.tolist()
        if watched.part is part3_augmented:
            images = images.flip(2)
        model.load_state_dict(before, strict=False)
        outputs = model.outputs(images.double())
        if watched.part is part4_angular:
            loss = part4_angular.angular_loss(outputs, labels, 36)
        else:
            log_p = outputs.log_softmax(1)
            right = log_p.gather(1, labels.view(-1, 1)).squeeze(1)
            loss = -(0.9 * right + 0.1 * log_p.mean(1)).mean()
        model.zero_grad()
        loss.backward()
        expected = {name: weights.grad for name, weights in model.named_parameters()
                    if weights.grad is not None}
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert torch.allclose(gradient.double(), expected[name], rtol=1e-3, atol=1e-5), name


def test_every_step_has_the_decay_and_momentum_asked_for_and_trains_batch_norm(watched):
    groups = watched.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.03, 0.03]
    assert [group["momentum"] for group in groups] == [0.9, 0.9]  # with a cycle 0.95 in the end
    assert watched.optimizer.model.backbone.bn1.num_batches_tracked == 15


@pytest.mark.parametrize("part", [part1_baseline, part3_augmented, part4_angular])
def test_a_training_in_bf16_has_its_passes_and_its_steps_products_in_bf16(part, tmp_path):
    optimizer = train(part, tmp_path, "--amp", "bf16").optimizer
    assert optimizer.dtype == torch.bfloat16
    assert len(optimizer.autocast) > 15
    assert all(optimizer.autocast)


def test_what_is_tested_is_the_average_on_all_training_images(watched):
    for name, weights in watched.model.backbone.named_parameters():
        expected = averaged(watched.optimizer, f"backbone.{name}")
        assert torch.allclose(weights, expected, atol=1e-6), name
    model = watched.model
    with torch.no_grad():
        seen = model.backbone.conv1((watched.images - model.mean) / model.std)
    assert torch.allclose(model.backbone.bn1.running_mean, seen.mean((0, 2, 3)), atol=1e-5)


def test_the_learning_curve_is_of_the_average_on_few_images(watched):
    *after_epochs, in_the_end = watched.estimated_on
    assert len(after_epochs) == len(watched.scored) == 5
    assert all(torch.equal(images, watched.few.train_images) for images in after_epochs)
    assert len(in_the_end) == len(watched.images)
    for model, images in watched.scored:
        assert model is watched.average.model
        assert torch.equal(images, watched.few.eval_images)


def test_part_4_classifies_by_the_means_of_all_training_images(tmp_path):
    trained = train(part4_angular, tmp_path)
    with torch.no_grad():
        embeddings = F.normalize(trained.model.outputs(trained.images), dim=1)
    means = [embeddings[trained.labels == c].mean(0) for c in range(2)]
    expected = F.normalize(torch.stack(means), dim=1)
    assert torch.allclose(trained.model.head.means, expected, atol=1e-5)


def test_a_margin_loss_classifies_by_the_average_of_its_proxies(tmp_path):
    trained = train(part4_angular, tmp_path, "--loss", "cosface")
    expected = averaged(trained.optimizer, "head.means")
    assert torch.allclose(trained.model.head.means, expected, atol=1e-6)
