"""Training steps that never wait for the device; and, where there is a GPU, the same results on it as on the CPU."""

import csv
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import arguments
import common
import part1_baseline
import part2_robustness
import part4_angular
from part3_augmented import augment

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class NoSync(TorchDispatchMode):
    """Raises on operations whose result's value or shape the host has to wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero,
                                        torch.ops.aten.masked_select, torch.ops.aten._unique2)
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
            waits = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if waits:
            raise AssertionError(f"{func} makes the host wait for the device")
        return func(*args, **(kwargs or {}))


def one_step(device, augmented, angular):
    """What the loops of the parts do with a batch; returns it as a function of the step's number."""
    generator = common.seed_everything(0, device)
    amp = common.Amp("off", device)
    model = common.Model(16).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, 1000)
    average = common.Average(model, 100)
    images = torch.randint(256, (24, 3, 32, 32), dtype=torch.uint8, device=device)
    labels = torch.arange(24, device=device) % 4
    criterion = part4_angular.AngularLoss(45, 1.0) if angular else F.cross_entropy
    epoch = common.Epoch(0, 1, [], 1)

    def step(number):
        batch = common.to_float(images)
        if augmented:
            batch = augment(batch, generator, number)
        with amp.autocast():
            outputs = model(batch)
        loss = criterion(outputs, labels)
        amp.step(loss, optimizer)
        scheduler.step()
        average.update(model)
        epoch.add(loss, outputs, labels)

    return step


def test_the_detector_detects():
    for waits in (lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.unique()):
        with pytest.raises(AssertionError, match="wait"), NoSync():
            waits(torch.ones(3))


@pytest.mark.parametrize("angular", [False, True])
def test_a_training_step_never_waits_for_the_device(angular):
    step = one_step(torch.device("cpu"), augmented=False, angular=angular)
    step(0)
    with NoSync():
        step(1)
    with NoSync():
        for images, _ in itertools.islice(common.batches(torch.zeros(64, 3, 4, 4), torch.zeros(64), 16,
                                                         torch.Generator()), 2):
            assert len(images) == 16


def test_nor_does_any_perturbation_of_the_training_data():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(24, 3, 32, 32)
    for step in range(40):  # every member of every family that is trained on, at several severities
        with NoSync():
            augment(images, generator, step)


def test_compile_says_in_one_sentence_that_it_cannot(monkeypatch):
    def broken(function):
        raise RuntimeError("no compiler\nwas found")

    monkeypatch.setattr(torch, "compile", broken)
    model = common.Model(2)
    with pytest.raises(arguments.UsageError, match=r"--compile.*\(no compiler\); leave it out"):
        common.compile_backbone(model, torch.device("cpu"))


def test_a_compiled_backbone_keeps_the_names_of_its_weights(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    model = common.Model(2)
    names = list(model.state_dict())
    common.compile_backbone(model, torch.device("cpu"))
    assert list(model.state_dict()) == names


@needs_gpu
def test_no_step_synchronizes_on_the_gpu():
    for augmented, angular in itertools.product((False, True), repeat=2):
        step = one_step(torch.device("cuda"), augmented, angular)
        step(0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for number in range(1, 40):
                step(number)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_split_predictions_and_attack_are_the_same_on_the_gpu(photos, small_model):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert (common.split_data(common.load_data("digits", "data", cpu), 0.2, 0).hash
            == common.split_data(common.load_data("digits", "data", gpu), 0.2, 0).hash)
    images, labels = photos / 255, torch.arange(40) % 10
    results = []
    for device in (cpu, gpu):
        model = small_model.to(device)
        found = common.predict(model, images.to(device), common.Amp("off", device))
        direction = common.fgsm_direction(model, images.to(device), labels.to(device))
        adversarial = common.pgd(model, images.to(device), labels.to(device), 8 / 255)
        assert (adversarial - images.to(device)).abs().max() <= 8 / 255 + 1e-6
        results.append((found.logits.cpu(), found.features.cpu(), direction.cpu()))
    small_model.to(cpu)
    for ours, theirs in zip(results[0][:2], results[1][:2], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)
    assert (results[0][2] == results[1][2]).float().mean() > 0.99


@needs_gpu
@pytest.mark.parametrize("amp", ["off", "auto", "fp16"])
def test_all_parts_run_on_the_gpu(tmp_path, amp):
    common_arguments = ["--dataset", "digits", "--quick", "--device", "cuda", "--umap-points", "60", "--amp", amp,
                        "--results-dir", str(tmp_path)]
    part1_baseline.main(common_arguments)
    part2_robustness.main(["--checkpoint", str(tmp_path / "part1.pt"), *common_arguments])
    part4_angular.main([*common_arguments, "--augment", "--no-umap"])
    part4_angular.main([*common_arguments, "--no-umap", "--resume", "--loss", "angular"])
    with open(tmp_path / "part4_robustness.csv", newline="") as file:
        values = [float(r["value"]) for r in csv.DictReader(file) if r["metric"] == "accuracy"]
    assert len(values) > 30
    assert all(0 <= v <= 1 for v in values)
