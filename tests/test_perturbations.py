"""Perturbations against torchvision or a formula, their strength over severity, at other sizes and
on devices that lack operators; and that the test set is frozen, on every processor."""

import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path

import common
import perturbations
from perturbations import FAMILY, NO_SEVERITY, PERTURBATIONS, to_uint8

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


def apply(name, images, severity=3, seed=0):
    return PERTURBATIONS[name](images, severity, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PERTURBATIONS)
def test_contract(name, dtype, photos):
    images = photos.to(dtype) / 255
    before = images.clone()
    result = apply(name, images)
    assert result.shape == images.shape
    assert result.dtype == dtype
    assert result.min() >= 0
    assert result.max() <= 1
    assert torch.equal(images, before)
    torch.manual_seed(9)  # the global generator has no say
    assert torch.equal(result, apply(name, images))
    with torch.autocast("cpu", torch.bfloat16):  # as around a user's augmentation
        assert torch.equal(result, apply(name, images))
    assert apply(name, images[:0]).shape == (0, 3, 32, 32)
    for odd in (0, 2.5, 6):  # 0 would be the strongest
        with pytest.raises(ValueError, match=f"{name}: severity {odd} is not one of"):
            apply(name, images, odd)
    height_last = images.permute(0, 2, 3, 1)
    for wrong in ((images * 255).byte(), images[0], images[..., 0], height_last):  # some would pass
        with pytest.raises(ValueError, match=f"{name} takes float images"):
            apply(name, wrong)


@pytest.mark.parametrize(("result", "told"), [
    (lambda images: (images * 255).byte(), r"torch.uint8 of the shape \(40, 3, 32, 32\)"),
    (lambda images: images[0], r"of the shape \(3, 32, 32\)"),  # would become every image
    (lambda images: images / 0, "pixels that are not finite")])
def test_what_a_students_perturbation_may_not_return(result, told, photos, monkeypatch):
    def mine(images, level, generator):
        return result(images)

    for registry in (PERTURBATIONS, FAMILY):
        monkeypatch.setitem(registry, "mine", "")  # so that it is taken out again
    perturbations.perturbation("color")(mine)
    monkeypatch.setattr(perturbations, "BLOCK", len(photos))
    with pytest.raises(ValueError, match=f"mine.* {told}"):
        common.perturb(photos, "mine", 3)


@pytest.mark.parametrize("name", [n for n in PERTURBATIONS if n not in NO_SEVERITY])
def test_strength_grows_with_severity(name, photos):
    images = photos / 255
    results = torch.stack([apply(name, images, severity) for severity in range(1, 6)])
    errors = (results - images).square().mean((1, 2, 3, 4)).tolist()
    assert errors[0] > 0
    assert errors == sorted(errors)


SAME_FOR_ALL = NO_SEVERITY | {"pixelate", "jpeg", "posterize", "gaussian_blur"}


@pytest.mark.parametrize("name", sorted(set(PERTURBATIONS) - SAME_FOR_ALL))
def test_every_image_has_its_own_randomness(name, photos):
    images = (photos[:1] / 255).expand(8, -1, -1, -1).clone()
    results = apply(name, images)
    assert len({tuple(r.flatten().tolist()) for r in results}) > 1


def test_there_are_four_families():
    members = {family: " ".join(name for name in FAMILY if FAMILY[name] == family)
               for family in FAMILY.values()}
    assert members == {  # whoever moves one, moves it into or out of the training
        "noise": "gaussian_noise shot_noise salt_and_pepper speckle_noise",
        "blur": "gaussian_blur motion_blur pixelate jpeg",
        "color": "brightness contrast saturation color_jitter grayscale posterize",
        "geometry": "horizontal_flip vertical_flip rotation translation scale cutout"}
    assert FAMILY.keys() == PERTURBATIONS.keys()
    assert sorted(NO_SEVERITY) == ["grayscale", "horizontal_flip", "vertical_flip"]
    assert all(getattr(perturbations, name) is checked for name, checked in PERTURBATIONS.items())
    assert set(common.SEEN_FAMILIES) | set(common.HELD_OUT_FAMILIES) == set(FAMILY.values())
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
    """Gives every image the same, known draw, so that others can be asked for the same thing."""

    def signed(images, generator, magnitude):
        return images.new_full((len(images), 1, 1, 1), value * magnitude)

    def uniform(images, generator, *shape, low=0.0, high=1.0):
        return images.new_full((len(images), *shape), (low + high) / 2)

    monkeypatch.setattr(perturbations, "signed", signed)
    monkeypatch.setattr(perturbations, "uniform", uniform)


