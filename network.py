"""The network: torchvision's ResNet18 for small images, and part 4's classifier."""

import warnings

from arguments import LABEL_SMOOTHING, UsageError, first_line
from metrics import class_means

import torch
import torch.nn.functional as F
from torch import nn

# of the pixels of all 50,000 training images of CIFAR-10, evaluation split included; in [0,1]
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
EMBEDDING_DIM = 128  # of part 4's last layer
CPU = getattr(torch.cpu, "get_capabilities", dict)()  # {instruction set: whether it is there}
AMX = CPU.get("amx_bf16", False)  # multiplies tiles of bf16, as Intel's Xeons do since 2023


def layout(device):
    """The memory format of a network's weights: channels_last, in which convolutions are fastest.

    On Apple GPUs contiguous: there convolutions have taken other weights for contiguous ones
    (pytorch#192212), and given results in the weights' format, also of contiguous images.
    """
    mps = torch.device(device).type == "mps"
    return torch.contiguous_format if mps else torch.channels_last


class Model(nn.Module):
    """Pixels in [0,1] to logits: normalization, torchvision's ResNet18 for small images, a head.

    forward: float (B,3,H,W) in [0,1] → logits (B,C).  The backbone's state_dict loads with
    strict=True into torchvision's resnet18(num_classes=outputs) with a 3×3 stem and no max-pool,
    as the narrower networks of He et al. 2016 for CIFAR-10 begin.  Of another backbone the last
    layer must be called fc.
    """

    def __init__(self, outputs, head=None):
        from torchvision.models import resnet18

        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))
        self.backbone = resnet18(num_classes=outputs)
        self.backbone.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.backbone.maxpool = nn.Identity()
        for block in self.backbone.layer4:
            for name, conv in list(block.named_children()):
                if name.startswith("conv") and SideBySide.computes(conv):
                    setattr(block, name, SideBySide(conv))
        self.head = head or nn.Identity()

    def outputs(self, images):
        """The backbone's last layer: logits in parts 1 and 3, the embedding (B,D) in part 4."""
        if not images.is_floating_point():  # 0 to 255 would give logits, too: of nothing
            raise ValueError(f"a Model takes float images in [0,1], found {images.dtype}; "
                             "common.to_float makes them of uint8")
        images = (images - self.mean) / self.std
        if images.device.type == "mps":  # in older versions of torch, BatchNorm's gradients are
            images = images.contiguous()  # wrong there for channels_last (pytorch#175189)
        return self.backbone(images)

    def forward(self, images):
        return self.head(self.outputs(images))


def is_plain(layer, *classes):
    """Whether a layer computes what its class, one of these, does.

    Not a subclass, which may normalize its weights, nor one with hooks, as torch's spectral_norm.
    """
    return type(layer) in classes and not layer._forward_hooks and not layer._forward_pre_hooks


class SideBySide(nn.Conv2d):
    """A 3×3 convolution, for CPUs with AMX: lays small bf16 images side by side, as one wide image.

    The same sums from the same weights.  AMX multiplies 16 pixels of a row at once, of which a map
    of 4×4 fills four: about three times as fast there, forward and backward.
    """

    def __init__(self, conv):
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
                         conv.padding, bias=False, device="meta")  # no random weights
        self.weight = conv.weight

    @staticmethod
    def computes(conv):
        """Whether this is what a convolution computes, which a student may have edited."""
        return (is_plain(conv, nn.Conv2d) and conv.kernel_size == (3, 3)
                and conv.padding == conv.dilation == (1, 1)
                and conv.groups == 1 and conv.bias is None and conv.padding_mode == "zeros")

    def forward(self, images):
        width, stride = images.shape[3], self.stride[1]
        small = width <= 4 * stride and width % stride == 0
        if AMX and small and images.dtype == torch.bfloat16 and images.device.type == "cpu":
            return self.wide(images)
        return super().forward(images)

    def wide(self, images):
        """The convolution of images (N,C,H,W), W a multiple of the stride: (N,C',H',W')."""
        n, _, height, width = images.shape
        gap = self.stride[1]  # columns of zeros after each image: one of the result, left out below
        row = F.pad(images, (0, gap)).permute(2, 0, 3, 1)  # (H,N,W+gap,C)
        row = row.reshape(1, height, n * (width + gap), -1).permute(0, 3, 1, 2)  # (1,C,H,N(W+gap))
        result = super().forward(row)  # (1,C',H',N(W'+1))
        apart = result.unflatten(3, (n, -1))[0, :, :, :, :-1]  # (C',H',N,W')
        return apart.permute(2, 0, 1, 3).contiguous(memory_format=torch.channels_last)


