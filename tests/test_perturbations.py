"""Perturbations against torchvision or a formula, their strength over severity, and that the test set is frozen."""

import hashlib
import math

import pytest
import torch
import torchvision.transforms.v2.functional as tv

import common
import perturbations
from perturbations import FAMILY, NO_SEVERITY, PERTURBATIONS


def apply(name, images, severity=3, seed=0):
    return PERTURBATIONS[name](images, severity, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_contract(name, photos):
    images = photos / 255
    before = images.clone()
    result = apply(name, images)
    assert result.shape == images.shape
    assert result.dtype == torch.float32
    assert result.min() >= 0
    assert result.max() <= 1
    assert torch.equal(images, before)
    torch.manual_seed(9)  # the global generator has no say
    assert torch.equal(result, apply(name, images))
    with pytest.raises(ValueError, match="severity 6"):
        apply(name, images, 6)


@pytest.mark.parametrize("name", [n for n in PERTURBATIONS if n not in NO_SEVERITY])
def test_strength_grows_with_severity(name, photos):
    images = photos / 255
    errors = [(apply(name, images, severity) - images).square().mean().item() for severity in range(1, 6)]
    assert errors[0] > 0
    assert errors == sorted(errors)


@pytest.mark.parametrize("name", sorted(set(PERTURBATIONS) - NO_SEVERITY - {"pixelate", "jpeg", "posterize",
                                                                            "gaussian_blur"}))
def test_every_image_has_its_own_randomness(name, photos):
    images = (photos[:1] / 255).expand(8, -1, -1, -1).clone()
    results = apply(name, images)
    assert len({tuple(r.flatten().tolist()) for r in results}) > 1


def test_there_are_four_families():
    counts = {family: list(FAMILY.values()).count(family) for family in ("noise", "blur", "color", "geometry")}
    assert sum(counts.values()) == len(PERTURBATIONS) >= 16
    assert set(common.SEEN_FAMILIES) | set(common.HELD_OUT_FAMILIES) == set(counts)
    assert not set(common.SEEN_FAMILIES) & set(common.HELD_OUT_FAMILIES)


GRAY = torch.full((100, 3, 32, 32), 0.5)


@pytest.mark.parametrize("severity", range(1, 6))
def test_noise_strength_is_as_published(severity):
    level = severity - 1
    gaussian = (apply("gaussian_noise", GRAY, severity) - 0.5).std()
    assert gaussian == pytest.approx((0.04, 0.06, 0.08, 0.09, 0.10)[level], rel=0.01)
    shot = (apply("shot_noise", GRAY, severity) - 0.5).std()
    assert shot == pytest.approx(math.sqrt(0.5 / (500, 250, 100, 75, 50)[level]), rel=0.02)
    speckle = (apply("speckle_noise", GRAY, severity) - 0.5).std()
    assert speckle == pytest.approx(0.5 * (0.06, 0.10, 0.12, 0.16, 0.20)[level], rel=0.01)
    impulse = apply("salt_and_pepper", GRAY, severity)
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[level]
    assert (impulse != 0.5).float().mean() == pytest.approx(share, rel=0.03)
    assert (impulse == 1).sum().item() == pytest.approx((impulse == 0).sum().item(), rel=0.1)


def same_strength(monkeypatch, value):
    """Gives every image the same, known draw, so that torchvision's functions can be asked for the same thing."""
    monkeypatch.setattr(perturbations, "signed", lambda images, generator, magnitude: torch.full(
        (len(images), 1, 1, 1), value * magnitude))
    monkeypatch.setattr(perturbations, "uniform", lambda images, generator, *shape, low=0.0, high=1.0: torch.full(
        (len(images), *shape), (low + high) / 2))


def test_color_against_torchvision(photos, monkeypatch):
    images = photos / 255
    assert torch.allclose(apply("grayscale", images), tv.rgb_to_grayscale(images, 3), atol=1e-3)
    for sign in (-1, 1):
        same_strength(monkeypatch, sign)
        assert torch.allclose(apply("brightness", images, 4), tv.adjust_brightness(images, 1 + sign * 0.4), atol=1e-6)
        assert torch.allclose(apply("saturation", images, 2), tv.adjust_saturation(images, 1 + sign * 0.4), atol=2e-3)
        assert torch.allclose(apply("contrast", images, 1), tv.adjust_contrast(images, 1 + sign * 0.15), atol=2e-3)


@pytest.mark.parametrize("severity", range(1, 6))
def test_posterize_against_torchvision(photos, severity):
    assert torch.equal(common.to_uint8(apply("posterize", photos / 255, severity)), tv.posterize(photos, 6 - severity))


@pytest.mark.parametrize("severity", range(1, 6))
def test_pixelate_keeps_the_mean_color_and_only_so_many_pixels(photos, severity):
    result = apply("pixelate", photos / 255, severity)
    side = (26, 22, 18, 14, 10)[severity - 1]
    assert all(len(image[0].unique(dim=0)) <= side for image in result)
    assert (result.mean((2, 3)) - (photos / 255).mean((2, 3))).abs().max() < 0.05


def test_geometry_against_torchvision(photos, monkeypatch):
    images = photos / 255
    assert torch.equal(apply("horizontal_flip", images), tv.horizontal_flip(images))
    assert torch.equal(apply("vertical_flip", images), tv.vertical_flip(images))
    same_strength(monkeypatch, 1)
    inside = (slice(None), slice(None), slice(9, 23), slice(9, 23))  # the border is filled differently
    turned = tv.rotate(images, 15, interpolation=tv.InterpolationMode.BILINEAR)
    assert torch.allclose(apply("rotation", images, 3)[inside], turned[inside], atol=1e-4)
    larger = tv.affine(images, 0, [0, 0], 1.24, [0], interpolation=tv.InterpolationMode.BILINEAR)
    assert torch.allclose(apply("scale", images, 3)[inside], larger[inside], atol=1e-4)
    moved = apply("translation", images, 3)  # the mean angle of pi: three pixels to the left
    assert torch.allclose(moved[..., :-3], images[..., 3:], atol=1e-5)


def test_blur_against_torchvision(photos, monkeypatch):
    same_strength(monkeypatch, 1)
    for severity, sigma in enumerate((0.4, 0.6, 0.7, 0.8, 1.0), 1):
        expected = tv.gaussian_blur(photos / 255, [7, 7], [sigma, sigma])
        assert torch.allclose(apply("gaussian_blur", photos / 255, severity), expected, atol=1e-5)


def test_cutout_covers_its_square():
    images = torch.zeros(20, 3, 32, 32)
    for severity, side in enumerate((6, 8, 10, 12, 16), 1):
        hidden = apply("cutout", images, severity)[:, 0] == 0.5
        assert hidden.sum((1, 2)).tolist() == [side * side] * 20
        assert hidden.any(2).sum(1).tolist() == [side] * 20


def test_hue_turns_red_into_green():
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
    green = perturbations.rotate_hue(red, torch.full((1, 1, 1, 1), 2 * math.pi / 3))
    assert torch.allclose(green.flatten(), torch.tensor([0, 1.0, 0]), atol=1e-6)


def test_test_set_is_frozen(photos):
    """An image's pixels depend on its name, severity and place alone: not on how many others there are."""
    many = photos.repeat(13, 1, 1, 1)  # 520 images: a whole block and a short one
    for name in PERTURBATIONS:
        torch.manual_seed(hash(name) % 1000)
        whole = common.perturb(many, name, 2)
        assert whole.dtype == torch.uint8
        assert torch.equal(whole[:510], common.perturb(many[:510], name, 2))
        other = many.clone()
        other[0] = 255 - other[0]
        assert torch.equal(whole[1:], common.perturb(other, name, 2)[1:])  # nor on what they show
    digest = hashlib.sha256(common.perturb(photos, "salt_and_pepper", 5).numpy().tobytes()).hexdigest()[:16]
    assert digest == "eb4a76803e91f8dd"  # must never change: published numbers are of these pixels


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_pixels_on_the_gpu(photos):
    for name in PERTURBATIONS:
        difference = common.perturb(photos, name, 3).int() - common.perturb(photos.cuda(), name, 3).cpu().int()
        assert difference.abs().max() <= 1
        assert (difference != 0).float().mean() < 1e-3
