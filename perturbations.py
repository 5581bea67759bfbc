"""The perturbations: one short function each, batched on the images' device, drawn per image.

PERTURBATIONS[name](images, severity, generator) takes float images (N,3,H,W) in [0,1], a severity
of 1 to 5 and a torch.Generator, and returns new images of the same shape, type, range and device.
All randomness comes from the generator; with a CPU generator the draws are the same for images of
one type on any device. Training calls it in float32 on its device, `perturb` in float64 on the CPU.

Lengths (of a blur, a shift, a square) are in pixels of a 32 x 32 image and scale with the images'
height: in 16 x 16 images they are half. Noise, Gaussian blur and JPEG have CIFAR-10-C's constants
(Hendrycks & Dietterich, ICLR 2019), the others our own; so CIFAR-10-C's pixelate, for one, is much
weaker (30 to 20 pixels a side). ± s has a random sign and 75 to 100 % of the size s (`signed`).

To add a perturbation, write a function under the decorator, which hands it `level`, severity - 1:
tables and plots find it, and part 3 trains on it unless its family is held out.
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
BLOCK = 500  # images frozen together: part of the perturbed test set's definition, see `perturb`


def perturbation(family, has_severity=True):
    """Registers a perturbation by its name; checks what it takes and returns, clips to [0,1]."""

    def register(function):
        name = function.__name__

        @functools.wraps(function)
        def checked(images, severity, generator):
            level = level_of(name, severity)
            if not images.is_floating_point() or images.ndim != 4 or images.shape[1] != 3:
                raise ValueError(f"{name} takes float images (N,3,H,W) in [0,1], found "
                                 f"{images.dtype} of the shape {*images.shape,}")
            if len(images) == 0:  # which torch's sampling refuses
                return images.clone()
            with torch.autocast(images.device.type, enabled=False):  # bf16 would sample elsewhere
                result = function(images, level, generator)
            if (result.shape, result.dtype) != (images.shape, images.dtype):
                raise ValueError(f"{name} returned {result.dtype} of the shape {*result.shape,}, "
                                 f"expected {images.dtype} of {*images.shape,}, in [0,1]")
            return result.clamp(0, 1)

        PERTURBATIONS[name] = checked
        FAMILY[name] = family
        if not has_severity:
            NO_SEVERITY.add(name)
        return checked

    return register


def level_of(name, severity):
    """severity - 1, an int: 3.0, as tables are read, is 3. Raises ValueError."""
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"{name}: severity {severity!r} is not one of 1, 2, 3, 4, 5")
    return int(severity) - 1


# ---- sizes, and draws: one number (or more) for every image -------------------------------------


def pixels_of_32(images, length):
    """A length in pixels of a 32 x 32 image, in pixels of these images."""
    return length * images.shape[2] / 32


def uniform(images, generator, *shape, low=0.0, high=1.0):
    """(N, *shape) uniform numbers in [low, high) of the images' type, on their device.

    They are drawn where the generator lives.
    """
    shape = len(images), *shape
    draws = torch.rand(shape, generator=generator, device=generator.device, dtype=images.dtype)
    return (low + (high - low) * draws).to(images.device)


def normal_like(images, generator):
    """(N,3,H,W) standard normal numbers of the images' type, on their device."""
    shape, device = images.shape, generator.device
    draws = torch.randn(shape, generator=generator, device=device, dtype=images.dtype)
    return draws.to(images.device)


def signed(images, generator, magnitude):
    """(N,1,1,1) numbers of random sign whose size is 75 % to 100 % of `magnitude`."""
    size = uniform(images, generator, 1, 1, 1, low=0.75 * magnitude, high=magnitude)
    return torch.where(uniform(images, generator, 1, 1, 1) < 0.5, -size, size)


# ---- noise --------------------------------------------------------------------------------------


@perturbation("noise")
def gaussian_noise(images, level, generator):
    """Adds N(0, sigma²) to every pixel value."""
    return images + (0.04, 0.06, 0.08, 0.09, 0.10)[level] * normal_like(images, generator)


