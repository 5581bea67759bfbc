"""The perturbations: one short function each, batched on the images' device, random for every image.

PERTURBATIONS[name](images, severity, generator) takes float images (N,3,H,W) in [0,1], a severity of 1 to 5 and a
torch.Generator, and returns new images of the same shape, type, range and device. All randomness comes from the
generator; with a CPU generator the draws are the same for images on any device.

Constants that stand in CIFAR-10-C are CIFAR-10-C's (Hendrycks & Dietterich, ICLR 2019); the images are not, since
ours are made on the fly. To add a perturbation, write a function under the decorator: every table and plot finds it.
"""

import functools
import io
import math
import zlib

import numpy as np
import torch
import torch.nn.functional as F

PERTURBATIONS = {}  # name -> function
FAMILY = {}  # name -> "noise", "blur", "color" or "geometry"
NO_SEVERITY = set()  # names whose result is the same at every severity
BLOCK = 500  # images frozen together: part of the definition of the perturbed test set, see `perturb`


def perturbation(family, has_severity=True):
    """Registers a perturbation under its function's name; checks its severity, keeps its output in [0,1]."""

    def register(function):
        @functools.wraps(function)
        def checked(images, severity, generator):
            if severity not in (1, 2, 3, 4, 5):
                raise ValueError(f"{function.__name__}: severity {severity!r} is not one of 1, 2, 3, 4, 5")
            return function(images, int(severity) - 1, generator).clamp(0, 1)

        PERTURBATIONS[function.__name__] = checked
        FAMILY[function.__name__] = family
        if not has_severity:
            NO_SEVERITY.add(function.__name__)
        return checked

    return register


# ---- drawing: one number (or more) for every image ------------------------------------------------------------------


def uniform(images, generator, *shape, low=0.0, high=1.0):
    """(N, *shape) uniform numbers in [low, high), drawn where the generator lives, on the images' device."""
    draws = torch.rand(len(images), *shape, generator=generator, device=generator.device)
    return (low + (high - low) * draws).to(images.device)


def normal_like(images, generator):
    """(N,3,H,W) standard normal numbers on the images' device."""
    return torch.randn(images.shape, generator=generator, device=generator.device).to(images.device)


def signed(images, generator, magnitude):
    """(N,1,1,1) numbers of random sign whose size is 75 % to 100 % of `magnitude`."""
    size = uniform(images, generator, 1, 1, 1, low=0.75 * magnitude, high=magnitude)
    return torch.where(uniform(images, generator, 1, 1, 1) < 0.5, -size, size)


# ---- noise ----------------------------------------------------------------------------------------------------------


@perturbation("noise")
def gaussian_noise(images, level, generator):
    """Adds N(0, sigma²) to every pixel value."""
    return images + (0.04, 0.06, 0.08, 0.09, 0.10)[level] * normal_like(images, generator)


@perturbation("noise")
def shot_noise(images, level, generator):
    """Photon noise for `photons` at full brightness, as the normal distribution of a Poisson count's variance.

    (A Poisson generator takes more or fewer draws as the pixels are: an image would depend on those before it.)
    """
    photons = (500, 250, 100, 75, 50)[level]
    return images + (images / photons).sqrt() * normal_like(images, generator)


@perturbation("noise")
def salt_and_pepper(images, level, generator):
    """Impulse noise: sets a share of the pixel values to 0 or 1, half each."""
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[level]
    draw = uniform(images, generator, *images.shape[1:])
    return torch.where(draw < share / 2, 0.0, torch.where(draw > 1 - share / 2, 1.0, images))


@perturbation("noise")
def speckle_noise(images, level, generator):
    """Noise in proportion to the pixel value: x + x·N(0, sigma²)."""
    return images + images * (0.06, 0.10, 0.12, 0.16, 0.20)[level] * normal_like(images, generator)


# ---- blur and compression -------------------------------------------------------------------------------------------


