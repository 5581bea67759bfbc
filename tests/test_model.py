"""The network: its checkpoint, its features, folding for inference, the average of its weights."""

import copy
import math
import unittest.mock

import checkpoints
import common
import muon
import network
import part1_baseline
import part3_augmented
import part4_angular
from arguments import UsageError

import pytest
import torch
from conftest import META, meta_of
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

CPU = torch.device("cpu")


def normalized(images):
    mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)  # CIFAR-10's red, green, blue
    std = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)
    return (images - mean) / std


def test_checkpoint_round_trip(tmp_path, small_model, photos):
    common.save_checkpoint(tmp_path / "a.pt", small_model, meta_of(small_model))
    model, meta = common.load_checkpoint(tmp_path / "a.pt", CPU)
    assert meta == meta_of(small_model)
    assert not model.training
    with torch.no_grad():
        assert torch.allclose(model(photos / 255), small_model(photos / 255), atol=1e-5)


@pytest.mark.parametrize("odd", [
    {"epoch": True}, {"part": "part5"}, {"head": "probe"}, {"classes": ["ant"]},
    {"classes": ["ant", 2]}, {"metrics": {"accuracy": 1}}, {"args": META["args"] | {"quick": 1}},
    {"args": META["args"] | {"train_fraction": "0.2"}}])
def test_a_checkpoint_that_says_what_no_training_does_is_refused(odd):
    meta = META | {"weights": "0" * 12}
    common.check_meta(meta)
    with pytest.raises((TypeError, ValueError)):
        common.check_meta(meta | odd)


def test_backbone_loads_into_torchvision(small_model):
    other = resnet18(num_classes=10)
    other.conv1, other.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    other.load_state_dict(small_model.backbone.state_dict(), strict=True)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        logits = other.eval()(normalized(images))
        assert torch.allclose(logits, small_model(images), atol=1e-5)


def test_images_of_whole_numbers_are_refused(small_model, small_photos):
    with pytest.raises(ValueError, match="takes float images in .* found torch.uint8"):
        small_model(small_photos)


def test_images_that_are_float_already_are_not_divided_again(small_photos):
    with pytest.raises(ValueError, match="takes uint8 images, found torch.float32"):
        common.to_float(common.to_float(small_photos))


def test_a_checkpoint_on_a_device_that_is_not_there_is_not_called_damaged(tmp_path):
    model = common.Model(10)
    common.save_checkpoint(tmp_path / "a.pt", model, meta_of(model))
    with pytest.raises((AssertionError, RuntimeError)):  # torch's own words
        common.load_checkpoint(tmp_path / "a.pt", "cuda:99")


def test_features_are_what_the_last_layer_sees(small_model, photos):
    amp = common.Amp("off", CPU)
    logits, features, _ = common.predict(small_model, photos, amp, batch_size=16)
    assert features.shape == (40, 512)
    assert torch.allclose(small_model.backbone.fc(features), logits, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(small_model(photos / 255), logits, atol=1e-4)


@pytest.mark.parametrize("head", [None, common.ClassMeans(10, 10)])
def test_an_inference_predicts_what_its_model_does(photos, head):
    model = common.Model(10, head).eval()
    if head:
        nn.init.normal_(head.means)
    amp = common.Amp("off", CPU)
    once = common.predict(model, photos, amp, batch_size=16)
    for _ in range(2):  # it is used again and again
        found = common.predict(common.Inference(model), photos, amp, batch_size=16)
        assert torch.equal(found.logits, once.logits)
        assert torch.equal(found.features, once.features)
    with torch.no_grad():
        assert torch.allclose(once.logits, model(photos / 255), rtol=1e-3, atol=1e-4)


def test_a_students_forward_is_what_predicts(small_model, photos, monkeypatch):
    amp = common.Amp("off", CPU)
    before = common.predict(small_model, photos, amp)
    forward = common.Model.forward
    monkeypatch.setattr(common.Model, "forward", lambda self, images: 1000 * forward(self, images))
    after = common.predict(small_model, photos, amp)
    assert torch.allclose(after.logits, 1000 * before.logits)
    assert torch.equal(after.features, before.features)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("n", "side"), [(1, 4), (3, 2), (5, 8), (2, 6)])
