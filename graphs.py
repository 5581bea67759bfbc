"""CUDA graphs: what a training step does on a GPU is recorded once, and then replayed at once.

At 64 images a step of part 3 has 1,229 kernels.  Python starts them one by one, which takes 19 ms
on an H100's machine; the GPU is busy for 4 of them (benchmarks/recipes.md).
"""

import warnings

import torch


class RecordedTraining:
    """A backbone's forward for training on a GPU, backward too: recorded when a shape is first met.

    What Python decides in the backbone, hooks too, it decides then, once for all later batches.
    """

    def __init__(self, backbone):
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")  # it is another one
        self.backbone = backbone
        self.recorded = {}  # shape of a batch → forward

    def __deepcopy__(self, memo):
        return RecordedTraining(memo[id(self.backbone)])  # of the copied backbone

    def __call__(self, images):
        backbone = self.backbone
        adds_up = backbone.conv1.weight.grad is not None  # and lies in memory that a replay writes
        if adds_up or not backbone.training or not torch.is_grad_enabled():
            return type(backbone).forward(backbone, images)
        if images.shape not in self.recorded:
            del backbone.forward  # for the class's
            with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False,
                                enabled=torch.is_autocast_enabled("cuda")):
                torch.cuda.make_graphed_callables(backbone, (images.clone(),))
            self.recorded[images.shape] = backbone.forward
            backbone.forward = self
        return self.recorded[images.shape](images)


class RecordedStep:
    """An optimizer's update(gradients, numbers); gradients: {weights: tensor}; numbers: tensors."""

    def __init__(self, update, gradients, numbers):
        self.gradients = {weights: torch.empty_like(g) for weights, g in gradients.items()}
        self.numbers = [torch.empty_like(number) for number in numbers]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            update(self.gradients, self.numbers)  # a replay reads them here

    def __call__(self, gradients, numbers):
        torch._foreach_copy_([*self.gradients.values()], [*gradients.values()])
        torch._foreach_copy_(self.numbers, numbers)
        self.graph.replay()
