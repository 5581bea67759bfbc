"""FGSM through cleverhans against plain torch, and what an attack must leave alone."""

import copy

import attacks
import common

import numpy as np
import pytest
import torch
import torch.nn.functional as F


def plain_gradient(model, images, labels):
    images = images.clone().requires_grad_(True)
    return torch.autograd.grad(F.cross_entropy(model(images), labels), images)[0]


@pytest.fixture
def batch(small_photos):
    return small_photos[:6] / 255, torch.arange(6) % 10


@pytest.mark.parametrize("eps", [0, 1 / 255, 8 / 255])
def test_fgsm_equals_plain_torch(small_model, batch, eps):
    images, labels = batch
    expected = (images + eps * plain_gradient(small_model, images, labels).sign()).clamp(0, 1)
    assert torch.equal(common.fgsm(small_model, images, labels, eps), expected)


def test_a_targeted_step_goes_down_the_loss_of_the_target(small_model, batch):
    images, labels = batch
    target = (labels + 3) % 10
    expected = (images - 4 / 255 * plain_gradient(small_model, images, target).sign()).clamp(0, 1)
    assert torch.equal(common.fgsm(small_model, images, target, 4 / 255, targeted=True), expected)


SCALES = pytest.mark.parametrize("scale", [1, 1e-6, 1e-25])  # of the logits and their gradient


def plain_l2_step(model, images, labels):
    gradient = plain_gradient(model, images, labels).double()
    return (gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).float()


@SCALES
def test_l2_step_is_the_normalized_gradient(small_model, batch, scale):
    images, labels = batch
    model = copy.deepcopy(small_model)
    model.backbone.fc.weight.data *= scale
    step = 0.5 * plain_l2_step(model, images, labels)
    found = common.fgsm(model, images, labels, 0.5, norm=2)
    assert torch.allclose(found, (images + step).clamp(0, 1), atol=1e-5)


@SCALES
def test_l2_pgd_takes_steps_of_one_length_however_small_the_gradient(small_model, batch, scale):
    images, labels = batch
    model = copy.deepcopy(small_model)
    model.backbone.fc.weight.data *= scale
    moved = images
    for _ in range(4):
        step = 2.5 * 0.5 / 4 * plain_l2_step(model, moved, labels)
        change = (moved + step).clamp(0, 1) - images
        length = change.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        moved = (images + change * (0.5 / length).clamp(max=1)).clamp(0, 1)
    found = common.pgd(model, images, labels, 0.5, norm=2, steps=4)
    assert ((found - moved).flatten(1).norm(dim=1) < 0.05).all()  # of 0.5; rounding adds up


@pytest.mark.parametrize("norm", [np.inf, 2])
def test_one_direction_serves_every_eps(small_model, batch, norm):
    images, labels = batch
    direction = common.fgsm_direction(small_model, images, labels, norm, batch_size=6)
    if norm == np.inf:
        assert set(direction.unique().tolist()) <= {-1, 0, 1}  # to the last bit
    for eps in (1 / 255, 4 / 255, 16 / 255, 0.5):
        swept = (images + eps * direction).clamp(0, 1)
        expected = common.fgsm(small_model, images, labels, eps, norm)
        assert torch.allclose(swept, expected, rtol=0, atol=0 if norm == np.inf else 1e-5)


def test_attacks_leave_the_model_as_it_was(small_model, batch):
    images, labels = batch
    model = copy.deepcopy(small_model).train()
    F.cross_entropy(model(images), labels).backward()
    frozen = model.backbone.conv1.weight.requires_grad_(False)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    adversarial = common.fgsm(model, images, labels, 8 / 255)
    moved = common.pgd(model, images, labels, 8 / 255, steps=2)
    assert not adversarial.requires_grad and not moved.requires_grad
    assert model.training
    assert not frozen.requires_grad
    for name, tensor in model.state_dict().items():  # batch statistics, too
        assert torch.equal(tensor, state[name])
    for parameter, before in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, before)


def test_every_module_is_in_its_former_mode_after_an_attack(small_model):
    model = copy.deepcopy(small_model).train()
    model.backbone.bn1.eval()  # a frozen layer
    before = [module.training for module in model.modules()]
    with attacks.attack_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before


def test_attack_is_float32_also_under_autocast(small_model, batch):
    images, labels = batch
    with torch.autocast("cpu", torch.bfloat16):
        under = common.fgsm(small_model, images.double(), labels, 8 / 255)
    assert torch.equal(under, common.fgsm(small_model, images, labels, 8 / 255))
    assert under.dtype == torch.float32


def test_pgd_equals_plain_torch(small_model, batch):
    images, labels = batch
    eps = 8 / 255
    moved = images
    for _ in range(4):
        step = 2.5 * eps / 4 * plain_gradient(small_model, moved, labels).sign()
        change = (moved + step).clamp(0, 1) - images
        moved = (images + change.clamp(-eps, eps)).clamp(0, 1)
    found = common.pgd(small_model, images, labels, eps, steps=4)
    assert ((found - moved).abs() < 1e-6).float().mean() > 0.99  # a sign can hang on rounding


