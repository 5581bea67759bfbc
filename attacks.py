"""The fast gradient method and projected gradient descent, by cleverhans, on pixels in [0,1]."""

import contextlib

import numpy as np
import torch
from torch import nn


@contextlib.contextmanager
def attack_mode(model):
    """Eval mode, float32, no gradients for the parameters; afterwards all is as it was before.

    The images get gradients also where the caller has switched them off.
    Raises ValueError for weights that are not finite: an attack on them would change nothing.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{name} has values that are not finite, so an attack would change "
                             "nothing; part 4's class means are nan until fit_head sets them")
    training = [module for module in model.modules() if module.training]
    wanted = [p.requires_grad for p in model.parameters()]
    device = next(model.parameters()).device.type
    model.eval().requires_grad_(False)
    try:
        with (torch.inference_mode(False), torch.enable_grad(),
              torch.autocast(device, enabled=False)):
            yield
    finally:
        for module in training:
            module.training = True
        for parameter, flag in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(flag)


def in_batches(images, labels, batch_size):
    """Pairs of images, float32 without a gradient, and labels. Raises ValueError outside [0,1]."""
    images = images.detach().float()
    if not ((images > -0.001) & (images < 1.001)).all():  # more than rounding: other images
        raise ValueError(f"an attack takes images in [0,1], found {images.min():g} to "
                         f"{images.max():g}; common.to_float makes them of uint8, and a model "
                         "must normalize them itself")
    labels = labels.clone()  # those made in inference_mode cannot be kept for a gradient
    return zip(images.split(batch_size), labels.split(batch_size), strict=True)


def check_size(eps, norm):
    """Raises ValueError for an eps that is negative, nan or meant in 1/255, and for other norms."""
    if norm not in (np.inf, 2):
        raise ValueError(f"an attack's norm is inf or 2, found {norm!r}")
    if not eps >= 0 or (norm == np.inf and eps > 1):
        raise ValueError(f"an attack's eps is a share of the pixel range [0,1], found {eps:g}; "
                         "8 of 255 gray levels are 8 / 255")


def fgsm(model, images, labels, eps, norm=np.inf, targeted=False):
    """Fast gradient method (Goodfellow et al. 2015), by cleverhans, away from the given labels.

    images: float32 (B,3,H,W) in [0,1].  labels: int64 (B,), the true ones; with `targeted` the
    target classes.  eps: in pixel units of [0,1].  norm: inf or 2.  Returns float32 (B,3,H,W) in
    [0,1], detached, not rounded to 8 bits; the model's mode and gradients stay as they were.
    Raises ValueError for images, an eps or a norm outside these ranges.
    """
    check_size(eps, norm)
    images = images.detach().float()
    step = fgsm_direction(model, images, labels, norm, targeted)
    return (images + eps * step).clamp(0, 1)


def fgsm_direction(model, images, labels, norm=np.inf, targeted=False, batch_size=128):
    """The step of `fgsm` for eps 1 before clipping: one gradient serves a whole sweep over eps.

    Its norm is 1, or 0 for an image whose gradient is zero everywhere.  Shapes as in `fgsm`.
    """
    from cleverhans.torch.attacks.fast_gradient_method import fast_gradient_method

    check_size(1, norm)
    steps = []
    victim = for_norm(model, norm)
    with attack_mode(model):
        for x, y in in_batches(images, labels, batch_size):
            moved = fast_gradient_method(victim, x, 1.0, norm, y=y, targeted=targeted).detach()
            step = moved - x  # x + 1 - x is not 1 to the last bit
            steps.append(step.sign() if norm == np.inf else unit_length(step))
    return torch.cat(steps)


def pgd(model, images, labels, eps, norm=np.inf, steps=10, batch_size=128):
    """Projected gradient descent (Madry et al. 2018) by cleverhans, without a random start.

    That makes it the basic iterative method of Kurakin et al. 2016.  Takes `steps` steps of
    2.5 * eps / steps, at most eps.  Arguments and result as in `fgsm`.
    """
    from cleverhans.torch.attacks.projected_gradient_descent import projected_gradient_descent

    check_size(eps, norm)
    adversarial = []
    victim = for_norm(model, norm)
    with attack_mode(model):
        for x, y in in_batches(images, labels, batch_size):
            moved = projected_gradient_descent(
                victim, x, eps, min(eps, 2.5 * eps / steps), steps, norm, clip_min=0.0,
                clip_max=1.0, y=y, rand_init=False,
                sanity_checks=False)  # they fail on CUDA (cleverhans#1248)
            adversarial.append(moved.detach())
    return torch.cat(adversarial)


def for_norm(model, norm):
    """What cleverhans attacks: in L2 the model with gradients of length 1, in L∞ itself.

    In L2 cleverhans' steps are too short where the gradient of the batch's mean loss is below 1e-6,
    as it is where a model is confident: PGD would leave more images right than FGSM.
    """
    if norm == np.inf:
        return model

    def with_unit_gradients(images):
        images.register_hook(unit_length)  # works on the gradient before cleverhans has it
        return model(images)

    return with_unit_gradients


def unit_length(steps):
    """Steps (B,3,H,W) divided by their L2 norm, those of zeros left; the tiniest squares are 0."""
    largest = steps.abs().amax((1, 2, 3), keepdim=True)
    steps = torch.where(largest > 0, steps / largest, 0)
    length = steps.flatten(1).norm(dim=1).view(-1, 1, 1, 1)  # 0, or at least 1
    return steps / length.clamp(min=1)


class UnitLogits(nn.Module):
    """A model whose logits are divided by each image's own standard deviation, without gradient.

    Its decisions are the model's, but an attack on it does not depend on the logits' scale: where a
    large scale saturates the softmax and masks the gradient, it still works (for the audit).
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        logits = self.model(images)
        return logits / logits.detach().std(1, keepdim=True).clamp(min=1e-12)