@perturbation("blur")
def gaussian_blur(images, level, generator):
    """Gaussian blur; sigma in pixels."""
    sigma = (0.4, 0.6, 0.7, 0.8, 1.0)[level] * uniform(images, generator, 1, 1, 1, low=0.9, high=1.1)
    taps = torch.arange(-3.0, 4.0, device=images.device).view(7, 1, 1, 1, 1)
    weights = torch.exp(-0.5 * (taps / sigma) ** 2)  # (7,N,1,1,1)
    weights = weights / weights.sum(0)
    height, width = images.shape[2:]
    rows = F.pad(images, (0, 0, 3, 3), mode="reflect")
    images = sum(weight * rows[:, :, k : k + height] for k, weight in enumerate(weights))
    columns = F.pad(images, (3, 3, 0, 0), mode="reflect")
    return sum(weight * columns[..., k : k + width] for k, weight in enumerate(weights))


@perturbation("blur")
def motion_blur(images, level, generator):
    """Mean of 7 copies along a line of random direction; length in pixels."""
    length = (1.5, 2.0, 3.0, 4.0, 5.0)[level]
    angle = uniform(images, generator, high=math.pi)
    offsets = torch.linspace(-length / 2, length / 2, 7).tolist()
    return sum(shifted(images, t * angle.cos(), t * angle.sin()) for t in offsets) / len(offsets)


@perturbation("blur")
def pixelate(images, level, generator):
    """Averages down to fewer pixels a side (of 32), then repeats them back up."""
    height, width = images.shape[2:]
    share = (26, 22, 18, 14, 10)[level] / 32
    small = F.interpolate(images, size=(round(share * height), round(share * width)), mode="bilinear", antialias=True)
    return F.interpolate(small, size=(height, width), mode="nearest-exact")


@perturbation("blur")
def jpeg(images, level, generator):
    """JPEG compression (libjpeg through Pillow, on the CPU); quality in percent."""
    from PIL import Image

    quality = (80, 65, 58, 50, 40)[level]

    def compress(pixels):  # uint8 (H,W,3)
        with io.BytesIO() as file:
            Image.fromarray(pixels).save(file, "JPEG", quality=quality)
            return np.asarray(Image.open(file))

    pixels = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
    compressed = torch.from_numpy(np.stack([compress(image) for image in pixels]))
    return compressed.permute(0, 3, 1, 2).to(images.device) / 255


# ---- color ----------------------------------------------------------------------------------------------------------


def luma(images):
    """(N,1,H,W) brightness as ITU-R BT.601 weighs it."""
    return 0.299 * images[:, 0:1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:3]


def adjust_contrast(images, factor):
    mean = luma(images).mean((2, 3), keepdim=True)
    return mean + factor * (images - mean)


def adjust_saturation(images, factor):
    gray = luma(images)
    return gray + factor * (images - gray)


def rotate_hue(images, angle):
    """Turns the hue by `angle` (N,1,1,1), in radians, about the gray axis of RGB (Rodrigues' formula)."""
    cos, sin = angle.cos(), angle.sin()
    mean = images.mean(1, keepdim=True)
    cross = (images.roll(1, 1) - images.roll(-1, 1)) / math.sqrt(3)
    return mean + cos * (images - mean) + sin * cross


@perturbation("color")
def brightness(images, level, generator):
    """Multiplies by 1 ± s."""
    return images * (1 + signed(images, generator, (0.1, 0.2, 0.3, 0.4, 0.5)[level]))


@perturbation("color")
def contrast(images, level, generator):
    """Moves towards or away from the mean gray: factor 1 ± s."""
    return adjust_contrast(images, 1 + signed(images, generator, (0.15, 0.3, 0.45, 0.6, 0.75)[level]))


@perturbation("color")
def saturation(images, level, generator):
    """Moves towards or away from grayscale: factor 1 ± s."""
    return adjust_saturation(images, 1 + signed(images, generator, (0.2, 0.4, 0.6, 0.8, 1.0)[level]))


@perturbation("color")
def color_jitter(images, level, generator):
    """Brightness, contrast, saturation (each 1 ± s) and hue (± s·72°) together."""
    strength = (0.1, 0.2, 0.3, 0.4, 0.5)[level]
    images = images * (1 + signed(images, generator, strength))
    images = adjust_contrast(images.clamp(0, 1), 1 + signed(images, generator, strength))
    images = adjust_saturation(images.clamp(0, 1), 1 + signed(images, generator, strength))
    return rotate_hue(images.clamp(0, 1), signed(images, generator, strength * 0.4 * math.pi))