def test_pgd_takes_ten_steps(small_model, batch):
    images, labels = batch
    found = common.pgd(small_model, images, labels, 8 / 255)
    ten = common.pgd(small_model, images, labels, 8 / 255, steps=10)
    assert ((found - ten).abs() < 1e-6).float().mean() > 0.99  # a sign can hang on rounding


@pytest.mark.parametrize("attack", [common.fgsm, common.pgd])
@pytest.mark.parametrize("change", [
    lambda images: (images * 255).byte(), lambda images: images * 255,
    lambda images: (images - 0.5) / 0.25, lambda images: images * np.nan,
    lambda images: images.clone().index_fill_(0, torch.tensor(3), 1.002),
    lambda images: images.clone().index_fill_(0, torch.tensor(3), -0.002)])
def test_images_outside_0_to_1_are_refused_not_clipped(small_model, batch, attack, change):
    images, labels = batch
    with pytest.raises(ValueError, match=r"takes images in \[0,1\], found"):
        attack(small_model, change(images), labels, 8 / 255)
    assert all(parameter.requires_grad for parameter in small_model.parameters())  # as before


@pytest.mark.parametrize("attack", [common.fgsm, common.pgd])
@pytest.mark.parametrize(("eps", "norm"), [(8, np.inf), (1.01, np.inf), (-0.01, np.inf),
                                           (-1, 2), (np.nan, 2), (np.nan, np.inf)])
def test_an_eps_that_is_no_share_of_the_pixel_range_is_refused(small_model, batch, attack, eps,
                                                               norm):
    with pytest.raises(ValueError, match=r"8 of 255 gray levels are 8 / 255"):
        attack(small_model, *batch, eps, norm)
    for largest, of in ((1, np.inf), (55.5, 2)):  # all pixels from black to white
        assert attack(small_model, *batch, largest, of).isfinite().all()


@pytest.mark.parametrize("attack", [common.fgsm, common.fgsm_direction, common.pgd])
@pytest.mark.parametrize("norm", [1, 0, "inf"])
def test_other_norms_are_refused(small_model, batch, attack, norm):
    """In L1 cleverhans moves one pixel; scaled to an L2 norm, that would be neither attack."""
    eps = {} if attack is common.fgsm_direction else {"eps": 8 / 255}
    with pytest.raises(ValueError, match="norm is inf or 2, found"):
        attack(small_model, *batch, norm=norm, **eps)


@pytest.mark.parametrize("attack", [common.fgsm, common.pgd])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_attack_needs_no_gradients_from_its_caller(small_model, batch, attack, mode):
    images, labels = batch
    expected = attack(small_model, images, labels, 8 / 255)
    with mode():  # as around an evaluation; what is made in it stays so
        assert torch.equal(attack(small_model, images.clone(), labels.clone(), 8 / 255), expected)


@pytest.mark.parametrize("attack", [common.fgsm, common.pgd])
@pytest.mark.parametrize("norm", [np.inf, 2])
def test_adversarial_images_are_float32_and_detached(small_model, batch, attack, norm):
    images, labels = batch
    rounded = images.clone()  # a last bit too much is clipped
    rounded[0, :, 0, :2] = torch.tensor([-0.0004, 1.0004])
    for given in (images.clone().requires_grad_(), images.double(), rounded):
        found = attack(small_model, given, labels, 8 / 255, norm)
        assert found.dtype == torch.float32
        assert not found.requires_grad
        assert 0 <= found.min() <= found.max() <= 1


def test_steps_are_of_length_one_or_zero():
    steps = torch.zeros(4, 3, 8, 8)
    steps[1, 0, 2, 2] = -1e-30  # one pixel alone, whose square is 0 in float32
    steps[2] = 1e20  # whose squares are not finite
    steps[3, 1, :, 0] = torch.arange(8)
    found = attacks.unit_length(steps)
    assert found[0].abs().max() == 0 and found[1, 0, 2, 2] == -1
    assert torch.allclose(found.flatten(1).norm(dim=1), torch.tensor([0.0, 1, 1, 1]))
    assert torch.allclose(found[3] * steps[3].norm(), steps[3])


def test_unit_logits_have_a_deviation_of_one_in_every_image():
    logits = torch.tensor([[0.0, 1, 2], [0, 100, 200], [3, -3, 0], [0, 0, 0]])
    expected = [[0, 1, 2], [0, 1, 2], [1, -1, 0], [0, 0, 0]]  # the deviations: 1, 100, 3 and 0
    unit = common.UnitLogits(torch.nn.Identity())
    assert unit(logits).tolist() == expected
    [gradient] = torch.autograd.grad(unit(logits.requires_grad_())[1, 1], logits)
    assert torch.allclose(gradient[1], torch.tensor([0, 0.01, 0]))  # none of the deviation


def test_an_image_without_a_gradient_has_no_direction(batch):
    class Saturated(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, images):
            logits = F.one_hot(torch.zeros(len(images), dtype=torch.long), 10) * 1e4
            return self.weight * logits + 0 * images.mean()

    images, labels = batch
    for norm in (np.inf, 2):
        direction = common.fgsm_direction(Saturated(), images, torch.zeros_like(labels), norm)
        assert (direction == 0).all()
