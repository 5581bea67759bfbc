"""Muon (Jordan et al. 2024): SGD whose steps are orthogonal matrices, for the convolutions."""

from graphs import RecordedStep

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the published coefficients
NUMBERS = ("lr", "momentum", "weight_decay")  # of a group of parameters, and may change
ITERATIONS = 3  # published: 5; the best trial (benchmarks/recipes.md) had 3, which are faster


class Muon(torch.optim.Optimizer):
    """Muon for the convolutions, SGD for every other parameter, both with Nesterov momentum.

    A convolution's weights are a matrix with a row for each output channel.  The singular values of
    its momentum, a few large and many small ones, are all set to about 1: a step goes as far in the
    directions of small gradients as in those of large ones.  The weights keep the norm of an
    orthogonal matrix (BatchNorm undoes any scale), so that lr is a step's length relative to them,
    and weight_decay an L2 penalty of the other parameters alone.

    dtype: of the matrix products, float32 in place of float16, in whose range gradients vanish; the
    weights stay float32.
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
        self.recorded = None  # on a GPU: the step as a graph
        self.warm = False  # the first step creates the momenta, and loads what a graph may not

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.recorded = None  # it reads the momenta before
        self.warm = False

    @torch.no_grad()
    def step(self):
        gradients = {weights: weights.grad for group in self.param_groups
                     for weights in group["params"] if weights.grad is not None}
        device = self.param_groups[0]["params"][0].device
        numbers = [torch.full((), group[key], device=device)
                   for group in self.param_groups for key in NUMBERS]
        if not self.warm or device.type != "cuda" or gradients.keys() - self.state.keys():
            self.update(gradients, numbers)
            self.warm = True
            return
        if self.recorded is None or self.recorded.gradients.keys() != gradients.keys():
            self.recorded = RecordedStep(self.update, gradients, numbers)
        self.recorded(gradients, numbers)

    def update(self, gradients, numbers):
        """One step. gradients: {weights: gradient}; numbers: NUMBERS of both groups, tensors ()."""
        for i, group in enumerate(self.param_groups):
            lr, keep, weight_decay = numbers[3 * i : 3 * i + 3]
            for weights in group["params"]:
                if weights not in gradients:
                    continue
                gradient = gradients[weights]
                if not group["orthogonal"]:
                    gradient = torch.addcmul(gradient, weights, weight_decay)
                state = self.state[weights]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(weights)
                momentum = state["momentum"]
                torch.addcmul(gradient, momentum, keep, out=momentum)
                step = torch.addcmul(gradient, momentum, keep)  # Nesterov's
                if group["orthogonal"]:
                    matrix = step.permute(0, 2, 3, 1).flatten(1)  # (C',kkC), without a copy
                    weights.mul_(min(matrix.shape) ** 0.5 / weights.norm())
                    matrix = orthogonalized(matrix.to(self.dtype)).to(weights.dtype)
                    n, channels, height, width = weights.shape
                    step = matrix.view(n, height, width, channels).permute(0, 3, 1, 2)
                weights.addcmul_(step, lr, value=-1)


def orthogonalized(matrix, iterations=ITERATIONS):
    """U Vᵀ of the matrix's singular value decomposition U S Vᵀ, roughly.

    Singular values above a fiftieth of the matrix's norm become 0.7 to 1.2, smaller ones less.  By
    Newton-Schulz iterations X ← (a + b G + c G²) X, G = X Xᵀ, which need matrix products alone.
    What stands before X is a polynomial of the first G, as is every later G: so they are iterated,
    being much smaller, and X is multiplied once.
    """
    x = matrix if len(matrix) <= matrix.shape[1] else matrix.T  # the smaller product
    x = x / x.norm().clamp(min=1e-7)  # no singular value above 1
    gram = x @ x.T
    product = factor = polynomial(gram)
    for _ in range(iterations - 1):
        gram = factor @ gram @ factor  # of factor X
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