@perturbation("color", has_severity=False)
def grayscale(images, level, generator):
    """Drops the color."""
    return luma(images).expand_as(images)


@perturbation("color")
def posterize(images, level, generator):
    """Keeps the highest bits of every 8-bit value: 5, 4, 3, 2, 1 of them."""
    step = 2.0 ** (3 + level)
    return torch.floor(to_uint8(images) / step) * step / 255


# ---- geometry -------------------------------------------------------------------------------------------------------


def warp(images, matrices):
    """Samples the images at affinely mapped places; matrices (N,2,3) as torch's affine_grid takes them."""
    grid = F.affine_grid(matrices, images.shape, align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def shifted(images, right, down):
    """Moves every image by its own (N,) numbers of pixels."""
    height, width = images.shape[2:]
    matrices = torch.eye(2, 3, device=images.device).repeat(len(images), 1, 1)
    matrices[:, 0, 2] = -2 * right / width
    matrices[:, 1, 2] = -2 * down / height
    return warp(images, matrices)


@perturbation("geometry", has_severity=False)
def horizontal_flip(images, level, generator):
    """Mirrors left and right."""
    return images.flip(3)


@perturbation("geometry", has_severity=False)
def vertical_flip(images, level, generator):
    """Mirrors up and down."""
    return images.flip(2)


@perturbation("geometry")
def rotation(images, level, generator):
    """Turns about the center; degrees."""
    angle = torch.deg2rad(signed(images, generator, (5, 10, 15, 22.5, 30)[level])).flatten()
    zero = torch.zeros_like(angle)
    rows = angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero
    return warp(images, torch.stack(rows, 1).view(-1, 2, 3))


@perturbation("geometry")
def translation(images, level, generator):
    """Crops after a shift in a random direction; pixels."""
    distance = (1, 2, 3, 4, 6)[level]
    angle = uniform(images, generator, high=2 * math.pi)
    return shifted(images, (distance * angle.cos()).round(), (distance * angle.sin()).round())


@perturbation("geometry")
def scale(images, level, generator):
    """Zooms in or out about the center: factor 1 ± s."""
    factor = 1 + signed(images, generator, (0.08, 0.16, 0.24, 0.32, 0.40)[level]).flatten()
    matrices = torch.eye(2, 3, device=images.device).repeat(len(images), 1, 1) / factor.view(-1, 1, 1)
    return warp(images, matrices)


@perturbation("geometry")
def cutout(images, level, generator):
    """Covers a gray square (DeVries & Taylor 2017) that lies wholly inside; its side in pixels of 32."""
    height, width = images.shape[2:]
    side = round((6, 8, 10, 12, 16)[level] * height / 32)
    top = (uniform(images, generator, 1, 1, 1) * (height - side + 1)).floor()
    left = (uniform(images, generator, 1, 1, 1) * (width - side + 1)).floor()
    row = torch.arange(height, device=images.device).view(-1, 1)
    column = torch.arange(width, device=images.device)
    hidden = (row >= top) & (row < top + side) & (column >= left) & (column < left + side)
    return torch.where(hidden, 0.5, images)


# ---- the frozen test set --------------------------------------------------------------------------------------------


def to_uint8(images):
    """Float images in [0,1] as 8-bit pixels, rounded to the nearest."""
    return (images * 255).round().to(torch.uint8)


def perturb(images, name, severity):
    """A whole uint8 set (N,3,H,W) under one perturbation: the same pixels for every model, run and batch size.

    Image i depends on (name, severity, i) and its own pixels alone: the set is made in blocks of 500, each from a CPU
    generator seeded with its name and place, and a short last block is filled up before it is drawn.
    Returns uint8 (N,3,H,W) on the images' device.
    """
    result = torch.empty_like(images)
    for start in range(0, len(images), BLOCK):
        block = images[start : start + BLOCK]
        filled = torch.cat([block, block.new_zeros(BLOCK - len(block), *block.shape[1:])])
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {severity} {start}".encode()))
        result[start : start + BLOCK] = to_uint8(PERTURBATIONS[name](filled / 255, severity, generator))[: len(block)]
    return result
