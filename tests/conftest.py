"""The tests import the scripts as a student does: from the top level of the project."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402


@pytest.fixture(scope="session")
def photos():
    """Smooth, colorful uint8 images (40,3,32,32): random low-resolution fields, enlarged."""
    fields = torch.rand(40, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    images = torch.nn.functional.interpolate(fields, size=(32, 32), mode="bicubic", align_corners=True)
    return common.to_uint8(images.clamp(0, 1))


@pytest.fixture(scope="session")
def small_model():
    """An untrained model in eval mode, whose batch statistics fit its input."""
    torch.manual_seed(0)
    model = common.Model(outputs=10)
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(32, 3, 32, 32))
    return model.eval()