def test_color_against_torchvision(photos, monkeypatch):
    images = photos / 255
    assert torch.allclose(apply("grayscale", images), tv.rgb_to_grayscale(images, 3), atol=1e-3)
    for sign in (-1, 1):
        same_strength(monkeypatch, sign)
        brighter = tv.adjust_brightness(images, 1 + sign * 0.4)
        assert torch.allclose(apply("brightness", images, 4), brighter, atol=1e-6)
        more_colorful = tv.adjust_saturation(images, 1 + sign * 0.4)
        assert torch.allclose(apply("saturation", images, 2), more_colorful, atol=2e-3)
        more_contrast = tv.adjust_contrast(images, 1 + sign * 0.15)
        assert torch.allclose(apply("contrast", images, 1), more_contrast, atol=2e-3)


@pytest.mark.parametrize("severity", range(1, 6))
def test_posterize_against_torchvision(photos, severity):
    result = to_uint8(apply("posterize", photos / 255, severity))
    assert torch.equal(result, tv.posterize(photos, 6 - severity))


@pytest.mark.parametrize("size", [32, 16])
@pytest.mark.parametrize("severity", range(1, 6))
def test_pixelate_shows_the_means_of_large_pixels(severity, size, photos):
    side = (26, 22, 18, 14, 10)[severity - 1] * size // 32
    images = photos[:4, :, :size, :size].double() / 255
    fine = images.repeat_interleave(side, 2).repeat_interleave(side, 3)  # size·side pixels a side
    means = F.avg_pool2d(fine, size)  # each of size x size of them
    repeated = F.interpolate(means, size=(size, size), mode="nearest-exact")
    assert torch.allclose(apply("pixelate", images, severity), repeated, atol=1e-12)


def test_flips_against_torchvision(photos):
    images = photos / 255
    assert torch.equal(apply("horizontal_flip", images), tv.horizontal_flip(images))
    assert torch.equal(apply("vertical_flip", images), tv.vertical_flip(images))


INSIDE = (slice(None), slice(None), slice(9, 23), slice(9, 23))  # what no border can reach


def wave(x, y):
    """A plane wave of 6 pixels' length; x and y in pixels from the center.

    Bicubic sampling errs by 0.023 at most, bilinear by 0.048.
    """
    return 0.5 + 0.4 * torch.sin(2 * math.pi * (0.8 * x + 0.6 * y) / 6)


def test_a_turned_or_larger_wave_is_as_computed(monkeypatch):
    same_strength(monkeypatch, 1)
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")
    images = wave(x, y).expand(1, 3, 32, 32)
    cos, sin = math.cos(math.radians(15)), math.sin(math.radians(15))
    turned = wave(cos * x - sin * y, sin * x + cos * y).expand(1, 3, 32, 32)
    larger = wave(x / 1.24, y / 1.24).expand(1, 3, 32, 32)
    assert torch.allclose(apply("rotation", images, 3)[INSIDE], turned[INSIDE], atol=0.03)
    assert torch.allclose(apply("scale", images, 3)[INSIDE], larger[INSIDE], atol=0.03)


def detail(images):
    """The energy above a quarter of the sampling rate, in one direction or both."""
    frequency = torch.fft.fftfreq(images.shape[-1]).abs()
    high = torch.maximum(frequency.view(-1, 1), frequency) > 0.25
    return torch.fft.fft2(images)[..., high].abs().square().sum()


