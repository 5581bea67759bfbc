"""Checkpoints and files: what is written is complete, what is read is checked."""

import math
import pickle

import pytest
import torch
from conftest import META
from torch import nn

import common
import report

CPU = torch.device("cpu")


def test_checkpoint_round_trip(tmp_path, small_model, photos):
    common.save_checkpoint(tmp_path / "a.pt", small_model, META)
    model, meta = common.load_checkpoint(tmp_path / "a.pt", CPU)
    assert meta == META
    assert not model.training
    with torch.no_grad():
        assert torch.allclose(model(photos / 255), small_model(photos / 255), atol=1e-5)


def test_backbone_loads_into_torchvision(small_model):
    from torchvision.models import resnet18

    other = resnet18(num_classes=10)
    other.conv1, other.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    other.load_state_dict(small_model.backbone.state_dict(), strict=True)
    images = torch.rand(2, 3, 32, 32)
    normalized = (images - torch.tensor(common.MEAN).view(3, 1, 1)) / torch.tensor(common.STD).view(3, 1, 1)
    with torch.no_grad():
        assert torch.allclose(other.eval()(normalized), small_model(images), atol=1e-5)


def test_features_are_what_the_last_layer_sees(small_model, photos):
    logits, features = common.predict(small_model, photos, common.Amp("off", CPU), batch_size=16)
    assert features.shape == (40, 512)
    assert torch.allclose(small_model.backbone.fc(features), logits, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(small_model(photos / 255), logits, atol=1e-4)
    assert not small_model.backbone.avgpool._forward_hooks


@pytest.mark.parametrize("classes", [None, 4])
def test_folding_changes_nothing_but_speed(small_model, photos, classes):
    model = common.Model(16, head=common.ClassMeans(classes, 16)) if classes else small_model
    if classes:
        nn.init.normal_(model.head.means)
        model.backbone.bn1.running_mean.uniform_()
        model.backbone.layer2[0].downsample[1].running_var.uniform_(0.5, 2)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quick = common.folded(model)
    assert model.training and not quick.training
    assert not any(isinstance(m, nn.BatchNorm2d) for m in quick.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.allclose(quick(photos / 255), model.eval()(photos / 255), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("power", [3, 24])
def test_the_average_is_of_the_weights_and_its_batch_statistics_are_its_own(photos, power):
    model = common.Model(2)
    average = common.Average(model, photos, common.Amp("off", CPU), power)
    steps = []
    for _ in range(5):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.1)
        steps.append([weight.detach().clone() for weight in model.parameters()])
        average.update(model)
    share = [float(math.prod(range(k, k + power))) for k in range(1, 6)]  # nearly k to the power
    for *trained, ours in zip(*steps, average.module.parameters(), strict=True):
        expected = sum(s * weight.double() for s, weight in zip(share, trained, strict=True)) / sum(share)
        assert torch.allclose(ours.double(), expected, atol=1e-6)
    weights = [weight.detach().clone() for weight in average.module.parameters()]
    averaged = average.measured()
    with torch.no_grad():
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (common.MEAN, common.STD))
        seen = averaged.backbone.conv1((photos / 255 - mean) / std).double().transpose(0, 1).flatten(1)  # (64, pixels)
    assert torch.allclose(averaged.backbone.bn1.running_mean.double(), seen.mean(1), atol=1e-5)
    assert torch.allclose(averaged.backbone.bn1.running_var.double(), seen.var(1), rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(averaged.parameters(), weights, strict=True))


@pytest.mark.parametrize(("n", "sizes"), [(None, [67, 67, 66]), (100, [100]), (1000, [67, 67, 66])])
def test_the_average_measures_batch_statistics_on_batches_of_all_classes(n, sizes):
    images = (torch.arange(200) // 20).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)  # in the order of classes
    average = common.Average(common.Model(2), images, common.Amp("off", CPU), power=3)
    seen = []
    average.module.register_forward_pre_hook(lambda module, batch: seen.append((batch[0] * 255)[:, 0, 0, 0].round()))
    average.measured(n)
    assert [len(batch) for batch in seen] == sizes
    for batch in seen:
        assert torch.bincount(batch.long()).tolist() == pytest.approx([len(batch) / 10] * 10, abs=1)
    first = {name: tensor.clone() for name, tensor in average.module.state_dict().items()}
    average.measured(50)
    again = average.measured(n).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())  # nothing of before stays


@pytest.mark.parametrize("now", [{"model": nn.Linear(3, 2)}, {"model": nn.Linear(2, 2), "criterion": nn.Linear(2, 2)},
                                 {"model": nn.Linear(2, 2, bias=False)}])
def test_a_state_of_other_code_is_refused_in_one_sentence(tmp_path, now):
    run, generator = {"args": {"resume": True}, "amp": "off", "split_hash": "x"}, torch.Generator()
    before = {"model": nn.Linear(2, 2)}
    common.save_state(tmp_path / "x.pt", run, 3, [{"loss": 1.0}], before, generator)
    assert common.resume(tmp_path / "x.pt", run, before, generator) == (3, [{"loss": 1.0}])
    with pytest.raises(common.UsageError, match=r"^--resume: .*x.pt .*other code.*leave --resume out.*$"):
        common.resume(tmp_path / "x.pt", run, now, generator)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in the checkpoint was run')",))


@pytest.mark.parametrize("content", ["missing", "empty", "text", "truncated", "pickled code", "foreign", "newer",
                                     "other outputs", "other shapes", "no meta"])
def test_what_is_not_a_checkpoint_is_refused_in_one_sentence(tmp_path, small_model, content):
    path = tmp_path / "x.pt"
    good = {"format": common.FORMAT, "version": common.VERSION, "meta": META, "model": small_model.state_dict()}
    if content == "empty":
        path.write_bytes(b"")
    elif content == "text":
        path.write_text("not a checkpoint")
    elif content == "truncated":
        torch.save(good, path)
        path.write_bytes(path.read_bytes()[:100_000])
    elif content == "pickled code":
        path.write_bytes(pickle.dumps(Bomb()))
    elif content == "foreign":
        torch.save(small_model.state_dict(), path)
    elif content == "newer":
        torch.save(good | {"version": common.VERSION + 1}, path)
    elif content == "other outputs":
        torch.save(good | {"meta": META | {"outputs": 7}}, path)
    elif content == "other shapes":
        torch.save(good | {"meta": META | {"outputs": 7, "classes": META["classes"][:7]}}, path)
    elif content == "no meta":
        torch.save({k: v for k, v in good.items() if k != "meta"}, path)
    with pytest.raises(common.UsageError, match="x.pt: ") as error:
        common.load_checkpoint(path, CPU)
    assert "\n" not in str(error.value)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.csv"
    report.write_rows(path, [{"x": 1.5}])
    assert path.read_text() == "x\n1.5\n"

    def rows():
        yield {"x": 2}
        raise OSError(28, "No space left on device")

    class Full(list):
        def __iter__(self):
            return rows()

    with pytest.raises(common.RunError, match="No space left on device; what was there before still stands"):
        report.write_rows(path, Full([{"x": 2}]))
    assert path.read_text() == "x\n1.5\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def test_two_runs_into_the_same_files_are_refused(tmp_path):
    import subprocess
    import sys

    code = ("import sys, time; sys.path.insert(0, '.'); import pathlib, report; "
            f"report.lock(pathlib.Path({str(tmp_path)!r}), 'part1'); print('held', flush=True); time.sleep(60)")
    from conftest import ROOT

    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(common.UsageError, match="another run is writing"):
            report.lock(tmp_path, "part1")
        report.lock(tmp_path, "part3")  # another part's files are free
        other.kill()
    report.lock(tmp_path, "part1")  # and free again once that run is gone


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    import subprocess
    import sys
    import time

    from conftest import ROOT

    path = tmp_path / "state.pt"
    code = ("import sys, torch; sys.path.insert(0, '.'); import common\n"
            f"while True: common._save({str(path)!r}, {{'format': common.FORMAT, 'version': common.VERSION, "
            "'weights': torch.ones(2_000_000)})")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as writer:
        while not path.exists():
            time.sleep(0.01)
        for _ in range(20):
            time.sleep(0.013)
            assert common._load(path, CPU)["weights"].sum() == 2_000_000  # whole at every moment while it is replaced
        writer.kill()
    assert common._load(path, CPU)["weights"].sum() == 2_000_000


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(common.RunError, match="cannot write to .*file.*choose another --results-dir"):
        report.lock(tmp_path / "file", "part1")
    with pytest.raises(common.RunError, match="cannot write .*a.csv.*choose another --results-dir"):
        report.write_rows(tmp_path / "file" / "a.csv", [{"x": 1}])
