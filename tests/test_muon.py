"""The optimizer: Muon for convolutions against torch's and the SVD, SGD for the rest."""

import copy
import math

import muon

import pytest
import torch
from torch import nn


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                        nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return net.to(memory_format=torch.channels_last)


def train(net, optimizer, steps=3):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        images = torch.rand(6, 3, 8, 8, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), torch.arange(6) % 2).backward()
        optimizer.step()


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (7, 7), (1, 9), (64, 27)])
def test_singular_values_change_and_vectors_stay(shape):
    matrix = torch.randn(shape, dtype=torch.float64) * torch.logspace(0, -2, shape[1])
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    found = muon.orthogonalized(matrix)
    inside = u.T @ found @ v.T
    assert torch.allclose(inside.diag(), iterated(values / matrix.norm()), atol=1e-9)
    assert torch.allclose(inside, inside.diag().diag(), atol=1e-9)
    assert torch.allclose(u @ inside @ v, found, atol=1e-9)


def iterated(x):
    """What the iterations make of a singular value."""
    for _ in range(3):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


def test_orthogonalized_does_not_depend_on_scale_and_leaves_zero():
    matrix = torch.randn(5, 9, dtype=torch.float64)
    for scale in (1e-6, 1000):
        assert torch.allclose(muon.orthogonalized(matrix), muon.orthogonalized(scale * matrix))
    assert (muon.orthogonalized(torch.zeros(5, 9)) == 0).all()


def multiplied_out(matrix, iterations):
    """Newton-Schulz as published: every iteration multiplies the matrix itself."""
    a, b, c = muon.NEWTON_SCHULZ
    x = matrix / matrix.norm()
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("iterations", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("smallest", [1e-1, 1e-2, 1e-4])
def test_small_matrices_iterate_as_the_large_one_does(iterations, smallest):
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(64, 576, dtype=torch.float64), full_matrices=False)
    matrix = u * torch.logspace(0, math.log10(smallest), 64, dtype=torch.float64) @ v
    exact = multiplied_out(matrix, iterations)
    error = (muon.orthogonalized(matrix, iterations) - exact).norm() / exact.norm()
    assert error < 1e-12
    matrix = matrix.bfloat16()
    error = (muon.orthogonalized(matrix, iterations).double() - exact).norm() / exact.norm()
    usual = (multiplied_out(matrix, iterations).double() - exact).norm() / exact.norm()
    assert error < 3 * usual + 0.01


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")
@pytest.mark.parametrize(("channels", "rows", "columns"), [(2, 8, 12), (1, 12, 6)])
def test_a_convolution_steps_as_torchs_muon(channels, rows, columns):
    torch.manual_seed(0)
    convolution = nn.Conv2d(channels, rows, (2, 3), bias=False)
    other = nn.Linear(columns, rows, bias=False)
    other.weight.data.copy_(convolution.weight.data.flatten(1))
    ours = muon.Muon(convolution, 0.1, 0.6, 0)
    rate = 0.1 / max(1, rows / columns) ** 0.5  # theirs is larger for tall matrices
    theirs = torch.optim.Muon(other.parameters(), rate, weight_decay=0, momentum=0.6,
                              ns_steps=3)
    for _ in range(4):
        gradient = torch.randn(rows, columns)
        norm = min(rows, columns) ** 0.5
        other.weight.data *= norm / other.weight.data.norm()  # what theirs does not do
        convolution.weight.grad = gradient.view(rows, channels, 2, 3)
        other.weight.grad = gradient
        before = other.weight.detach().clone()
        ours.step()
        theirs.step()  # in bf16
        assert (other.weight - before).norm() > 0.2
        assert torch.allclose(convolution.weight.flatten(1), other.weight, atol=5e-3)


def test_all_else_steps_as_torchs_sgd():
    net, other = network(), network()
    ours = muon.Muon(net, 0.1, 0.9, 0.01)
    vectors = [p for p in other.parameters() if p.ndim < 4]
    theirs = torch.optim.SGD(vectors, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    for _ in range(3):
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        if p.ndim < 4:
            assert torch.allclose(p, q, atol=1e-6)


def test_weight_decay_is_not_of_the_convolutions():
    weights = []
    for decay in (0, 5):
        convolution = network()[0]
        convolution.weight.grad = convolution.weight.detach().cos()
        muon.Muon(convolution, 0.1, 0.9, decay).step()
        weights.append(convolution.weight.detach())
    assert torch.equal(*weights)


def test_a_step_is_lr_of_the_weights_whose_norm_is_kept():
    net = network()
    optimizer = muon.Muon(net, 0.05, 0.6, 0)
    train(net, optimizer, steps=1)
    for convolution, norm in ((net[0], 8**0.5), (net[3], 2)):
        start = convolution.weight.detach().clone()
        start *= norm / start.norm()
        train(net, optimizer, steps=1)
        ratio = (convolution.weight - start).norm() / norm
        assert 0.03 < ratio < 0.07
        assert 0.95 * norm < convolution.weight.norm() < 1.05 * norm


def test_the_layout_of_the_weights_makes_no_difference():
    nets = network(), network().to(memory_format=torch.contiguous_format)
    for net in nets:
        train(net, muon.Muon(net, 0.05, 0.6, 1e-3))
    for one, other in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(("dtype", "inside"), [
    (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32),
    (torch.float32, torch.float32)])
def test_small_gradients_count_in_every_precision(dtype, inside, monkeypatch):
    convolution = nn.Conv2d(12, 8, 1, bias=False)
    gradient = 1e-9 * torch.randn(8, 12)
    expected = muon.orthogonalized(gradient)
    before = convolution.weight.detach().flatten(1)
    before = before * (8**0.5 / before.norm())
    convolution.weight.grad = gradient.view(8, 12, 1, 1)
    seen = []
    orthogonalized = muon.orthogonalized
    monkeypatch.setattr(muon, "orthogonalized",
                        lambda matrix: seen.append(matrix.dtype) or orthogonalized(matrix))
    muon.Muon(convolution, 1.0, 0, 0, dtype).step()
    assert seen == [inside]
    assert torch.allclose(before - convolution.weight.flatten(1), expected, atol=0.02)


def test_it_resumes_from_its_state():
    net = network()
    optimizer = muon.Muon(net, 0.05, 0.6, 1e-3)
    train(net, optimizer)
    other, state = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict())
    resumed = muon.Muon(other, 0.05, 0.6, 1e-3)
    resumed.load_state_dict(state)
    train(net, optimizer)
    train(other, resumed)
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