@perturbation("noise")
def shot_noise(images, level, generator):
    """Photon noise for `photons` at full brightness: normal, with the variance of a Poisson count.

    (How many draws a Poisson generator takes depends on the pixels: an image would depend on those
    before it.)
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
    sigma = (0.06, 0.10, 0.12, 0.16, 0.20)[level]
    return images + images * sigma * normal_like(images, generator)


# ---- blur and compression -----------------------------------------------------------------------


@perturbation("blur")
def gaussian_blur(images, level, generator):
    """Gaussian blur; sigma in pixels, up to 10 % more or less for each image."""
    sigma = pixels_of_32(images, (0.4, 0.6, 0.7, 0.8, 1.0)[level])
    sigma = sigma * uniform(images, generator, 1, 1, 1, low=0.9, high=1.1)
    reach = math.ceil(pixels_of_32(images, 3))
    taps = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    weights = torch.exp(-0.5 * (taps.view(-1, 1, 1, 1, 1) / sigma) ** 2)  # (taps,N,1,1,1)
    weights = weights / weights.sum(0)
    height, width = images.shape[2:]
    rows = F.pad(images, (0, 0, reach, reach), mode="reflect")
    images = sum(weight * rows[:, :, k : k + height] for k, weight in enumerate(weights))
    columns = F.pad(images, (reach, reach, 0, 0), mode="reflect")
    return sum(weight * columns[..., k : k + width] for k, weight in enumerate(weights))


@perturbation("blur")
def motion_blur(images, level, generator):
    """Mean of 7 copies along a line of random direction; length in pixels."""
    length = pixels_of_32(images, (1.5, 2.0, 3.0, 4.0, 5.0)[level])
    angle = uniform(images, generator, high=math.pi)
    right, down = length * angle.cos(), length * angle.sin()
    places = [k / 6 - 0.5 for k in range(7)]  # from end to end of the line
    return sum(shifted(images, place * right, place * down) for place in places) / 7


def coarse(size, count, images):
    """The (size,size) matrix that averages a line of pixels down to `count` and repeats them.

    Each pixel becomes the mean over the large pixel that its center lies in. (A matrix, since
    devices and processors differ in how they interpolate with antialiasing, if they can.)
    """
    pixel = torch.arange(size, device=images.device)  # from pixel to pixel + 1
    start = (2 * pixel + 1) * count // (2 * size) * size  # of its large one; in 1/count of a pixel
    start = start.view(-1, 1)
    end = start + size
    overlap = torch.minimum(end, (pixel + 1) * count) - torch.maximum(start, pixel * count)
    return overlap.clamp(min=0).to(images.dtype) / size


@perturbation("blur")
def pixelate(images, level, generator):
    """Averages down to fewer pixels a side (of 32), then repeats them back up."""
    height, width = images.shape[2:]
    share = (26, 22, 18, 14, 10)[level] / 32
    rows = coarse(height, round(share * height), images)
    columns = coarse(width, round(share * width), images)
    return rows @ images @ columns.T


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
    return compressed.permute(0, 3, 1, 2).to(images.device, images.dtype) / 255


# ---- color --------------------------------------------------------------------------------------


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
    """Turns the hue by `angle` (N,1,1,1), in radians, about the gray axis (Rodrigues' formula)."""
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
    strength = (0.15, 0.3, 0.45, 0.6, 0.75)[level]
    return adjust_contrast(images, 1 + signed(images, generator, strength))


@perturbation("color")
def saturation(images, level, generator):
    """Moves towards or away from grayscale: factor 1 ± s."""
    strength = (0.2, 0.4, 0.6, 0.8, 1.0)[level]
    return adjust_saturation(images, 1 + signed(images, generator, strength))


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
    bits = 256 - 2 ** (3 + level)
    return (to_uint8(images) & bits).to(images.dtype) / 255


# ---- geometry -----------------------------------------------------------------------------------


def warp(images, matrices, mode="bicubic"):
    """Samples the images at affinely mapped places; matrices (N,2,3) as torch's affine_grid takes.

    Bicubic, which blurs less than bilinear sampling, since blur is held out of training. It still
    blurs a little: rotation leaves 85 to 89 % of the energy above a quarter of the sampling rate,
    gaussian_blur 81 % at severity 1 and 44 % at 2 (500 test images).
    """
    device = images.device
    grid = F.affine_grid(matrices, images.shape, align_corners=False)
    if mode == "bicubic" and device.type == "mps":  # not there in older versions of torch
        images, grid = images.cpu(), grid.cpu()
    sampled = F.grid_sample(images, grid, mode, padding_mode="reflection", align_corners=False)
    return sampled.to(device)


def identity(images):
    """(N,2,3) matrices for `warp` that leave every image as it is."""
    matrix = torch.eye(2, 3, device=images.device, dtype=images.dtype)
    return matrix.repeat(len(images), 1, 1)


def shifted(images, right, down):
    """Moves every image by its own (N,) numbers of pixels, with bilinear interpolation.

    Only for blurs: it blurs itself, and takes a third of bicubic sampling's time.
    """
    height, width = images.shape[2:]
    matrices = identity(images)
    matrices[:, 0, 2] = -2 * right / width
    matrices[:, 1, 2] = -2 * down / height
    return warp(images, matrices, mode="bilinear")


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
    """Turns about the center by ± s degrees."""
    angle = torch.deg2rad(signed(images, generator, (5, 10, 15, 22.5, 30)[level])).flatten()
    zero = torch.zeros_like(angle)
    rows = angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero
    return warp(images, torch.stack(rows, 1).view(-1, 2, 3))


@perturbation("geometry")
def translation(images, level, generator):
    """Moves by whole pixels (at least one) in a random direction, filled up by reflection.

    The distance is that of the chessboard, max(|right|, |down|), and the same for every image.
    """
    height, width = images.shape[2:]
    distance = max(1, round(pixels_of_32(images, (1, 2, 3, 4, 6)[level])))
    angle = uniform(images, generator, 1, 1, 1, high=2 * math.pi)
    right, down = angle.cos(), angle.sin()
    larger = torch.maximum(right.abs(), down.abs())
    right = (distance * right / larger).round().long()
    down = (distance * down / larger).round().long()
    padded = F.pad(images, [distance] * 4, mode="reflect")
    rows = torch.arange(height, device=images.device).view(-1, 1) + distance - down  # (N,1,H,1)
    columns = torch.arange(width, device=images.device) + distance - right  # (N,1,1,W)
    return padded.take_along_dim(rows, 2).take_along_dim(columns, 3)


@perturbation("geometry")
def scale(images, level, generator):
    """Zooms in or out about the center: factor 1 ± s."""
    factor = 1 + signed(images, generator, (0.08, 0.16, 0.24, 0.32, 0.40)[level])
    return warp(images, identity(images) / factor.view(-1, 1, 1))


@perturbation("geometry")
def cutout(images, level, generator):
    """Covers a square with gray; its side in pixels. DeVries & Taylor 2017 let it reach outside."""
    height, width = images.shape[2:]
    side = round(pixels_of_32(images, (6, 8, 10, 12, 16)[level]))
    top = (uniform(images, generator, 1, 1, 1) * (height - side + 1)).floor()
    left = (uniform(images, generator, 1, 1, 1) * (width - side + 1)).floor()
    row = torch.arange(height, device=images.device).view(-1, 1)
    column = torch.arange(width, device=images.device)
    hidden = (row >= top) & (row < top + side) & (column >= left) & (column < left + side)
    return torch.where(hidden, 0.5, images)


# ---- the frozen test set ------------------------------------------------------------------------


def to_uint8(images):
    """Float images in [0,1] as 8-bit pixels, rounded to the nearest.

    What is a tie in exact arithmetic (the mean of two pixels, a gray of 0.299 R + ...) comes out
    within 1e-12 of it, above or below as the processor adds up. So all from a hair below the tie
    goes up: at that hair lies no tie, nor any other round number.
    """
    # `to` cuts the fraction off, and takes 256, to which bfloat16 rounds white, for 0
    return (images * 255 + (0.5 + 2**-20)).clamp(0, 255).to(torch.uint8)


def perturb(images, name, severity):
    """A whole uint8 set (N,3,H,W) under one perturbation: the same pixels for every model, run,
    batch size, device and processor (jpeg: with the same Pillow).

    Image i depends on (name, severity, i) and its own pixels alone: the set is made in blocks of
    500, each from a CPU generator seeded with its name and place, and a short last block is filled
    up before it is drawn. It is made on the CPU and in float64, whose rounding errors are far too
    small to change an 8-bit pixel (see `to_uint8`).
    Returns uint8 (N,3,H,W) on the images' device.  Raises ValueError for float images.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"perturb takes uint8 images, found {images.dtype}; PERTURBATIONS[name] "
                         "takes float ones")
    severity = 1 + level_of(name, severity)  # seeds go by its digit
    pixels = images.cpu()
    result = torch.empty_like(pixels)
    for start in range(0, len(pixels), BLOCK):
        block = pixels[start : start + BLOCK]
        filled = torch.cat([block, block.new_zeros(BLOCK - len(block), *block.shape[1:])])
        seed = zlib.crc32(f"{name} {severity} {start}".encode())
        generator = torch.Generator().manual_seed(seed)
        perturbed = PERTURBATIONS[name](filled.double() / 255, severity, generator)[: len(block)]
        if not perturbed.isfinite().all():
            raise ValueError(f"{name}, severity {severity}: returned pixels that are not finite")
        result[start : start + BLOCK] = to_uint8(perturbed)
    return result.to(images.device)
