"""Training steps never wait for the device; a GPU, where there is one, gives the CPU's results."""

import contextlib

import arguments
import checkpoints
import common
import network
import part1_baseline
import part2_robustness
import part3_augmented
import part4_angular
import storage
import terminal

import pytest
import torch
from conftest import META
from torch.utils._python_dispatch import TorchDispatchMode

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class NoSync(TorchDispatchMode):
    """Raises on operations whose result's value or shape the host has to wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero,
                                        torch.ops.aten.masked_select, torch.ops.aten._unique2)
        aten = torch.ops.aten
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            waits = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if waits:
            raise AssertionError(f"{func} makes the host wait for the device")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def steps_in(monkeypatch):
    """A function that lets every training step of the parts run in a context."""
    def install(context):
        def iterate(epoch):
            batches = iter(epoch.bar)
            batch = next(batches)  # what is prepared once an epoch may wait
            while batch is not None:
                with context():
                    yield batch
                    batch = next(batches, None)

        monkeypatch.setattr(terminal.EpochMeter, "__iter__", iterate)
    return install


@contextlib.contextmanager
def gpu_sync_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


QUICK = ["--dataset", "digits", "--quick", "--no-umap"]
TRAININGS = {"part1": (part1_baseline, []), "part3": (part3_augmented, ["--no-part2"]),
             "part4": (part4_angular, ["--no-part2"]),
             "part4_proxies": (part4_angular, ["--no-part2", "--proxies"]),
             "part4_augmented": (part4_angular, ["--no-part2", "--augment", "--loss", "arcface"])}


def test_the_detector_detects():
    for waits in (lambda x: x.sum().item(), lambda x: x[x > 0], torch.nonzero, torch.unique):
        with pytest.raises(AssertionError, match="wait"), NoSync():
            waits(torch.ones(3))


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_step_never_waits_for_the_device(name, steps_in, tmp_path, tiny_backbone):
    part, flags = TRAININGS[name]
    steps_in(NoSync)
    part.main([*QUICK, *flags, "--amp", "off", "--device", "cpu", "--batch-size", "40",
               "--results-dir", str(tmp_path)])
    assert (tmp_path / f"{name}.pt").exists()
    assert not list(tmp_path.glob("*robustness*"))  # --no-part2


@pytest.mark.parametrize(("bf16", "trials", "precision"), [
    (1, 1, "bf16"), (9, 1, "off"), (2.8, 1, "bf16"), (4, 10, "bf16"), (5, 10, "off")])
def test_the_trial_of_precisions_ends_when_it_is_clear(monkeypatch, bf16, trials, precision):
    now = 0.0
    calls = []

    def clock():
        nonlocal now
        calls.append(now)
        if len(calls) % 2 == 0:  # the end of a call; bf16 and float32 (4 seconds at first) in turn
            now += bf16 if len(calls) % 4 == 2 else 4.1
        return now

    monkeypatch.setattr(network, "AMX", False)
    monkeypatch.setattr(network, "CPU", {})
    monkeypatch.setattr(common.time, "perf_counter", clock)
    assert common.fastest_precision.__wrapped__(torch.device("cpu")) == precision
    assert len(calls) == 4 * (1 + trials)  # the first of each prepares


@pytest.mark.parametrize(("amx", "has"), [(True, {}), (False, {"avx512_bf16": True})])
def test_where_the_processor_has_bf16_no_trial_decides(monkeypatch, amx, has):
    def clock():
        raise AssertionError("measured")

    monkeypatch.setattr(network, "AMX", amx)
    monkeypatch.setattr(network, "CPU", has)
    monkeypatch.setattr(common.time, "perf_counter", clock)
    assert common.fastest_precision.__wrapped__(torch.device("cpu")) == "bf16"


def test_each_gpu_is_asked_for_its_own_precision(monkeypatch):
    capabilities = {0: (9, 0), 1: (7, 5), 2: (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability",
                        lambda device: capabilities[device.index])
    found = [common.fastest_precision.__wrapped__(torch.device("cuda", i)) for i in range(3)]
    assert found == ["bf16", "fp16", "bf16"]


def test_float32_on_a_gpu_is_not_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("high")  # as in NVIDIA's containers
    common.pick_device("cpu")
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_a_gpu_that_cannot_be_used_leaves_the_cpu(monkeypatch):
    def no_kernel(*shape, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", no_kernel)
    with pytest.raises(arguments.UsageError, match="no kernel image.*try --device cpu"):
        common.pick_device("auto")  # so "try --device auto" would be no way out


def test_part_2_computes_as_the_checkpoint_was_trained(monkeypatch):
    def measured_anew(device):
        raise AssertionError("measured anew")

    monkeypatch.setattr(common, "fastest_precision", measured_anew)
    for trained in ("bf16", "off"):
        args = part2_robustness.parse_args([])
        meta = META | {"amp": trained, "args": META["args"] | {"amp": "auto"}}
        arguments.take_from_checkpoint(args, meta)
        assert common.Amp(args.amp, torch.device("cpu")).name == trained
    args = part2_robustness.parse_args(["--amp", "off"])
    arguments.take_from_checkpoint(args, meta | {"args": META["args"] | {"amp": "bf16"}})
    assert args.amp == "off"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_nor_does_any_perturbation_of_the_training_data(device):
    generator = torch.Generator(device).manual_seed(0)
    images = torch.rand(24, 3, 32, 32, device=device)
    context = gpu_sync_is_an_error if device == "cuda" else NoSync
    for step in range(40):  # every member of every family that is trained on, at several severities
        with context():
            part3_augmented.augment(images, generator, step)


def test_compile_says_in_one_sentence_that_it_cannot(monkeypatch):
    def broken(function):
        raise RuntimeError("no compiler\nwas found")

    monkeypatch.setattr(torch, "compile", broken)
    model = common.Model(2)
    with pytest.raises(arguments.UsageError, match=r"--compile.*\(no compiler\); leave it out"):
        common.compile_backbone(model, torch.device("cpu"))


def test_a_compiled_backbone_keeps_the_names_of_its_weights(monkeypatch):
    def wrap(what, **words):  # as torch.compile does with a module
        if isinstance(what, torch.nn.Module):
            return torch.nn.ModuleDict({"_orig_mod": what})
        return what

    monkeypatch.setattr(torch, "compile", wrap)
    model = common.Model(2)
    names = list(model.state_dict())
    common.compile_backbone(model, torch.device("cpu"))
    assert list(model.state_dict()) == names


@needs_gpu
@pytest.mark.parametrize("name", TRAININGS)
def test_no_step_synchronizes_on_the_gpu(name, steps_in, tmp_path):
    part, flags = TRAININGS[name]
    amp = common.fastest_precision(torch.device("cuda"))
    amp = "off" if amp == "fp16" else amp  # torch's GradScaler waits in every step
    steps_in(gpu_sync_is_an_error)
    part.main([*QUICK, *flags, "--device", "cuda", "--amp", amp, "--results-dir", str(tmp_path)])


@needs_gpu
@pytest.mark.parametrize(("compute", "shapes"), [
    (torch.conv2d, [(8, 64, 8, 8), (64, 64, 3, 3)]), (torch.matmul, [(512, 512), (512, 512)])])
def test_float32_on_the_gpu_has_all_its_bits(compute, shapes):
    device = common.pick_device("cuda")
    factors = [torch.randn(shape).to(device) for shape in shapes]
    exact = compute(*[factor.double() for factor in factors])
    error = (compute(*factors) - exact).abs().max() / exact.abs().max()
    assert error < 5e-5  # 3e-4 in TF32


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
def test_all_parts_run_and_resume_on_the_gpu(tmp_path, amp, monkeypatch, capsys):
    flags = ["--dataset", "digits", "--quick", "--device", "cuda", "--amp", amp, "--results-dir",
             str(tmp_path)]
    part1_baseline.main([*flags, "--umap-points", "60"])
    part2_robustness.main(["--checkpoint", str(tmp_path / "part1.pt"), *flags, "--no-umap"])
    part3_augmented.main([*flags, "--no-umap"])
    part4_angular.main([*flags, "--no-umap", "--augment"])

    def save_and_stop(*arguments):
        save_state(*arguments)
        raise KeyboardInterrupt

    save_state = checkpoints.save_state
    monkeypatch.setattr(checkpoints, "save_state", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        part4_angular.main([*flags, "--no-umap"])
    monkeypatch.setattr(checkpoints, "save_state", save_state)
    part4_angular.main([*flags, "--no-umap", "--resume"])
    assert "Resumed after epoch 1" in capsys.readouterr().out
    for part in ("part2", "part3_robustness", "part4_robustness", "part4_augmented_robustness"):
        values = [row["value"] for row in storage.read_table(tmp_path / f"{part}.csv")
                  if row["metric"] == "accuracy"]
        assert len(values) > 30
        assert all(0 <= v <= 1 for v in values)


@needs_gpu
def test_compiled_on_the_gpu(tmp_path):
    flags = ["--device", "cuda", "--compile", "--no-umap", "--results-dir", str(tmp_path)]
    part1_baseline.main([*QUICK, *flags])
    part2_robustness.main(["--checkpoint", str(tmp_path / "part1.pt"), *flags])
    assert (tmp_path / "part2.csv").exists()
