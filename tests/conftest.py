"""The tests import the scripts as a student does: from the top level of the project."""

import sys
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import checkpoints  # noqa: E402
import common  # noqa: E402
import perturbations  # noqa: E402

META = {  # what a checkpoint must say of itself
    "part": "part1", "dataset": "toy", "classes": [str(c) for c in range(10)], "head": "none",
    "split_hash": "abc", "epoch": 1, "seed": 0, "versions": {}, "command": "x",
    "device": "cpu", "amp": "off", "metrics": {},
    "args": {"dataset": "digits", "data_dir": "data", "train_fraction": 0.2, "split_seed": 0,
             "seed": 0, "quick": False, "amp": "off"}}


def meta_of(model):
    """META of a checkpoint that holds the model's weights."""
    return META | {"weights": checkpoints.weights_hash(model)}


@pytest.fixture(scope="session")
def photos():
    """Smooth, colorful uint8 images (40,3,32,32): random low-resolution fields, enlarged."""
    fields = torch.rand(40, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    images = torch.nn.functional.interpolate(fields, size=(32, 32), mode="bicubic",
                                             align_corners=True)
    return perturbations.to_uint8(images.clamp(0, 1))


@pytest.fixture(scope="session")
def small_photos(photos):
    """The same in 16×16: a quarter of the time in the network."""
    return photos[:, :, ::2, ::2].contiguous()


@pytest.fixture(scope="session")
def small_model():
    """An untrained model in eval mode, whose batch statistics fit its input.

    With torchvision's network, whatever the first test that asks for it has in its place.
    """
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.models.resnet18", resnet18)
        model = common.Model(outputs=10)
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(32, 3, 16, 16))
    return model.eval()


class Tiny(torch.nn.Module):
    """A network with a ResNet's parts, for tests of what is around it."""

    def __init__(self, num_classes):
        super().__init__()
        self.bn1 = torch.nn.BatchNorm2d(64)
        self.layer4 = torch.nn.Sequential()
        self.avgpool = torch.nn.AdaptiveAvgPool2d(1)
        self.fc = torch.nn.Linear(64, num_classes)

    def forward(self, images):
        return self.fc(self.avgpool(self.bn1(self.conv1(images)).relu()).flatten(1))


@pytest.fixture
def tiny_backbone(monkeypatch):
    """Lets every Model be made with a network that trains in no time."""
    monkeypatch.setattr("torchvision.models.resnet18", Tiny)