def test_images_side_by_side_are_the_same_convolution(stride, n, side):
    plain = nn.Conv2d(7, 5, 3, stride, 1, bias=False).double()
    side_by_side = network.SideBySide(plain)
    images = torch.randn(n, 7, side, side, dtype=torch.float64, requires_grad=True)
    one, other = plain(images), side_by_side.wide(images)
    assert torch.allclose(one, other, atol=1e-12)
    change = torch.randn_like(one)
    for a, b in zip(torch.autograd.grad(one, (images, plain.weight), change),
                    torch.autograd.grad(other, (images, plain.weight), change), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("folded", [False, True])
def test_side_by_side_in_bf16_is_as_near_to_float32(small_model, photos, monkeypatch, folded):
    model = common.folded(small_model) if folded else small_model
    images = photos[:8] / 255
    errors = []
    wide = unittest.mock.Mock(side_effect=network.SideBySide.wide, autospec=True)
    monkeypatch.setattr(network.SideBySide, "wide", lambda *args: wide(*args))
    with torch.no_grad():
        exact = model(images)
        for amx in (False, True):
            monkeypatch.setattr(network, "AMX", amx)
            with common.Amp("bf16", CPU).autocast():
                errors.append((model(images) - exact).abs().max().item())
            assert wide.call_count == 4 * amx  # the convolutions of layer4, in bf16 alone
    assert errors[1] < 1.5 * errors[0] + 1e-3 * exact.abs().max()


def test_images_lie_side_by_side_on_a_cpu_alone(monkeypatch):
    monkeypatch.setattr(network, "AMX", True)
    monkeypatch.setattr(network.SideBySide, "wide", lambda *arguments: "wide")
    convolution = network.SideBySide(nn.Conv2d(7, 5, 3, 1, 1, bias=False)).bfloat16()
    assert convolution(torch.zeros(2, 7, 4, 4, dtype=torch.bfloat16)) == "wide"
    elsewhere = convolution.to("meta")(torch.zeros(2, 7, 4, 4, dtype=torch.bfloat16, device="meta"))
    assert elsewhere.shape == (2, 5, 4, 4)


class OnMps(torch.Tensor):
    """Says that it is on an Apple GPU, whose BatchNorm is wrong for channels_last."""

    device = torch.device("mps")


@pytest.mark.parametrize(("images", "contiguous"), [(OnMps, True), (torch.Tensor, False)])
def test_an_apple_gpu_gets_contiguous_images(small_model, images, contiguous):
    seen = []
    hook = small_model.backbone.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with hook, torch.no_grad():
        small_model(common.to_float(torch.ones(2, 3, 16, 16).byte()).as_subclass(images))
    assert seen[0].device.type == ("mps" if contiguous else "cpu")
    assert seen[0].is_contiguous() == contiguous


@pytest.mark.parametrize("part", [part1_baseline, part3_augmented, part4_angular])
def test_nor_does_an_apple_gpu_get_channels_last_weights(part, tmp_path, monkeypatch):
    """With such weights its convolutions give channels_last also of contiguous images."""
    found = {device: network.layout(torch.device(device)) for device in ("cpu", "cuda", "mps")}
    assert found == {"cpu": torch.channels_last, "cuda": torch.channels_last,
                     "mps": torch.contiguous_format}

    class SeenError(Exception):
        pass

    def weights_seen(model, *arguments, **keywords):
        raise SeenError({p.is_contiguous() for p in model.parameters()})

    monkeypatch.setattr(common, "layout", lambda device: found["mps"])  # no such device here
    monkeypatch.setattr(muon, "Muon", weights_seen)
    with pytest.raises(SeenError, match="{True}"):
        part.main(["--dataset", "digits", "--quick", "--results-dir", str(tmp_path)])


def test_a_checkpoint_is_read_in_the_layout_of_the_device(tmp_path, monkeypatch):
    model = common.Model(10).to(memory_format=torch.channels_last)
    common.save_checkpoint(tmp_path / "a.pt", model, meta_of(model))
    for format in (torch.channels_last, torch.contiguous_format):
        monkeypatch.setattr(common, "layout", lambda device, format=format: format)
        read, _ = common.load_checkpoint(tmp_path / "a.pt", torch.device("cpu"))
        weights = read.backbone.layer1[0].conv1.weight
        assert weights.is_contiguous(memory_format=format)
        assert weights.is_contiguous() == (format is torch.contiguous_format)


def test_weights_do_not_depend_on_the_processor(monkeypatch):
    hashes = set()
    for amx in (False, True):
        monkeypatch.setattr(network, "AMX", amx)
        common.seed_everything(0, CPU)
        hashes.add(checkpoints.weights_hash(common.Model(10)))
    assert len(hashes) == 1


@pytest.mark.parametrize("classes", [None, 4])
def test_folding_changes_nothing_but_speed(small_model, photos, classes):
    model = copy.deepcopy(small_model)
    if classes:
        model = common.Model(16, head=common.ClassMeans(classes, 16))
        nn.init.normal_(model.head.means)
        model.backbone.bn1.running_mean.uniform_()
        model.backbone.layer2[0].downsample[1].running_var.uniform_(0.5, 2)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quick = common.folded(model)
    assert model.training
    assert not quick.training
    assert not any(isinstance(m, nn.BatchNorm2d) for m in quick.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.allclose(quick(photos / 255), model.eval()(photos / 255), rtol=1e-3, atol=1e-4)


class NormLast(BasicBlock):
    """A student's block: BatchNorm after ReLU, the modules named in the old order."""

    def forward(self, x):
        out = self.bn1(self.conv1(x).relu())
        out = self.bn2(self.conv2(out).relu())
        return out + (x if self.downsample is None else self.downsample(x))


class NamedApart(nn.Module):
    """Convolutions first, norms after: conv2 and bn1 are neighbours in name alone."""

    expansion = 1

    def __init__(self, inplanes, planes, stride=1, *rest):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.bn2 = nn.BatchNorm2d(planes)

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()


@pytest.mark.parametrize("block", [NormLast, NamedApart, Bottleneck])
def test_another_block_predicts_what_it_trains(small_photos, monkeypatch, block):
    torch.manual_seed(0)
    monkeypatch.setattr("torchvision.models.resnet18",
                        lambda num_classes: ResNet(block, [1, 1, 1, 1], num_classes))
    model = common.Model(10).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    predicted = common.predict(model, small_photos, common.Amp("off", CPU)).logits
    with torch.no_grad():
        expected = model(small_photos / 255)
    assert torch.allclose(predicted, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("edited", "said"), [
    (lambda: nn.DataParallel(common.Model(10)), "its class DataParallel"),
    (lambda: common.Model(10, nn.Linear(10, 10)), "its head Linear"),
    (lambda: common.Model(64, common.ClassMeans(10, 64)), "backbone.fc.bias"),
    (lambda: common.Model(20), "backbone.fc.bias"),
    (lambda: with_dropout(common.Model(10)), "backbone.fc.0")])
def test_a_network_that_part_2_could_not_make_is_refused(tiny_backbone, edited, said):
    with pytest.raises(UsageError, match=f"{said}.* is not as in network.py's Model"):
        network.check_rebuilt(edited(), 10)


def test_a_constructor_that_reads_a_number_from_a_tensor_is_refused(tiny_backbone, monkeypatch):
    """As for rates of stochastic depth."""
    original = common.Model.__init__

    def init(model, outputs, head=None):
        original(model, outputs, head)
        model.rates = [rate.item() for rate in torch.linspace(0, 0.1, 4)]

    monkeypatch.setattr(common.Model, "__init__", init)
    with pytest.raises(UsageError, match="item.* on meta tensors; edit Model.__init__"):
        network.check_rebuilt(common.Model(10), 10)


def with_dropout(model):
    model.backbone.fc = nn.Sequential(nn.Linear(64, 10), nn.Dropout())
    return model


def test_a_network_that_part_2_can_make_is_checked_without_a_random_number(tiny_backbone):
    models = common.Model(10), common.Model(128, common.ClassMeans(10, 128))
    before = torch.get_rng_state()
    for model in models:
        network.check_rebuilt(model, 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_that_starts_from_other_weights_is_read_without_warnings(
        tmp_path, small_model, monkeypatch, recwarn):
    """As where a student's Model loads pretrained weights."""
    def pretrained(num_classes):
        backbone = resnet18(num_classes=num_classes)
        backbone.load_state_dict({"fc.bias": bias}, strict=False)
        return backbone

    bias = torch.ones(10)
    common.save_checkpoint(tmp_path / "a.pt", small_model, meta_of(small_model))
    monkeypatch.setattr("torchvision.models.resnet18", pretrained)
    model, _ = common.load_checkpoint(tmp_path / "a.pt", CPU)
    assert torch.equal(model.backbone.fc.bias, small_model.backbone.fc.bias)
    assert not recwarn.list


def test_a_norm_after_anything_but_a_convolution_stays(small_photos, monkeypatch):
    """As in a student's small network, or in a stem of several layers."""
    torch.manual_seed(0)
    monkeypatch.setattr("torchvision.models.resnet18",
                        lambda num_classes: ResNet(BasicBlock, [1, 1, 1, 1], num_classes))
    model = common.Model(10).eval()
    net = model.backbone
    net.conv1 = nn.Sequential(net.conv1, nn.ReLU())
    net.layer1 = nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.BatchNorm2d(64)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
    predicted = common.predict(model, small_photos, common.Amp("off", CPU)).logits
    with torch.no_grad():
        expected = model(small_photos / 255)
    assert torch.allclose(predicted, expected, rtol=1e-3, atol=1e-4)


class Standardized(nn.Conv2d):
    """A student's convolution, whose weights have mean 0 and deviation 1 whatever they are."""

    def forward(self, images):
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return self._conv_forward(images, weight, self.bias)


class Bounded(nn.BatchNorm2d):
    def forward(self, images):
        return super().forward(images).tanh()


def with_a_hook(layer):
    layer.register_forward_hook(lambda module, inputs, output: output.relu())
    return layer


@pytest.mark.parametrize(("name", "layer"), [
    ("conv1", Standardized(3, 64, 3)), ("conv1", spectral_norm(nn.Conv2d(3, 64, 3))),
    ("conv1", with_a_hook(nn.Conv2d(3, 64, 3))), ("bn1", Bounded(64))])
def test_a_students_layer_predicts_what_it_trains(small_photos, name, layer):
    torch.manual_seed(0)
    model = common.Model(10)
    setattr(model.backbone, name, layer)
    model.backbone.bn1.running_var.uniform_(0.1, 4)
    model.backbone.bn1.running_mean.uniform_(-1, 1)
    predicted = common.predict(model, small_photos, common.Amp("off", CPU)).logits
    with torch.no_grad():
        expected = model.eval()(small_photos / 255)
    assert torch.allclose(predicted, expected, rtol=1e-3, atol=1e-4)


def test_a_students_convolution_does_not_lie_side_by_side():
    words = {"padding": 1, "bias": False}
    assert network.SideBySide.computes(nn.Conv2d(512, 512, 3, **words))
    assert not network.SideBySide.computes(Standardized(512, 512, 3, **words))


@pytest.mark.parametrize("change", [{}, {"kernel_size": 5, "padding": 2}, {"groups": 2},
                                    {"bias": True}, {"dilation": 2, "padding": 2},
                                    {"dilation": 2}, {"padding_mode": "reflect"}])
def test_only_3x3_convolutions_of_all_channels_lie_side_by_side(monkeypatch, change):
    """Others would mix neighbouring images, or are not what `wide` computes."""
    words = {"kernel_size": 3, "padding": 1, "bias": False} | change

    def resnet(num_classes):
        network = resnet18(num_classes=num_classes)
        network.layer4[1].conv2 = nn.Conv2d(512, 512, **words)
        return network

    monkeypatch.setattr("torchvision.models.resnet18", resnet)
    kinds = {name: type(module) for name, module in common.Model(10).backbone.named_modules()}
    assert kinds["layer4.1.conv1"] is network.SideBySide
    assert (kinds["layer4.1.conv2"] is network.SideBySide) == (not change)


@pytest.mark.parametrize(("width", "stride", "wide"), [(4, 1, True), (8, 2, True), (7, 2, False),
                                                       (3, 1, True), (16, 2, False)])
def test_only_small_images_that_the_stride_divides_lie_side_by_side(monkeypatch, width, stride,
                                                                    wide):
    monkeypatch.setattr(network, "AMX", True)
    called = unittest.mock.Mock(side_effect=network.SideBySide.wide, autospec=True)
    monkeypatch.setattr(network.SideBySide, "wide", lambda *args: called(*args))
    convolution = nn.Conv2d(7, 5, 3, stride, 1, bias=False).bfloat16()
    images = torch.randn(2, 7, width, width).bfloat16()
    found = network.SideBySide(convolution)(images)
    assert called.called == wide
    assert torch.allclose(found, convolution(images), atol=0.05)


@pytest.mark.parametrize("power", [3, 24])
def test_the_average_is_of_the_weights_and_its_batch_statistics_are_its_own(photos, power):
    model = common.Model(2)
    average = common.WeightAverage(model, power)
    steps = []
    for _ in range(5):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.1)
        steps.append([weight.detach().clone() for weight in model.parameters()])
        average.update(model)
    share = [float(math.prod(range(k, k + power))) for k in range(1, 6)]  # nearly k to the power
    for *trained, ours in zip(*steps, average.model.parameters(), strict=True):
        total = sum(s * weight.double() for s, weight in zip(share, trained, strict=True))
        assert torch.allclose(ours.double(), total / sum(share), atol=1e-6)
    weights = [weight.detach().clone() for weight in average.model.parameters()]
    averaged = average.for_evaluation(photos, common.Amp("off", CPU))
    with torch.no_grad():
        seen = averaged.backbone.conv1(normalized(photos / 255)).double()
    seen = seen.transpose(0, 1).flatten(1)  # (64, pixels)
    assert torch.allclose(averaged.backbone.bn1.running_mean.double(), seen.mean(1), atol=1e-5)
    assert torch.allclose(averaged.backbone.bn1.running_var.double(), seen.var(1), rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(averaged.parameters(), weights, strict=True))


@pytest.mark.parametrize(("step", "sizes"), [(1, [67, 67, 66]), (2, [100]), (5, [40])])
def test_the_average_estimates_batch_statistics_on_batches_of_all_classes(step, sizes):
    images = (torch.arange(200) // 20).to(torch.uint8)  # in the order of classes
    images = images.view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    average = common.WeightAverage(common.Model(2), power=3)
    seen = []
    average.model.register_forward_pre_hook(
        lambda module, batch: seen.append((batch[0] * 255)[:, 0, 0, 0].round()))
    amp = common.Amp("off", CPU)
    average.for_evaluation(images[::step], amp)
    assert [len(batch) for batch in seen] == sizes
    for batch in seen:
        even = [len(batch) / 10] * 10
        assert torch.bincount(batch.long()).tolist() == pytest.approx(even, abs=1)
    first = {name: tensor.clone() for name, tensor in average.model.state_dict().items()}
    average.for_evaluation(images[:50], amp)
    again = average.for_evaluation(images[::step], amp).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_batch_statistics_and_predictions_are_in_the_precision_of_the_training(small_photos,
                                                                               tiny_backbone):
    average = common.WeightAverage(common.Model(2), power=3)
    inside = []
    average.model.register_forward_pre_hook(
        lambda *_: inside.append(torch.is_autocast_enabled("cpu")))
    amp = common.Amp("bf16", CPU)
    common.predict(average.for_evaluation(small_photos, amp), small_photos, amp)
    assert inside == [True, True]