class ClassMeans(nn.Module):
    """The nearest-class-mean classifier: logits are scale × cosine to the class means (C,D).

    The means are set after training, or learned during training as proxies of the classes.
    """

    def __init__(self, classes, dim, learned=False):
        super().__init__()
        self.learned = learned
        # no numbers until they are set: an attack before that raises, instead of doing nothing
        self.means = nn.Parameter(torch.full((classes, dim), torch.nan))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def fit(self, embeddings, labels):
        """Sets the means (unless learned) of embeddings (N,D), labels (N,), and then the scale.

        The scale, one of 1, 2 … 64, gives the least cross-entropy, with part 1's default label
        smoothing, on these embeddings: finite even if all are classified correctly, so gradients do
        not vanish.
        """
        if not self.learned:
            self.means.copy_(class_means(embeddings, labels, len(self.means)))
        self.scale.fill_(1)
        cosines = self(embeddings)
        scales = torch.arange(1.0, 65.0, device=labels.device)
        losses = [F.cross_entropy(scale * cosines, labels, label_smoothing=LABEL_SMOOTHING)
                  for scale in scales]
        self.scale.copy_(scales[torch.stack(losses).argmin()])

    def forward(self, embeddings):
        with torch.autocast(embeddings.device.type, enabled=False):  # bf16 would tie close classes
            cosines = F.normalize(embeddings.float(), dim=1) @ F.normalize(self.means, dim=1).T
            return self.scale * cosines


# ---- a checkpoint's network ---------------------------------------------------------------------


def head_of(model):
    """What a checkpoint calls its model's head."""
    return "class_means" if isinstance(model.head, ClassMeans) else "none"


def empty_model(head, classes):
    """The Model of a checkpoint before it has weights: no memory, no random numbers."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that an edited Model loads, one line each
        if head == "class_means":
            return Model(EMBEDDING_DIM, ClassMeans(classes, EMBEDDING_DIM))
        return Model(classes)


def check_rebuilt(model, classes):
    """Raises UsageError for a network that `empty_model` does not make: before it is trained."""
    differing = []
    if type(model) is not Model:
        differing.append(f"its class {type(model).__name__}")
    elif type(model.head) not in (nn.Identity, ClassMeans):
        differing.append(f"its head {type(model.head).__name__}")
    else:
        ours = model.state_dict()
        try:
            again = empty_model(head_of(model), classes).state_dict()
        except Exception as error:  # x.item() of an edited Model's tensor has no value there
            raise UsageError("part 2 could not make this network again from its checkpoint, since "
                             "it does so without numbers, on torch's device meta: "
                             f"{first_line(error)}; edit Model.__init__ so that it reads no number "
                             "from a tensor") from None
        differing += [name for name in sorted(ours.keys() | again.keys()) if name not in ours
                      or name not in again or ours[name].shape != again[name].shape]
    if differing:
        raise UsageError("part 2 could not make this network again from its checkpoint: "
                         f"{differing[0]} is not as in network.py's Model; edit that class, which "
                         "all parts use, instead (the size of part 4's embedding: EMBEDDING_DIM)")
