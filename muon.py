"""Muon (Jordan et al. 2024): SGD whose steps are orthogonal matrices, for the convolutions."""

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the published coefficients
ITERATIONS = 3  # published: 5, in airbench94_muon.py 3; so had the best trial (recipes.md)


class Muon(torch.optim.Optimizer):
    """Muon for the convolutions, SGD for every other parameter, both with Nesterov momentum.

    A convolution's weights are a matrix with a row for each output channel.  The singular values of
    its momentum, a few large and many small ones, are set to about 1, the smallest to less: a step
    goes about as far in the directions of small gradients as in those of large ones.  The weights
    keep the norm of an orthogonal matrix (as in Jordan's airbench94_muon.py), so that lr is a
    step's length relative to them, and weight_decay an L2 penalty of the other parameters only.
    This requires a BatchNorm after every convolution, which undoes any scale of its weights.

    dtype: of the matrix products; for float16, in which they would underflow, float32 is taken.
    The weights stay float32.
    """

    def __init__(self, model, lr, momentum, weight_decay, dtype=torch.float32):
        convolutions = []
        others = []
        for parameter in model.parameters():
            (convolutions if parameter.ndim == 4 else others).append(parameter)
        groups = [{"params": convolutions, "orthogonal": True},
                  {"params": others, "orthogonal": False}]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = torch.float32 if dtype == torch.float16 else dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weights in group["params"]:
                if weights.grad is None:
                    continue
                gradient = weights.grad
                if not group["orthogonal"]:
                    gradient = gradient.add(weights, alpha=group["weight_decay"])
                state = self.state[weights]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(weights)
                momentum = state["momentum"]
                torch.add(gradient, momentum, alpha=group["momentum"], out=momentum)
                step = torch.add(gradient, momentum, alpha=group["momentum"])  # Nesterov's
                if group["orthogonal"]:
                    matrix = step.permute(0, 2, 3, 1).flatten(1)  # (C',kkC), without a copy
                    weights.mul_(min(matrix.shape) ** 0.5 / weights.norm())  # as if orthogonal
                    matrix = orthogonalized(matrix.to(self.dtype)).to(weights.dtype)
                    n, channels, height, width = weights.shape
                    step = matrix.view(n, height, width, channels).permute(0, 3, 1, 2)
                weights.add_(step, alpha=-group["lr"])


def orthogonalized(matrix, iterations=ITERATIONS):
    """U Vᵀ of the matrix's singular value decomposition U S Vᵀ, roughly.

    Singular values above a fiftieth of the matrix's norm become 0.7 to 1.2, smaller ones less.  By
    Newton-Schulz iterations X ← (a + b G + c G²) X, G = X Xᵀ, which need only matrix products.
    What stands before X is a polynomial of the first G, as is every later G: so they are iterated,
    being much smaller, and X is multiplied once.
    """
    x = matrix if len(matrix) <= matrix.shape[1] else matrix.T  # the smaller product
    x = x / x.norm().clamp(min=1e-7)  # no singular value above 1
    for done in range(0, iterations, 3):  # after three a new G: its rounding in bf16 grows
        gram = x @ x.T
        product = factor = polynomial(gram)
        for _ in range(min(3, iterations - done) - 1):
            gram = factor @ gram @ factor  # the G of factor X
            factor = polynomial(gram)
            product = factor @ product
        x = product @ x
    return x if len(matrix) <= matrix.shape[1] else x.T


def polynomial(gram):
    """a + b G + c G²."""
    a, b, c = NEWTON_SCHULZ
    result = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    result.diagonal().add_(a)
    return result