def test_geometry_keeps_the_detail_that_a_blur_takes(monkeypatch):
    """Of white noise, which has as much detail as there can be, bilinear sampling keeps 0.35."""
    images = torch.rand(50, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert detail(apply("rotation", images, 1)) > 0.55 * detail(images)
    assert detail(apply("scale", images, 1)) > 0.55 * detail(images)
    assert detail(apply("translation", images, 1)) > 0.95 * detail(images)
    assert detail(apply("gaussian_blur", images, 3)) < 0.3 * detail(images)
    same_strength(monkeypatch, 0.01 / 5)  # of 5 degrees
    assert detail(apply("rotation", images, 1)) > 0.9 * detail(images)


@pytest.mark.parametrize("size", [32, 16])
@pytest.mark.parametrize("severity", range(1, 6))
def test_translation_moves_by_its_distance_and_changes_no_pixel(severity, size):
    distance = {32: (1, 2, 3, 4, 6), 16: (1, 1, 2, 2, 3)}[size][severity - 1]
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    padded = F.pad(image, [distance] * 4, mode="reflect")[0]
    crops = {}
    for top in range(2 * distance + 1):
        for left in range(2 * distance + 1):
            crop = padded[:, top : top + size, left : left + size]
            crops[crop.numpy().tobytes()] = top - distance, left - distance
    results = apply("translation", image.repeat(600, 1, 1, 1), severity)
    moves = {crops[result.numpy().tobytes()] for result in results}  # KeyError: no such crop
    assert {max(abs(down), abs(right)) for down, right in moves} == {distance}
    assert len(moves) == 8 * distance  # all of the square's border


def test_translation_to_the_left(photos, monkeypatch):
    same_strength(monkeypatch, 1)  # the mean angle is pi
    images = photos / 255
    assert torch.equal(apply("translation", images, 3)[..., :-3], images[..., 3:])


@pytest.mark.parametrize("size", [32, 16])
def test_blur_against_torchvision(size, photos, monkeypatch):
    same_strength(monkeypatch, 1)
    images = photos[..., :size, :size] / 255
    kernel = {32: 7, 16: 5}[size]
    for severity, sigma in enumerate((0.4, 0.6, 0.7, 0.8, 1.0), 1):
        expected = tv.gaussian_blur(images, [kernel] * 2, [sigma * size / 32] * 2)
        assert torch.allclose(apply("gaussian_blur", images, severity), expected, atol=1e-5)


@pytest.mark.parametrize("size", [32, 16])
def test_motion_blur_draws_a_line_of_its_length(size, monkeypatch):
    same_strength(monkeypatch, 1)  # the mean angle is half of pi: upright
    images = torch.zeros(1, 3, size, size)
    images[..., size // 2, size // 2] = 1
    line = apply("motion_blur", images, 4)[0, 0]  # 4 pixels of 32, from center to center
    assert (line > 1e-4).any(1).sum() == 4 * size / 32 + 1
    assert (line > 1e-4).any(0).sum() == 1
    assert line.sum() == pytest.approx(1)


@pytest.mark.parametrize("size", [32, 16])
def test_cutout_covers_its_square(size):
    images = torch.zeros(20, 3, size, size)
    for severity, side_of_32 in enumerate((6, 8, 10, 12, 16), 1):
        side = side_of_32 * size // 32
        hidden = apply("cutout", images, severity)[:, 0] == 0.5
        assert hidden.sum((1, 2)).tolist() == [side * side] * 20
        assert hidden.any(2).sum(1).tolist() == [side] * 20


def test_hue_turns_red_into_green():
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
    green = perturbations.rotate_hue(red, torch.full((1, 1, 1, 1), 2 * math.pi / 3))
    assert torch.allclose(green.flatten(), torch.tensor([0, 1.0, 0]), atol=1e-6)


# ---- devices that lack operators ----------------------------------------------------------------


class OnApple(torch.Tensor):
    """A tensor that says it is on an Apple GPU. Its numbers are in `inner`, on the CPU."""

    device = torch.device("mps", 0)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        kind = {"dtype": inner.dtype, "strides": inner.stride(), "device": "meta"}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **kind)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of AppleGPU")


class AppleGPU(TorchDispatchMode):
    """Runs what is on the pretended GPU; refuses what older versions of torch lack there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        there = any(isinstance(value, OnApple) for value in tree_leaves((args, kwargs)))
        if there:
            assert "_aa" not in str(func)  # interpolation with antialiasing
            assert not (func is torch.ops.aten.grid_sampler_2d.default and args[2] == 2)  # bicubic
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type in ("mps", "meta")
            kwargs["device"] = "cpu"
        args, kwargs = tree_map_only(OnApple, lambda tensor: tensor.inner, (args, kwargs))
        result = func(*args, **kwargs)
        if not there:
            return result
        assert all(tensor.dtype != torch.float64 for tensor in tree_leaves(result))
        return tree_map_only(torch.Tensor, OnApple, result)


def test_the_pretended_gpu_refuses():
    with AppleGPU():
        images = torch.rand(2, 3, 8, 8).to(OnApple.device)
        with pytest.raises(AssertionError):
            images.double()
        with pytest.raises(AssertionError):
            F.interpolate(images, size=4, mode="bilinear", antialias=True)
        with pytest.raises(AssertionError):
            F.grid_sample(images, images.view(2, 8, 12, 2), "bicubic", align_corners=False)


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_every_perturbation_runs_where_operators_are_missing(name, photos):
    images = photos / 255
    with AppleGPU():
        result = apply(name, images.to(OnApple.device))
    assert isinstance(result, OnApple)
    assert torch.equal(result.inner, apply(name, images))


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_the_frozen_set_is_made_on_the_cpu(name, photos, monkeypatch):
    monkeypatch.setattr(perturbations, "BLOCK", len(photos))
    with AppleGPU():
        result = common.perturb(photos.to(OnApple.device), name, 3)
    assert isinstance(result, OnApple)
    assert torch.equal(result.inner, common.perturb(photos, name, 3))


# ---- the frozen test set ------------------------------------------------------------------------


def test_a_tie_goes_up_whatever_the_last_bits_are():
    values = torch.arange(256, dtype=torch.float64)
    for error in (-1e-12, 0, 1e-12):
        assert torch.equal(to_uint8((values[:-1] + 0.5 + error) / 255), values[1:].byte())
    assert torch.equal(to_uint8((values[:-1] + 0.499) / 255), values[:-1].byte())
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(to_uint8(values.to(dtype) / 255), values.byte())
    outside = torch.tensor([-0.01, 1.01])  # as of bicubic resizing
    assert torch.equal(to_uint8(outside), torch.tensor([0, 255], dtype=torch.uint8))
    assert to_uint8(torch.ones(1, dtype=torch.bfloat16)) == 255


def test_test_set_is_frozen(photos, monkeypatch):
    """An image's pixels depend on its name, severity and place, not on how many others there are
    or what those show."""
    monkeypatch.setattr(perturbations, "BLOCK", 30)
    assert len(photos) == 40  # a whole block and a short one
    other = photos.clone()
    other[0] = 255 - other[0]
    for name in PERTURBATIONS:
        torch.manual_seed(len(name))  # the global generator has no say
        whole = common.perturb(photos, name, 2)
        assert whole.dtype == torch.uint8
        assert torch.equal(whole[:35], common.perturb(photos[:35], name, 2))
        assert torch.equal(whole[1:], common.perturb(other, name, 2)[1:])


@pytest.mark.parametrize("severity", [3.0, np.float64(3), np.int64(3)])  # as tables are read
def test_a_severity_is_its_number_whatever_its_type(severity, photos):
    expected = common.perturb(photos[:2], "rotation", 3)
    assert torch.equal(common.perturb(photos[:2], "rotation", severity), expected)


def test_float_images_are_not_taken_for_the_8_bits_of_a_test_set(photos):
    with pytest.raises(ValueError, match="perturb takes uint8 images, found torch.float32"):
        common.perturb(photos[:2] / 255, "rotation", 3)


def whole_numbers():
    """uint8 (40,3,32,32), the same on every processor: smooth images, then random pixels."""
    draws = np.random.RandomState(1)
    corners = draws.randint(0, 256, (20, 3, 9, 9))  # 4 pixels apart
    place = np.arange(32)
    corner, share = place // 4, place % 4  # how far from the corner to the next, in quarters
    down = share.reshape(-1, 1)
    rows = corners[:, :, corner] * (4 - down) + corners[:, :, corner + 1] * down
    smooth = (rows[..., corner] * (4 - share) + rows[..., corner + 1] * share) // 16
    rough = draws.randint(0, 256, (20, 3, 32, 32))
    return torch.from_numpy(np.concatenate([smooth, rough]).astype(np.uint8))


DIGESTS = {
    "gaussian_noise": "2b8d32a6ac95e9ab",
    "shot_noise": "ec1d435f818e6034",
    "salt_and_pepper": "8e44180f62bcf2f8",
    "speckle_noise": "ac20d50a565165ab",
    "gaussian_blur": "417dd16d2505e912",
    "motion_blur": "2a797cc4e2c24842",
    "pixelate": "1d4f29b1af2d7012",
    "jpeg": "054d8fed58a63faa",
    "brightness": "1db13961c654f3bf",
    "contrast": "cb977da1b00e31bc",
    "saturation": "7accf8945f06f3e3",
    "color_jitter": "6ae4b834ce37c96a",
    "grayscale": "d88ef18303da283f",
    "posterize": "7e9a35abe21439b4",
    "horizontal_flip": "d66d0f36fb04d9d4",
    "vertical_flip": "189492a7e7039b5f",
    "rotation": "b9299bf64b5b28ae",
    "translation": "9690a84ef338efdc",
    "scale": "b1c902ab55ce85e9",
    "cutout": "dac149ab7f56d8d1",
}


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_frozen_pixels_never_change(name):
    """Published numbers are of these pixels. A new perturbation needs a line above."""
    images, found = whole_numbers(), hashlib.sha256()
    for severity in range(1, 2 if name in NO_SEVERITY else 6):
        found.update(common.perturb(images, name, severity).numpy().tobytes())
    assert found.hexdigest()[:16] == DIGESTS[name]


def test_frozen_pixels_of_the_second_block_never_change():
    images = whole_numbers()[:1].expand(501, -1, -1, -1)
    first, last = common.perturb(images, "gaussian_noise", 3)[[0, 500]]
    assert not torch.equal(first, last)  # each block has draws of its own
    assert hashlib.sha256(last.numpy().tobytes()).hexdigest()[:16] == "e29c39e96ed9e264"


PRINT_ALL = """
import hashlib, sys
import numpy, torch
import perturbations
print(torch.backends.cpu.get_cpu_capability())
images = torch.from_numpy(numpy.load(sys.argv[1]))
perturbations.BLOCK = len(images)
for name in perturbations.PERTURBATIONS:
    for severity in range(1, 6):
        pixels = perturbations.perturb(images, name, severity).numpy()
        print(name, severity, hashlib.sha256(pixels.tobytes()).hexdigest())
"""


def test_frozen_pixels_are_the_same_on_every_processor(tmp_path):
    np.save(tmp_path / "images.npy", whole_numbers().numpy())
    kinds = [{}, {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}]
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        kinds.append({"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2"})
    command = [sys.executable, "-c", PRINT_ALL, str(tmp_path / "images.npy")]
    root = Path(perturbations.__file__).parent
    pipe = {"stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    started = [subprocess.Popen(command, cwd=root, env=os.environ | kind, **pipe) for kind in kinds]
    native, *others = [process.communicate(timeout=300)[0].splitlines() for process in started]
    assert len(native) == 1 + 5 * len(PERTURBATIONS)
    assert others[0][0] in ("DEFAULT", "NO AVX")  # as older versions of torch call it
    for other in others:
        assert other[1:] == native[1:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_pixels_on_the_gpu(photos):
    for name in PERTURBATIONS:
        pixels = common.perturb(photos.cuda(), name, 3)
        assert pixels.is_cuda
        assert torch.equal(pixels.cpu(), common.perturb(photos, name, 3))
