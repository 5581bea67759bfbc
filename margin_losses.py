"""Losses that part 4 offers beside the Angular loss: cross-entropy of cosines, with a margin."""

import math

import arguments

import torch
import torch.nn.functional as F

MARGINS = {"arcface": 0.2, "cosface": 0.2, "sphereface": 1.1}  # --loss: its default --margin
OF_LOSSES = {"alpha_deg": ("angular",), "proxies": ("angular",), "margin": (*MARGINS,),
             "scale": ("arcface", "cosface")}  # part 4's arguments that only some losses have


def add_arguments(add):
    """Adds --margin and --scale. add: the add_argument of part 4's group."""
    add("--margin", type=arguments.number(float, 0, 4), default=None,
        help="arcface: in radians; cosface: in cosine; sphereface: a factor of at least 1 (None: "
        "0.2, 0.2, 1.1)")
    add("--scale", type=arguments.number(float, 0, 100, low_open=True), default=16.0,
        help="arcface, cosface: scale of the cosines (sphereface's is the embedding's length)")


def check_arguments(parser, args):
    """Refuses what --loss does not have, and a margin that makes sphereface easier."""
    for name, losses in OF_LOSSES.items():
        if getattr(args, name) != parser.get_default(name) and args.loss not in losses:
            parser.error(f"argument --{name.replace('_', '-')}: not of --loss {args.loss}; leave "
                         f"it out, or give --loss {' or '.join(losses)}")
    if args.loss == "sphereface" and args.margin is not None and args.margin < 1:
        parser.error("argument --margin: sphereface multiplies the angle by it, expected 1 to 4, "
                     f"found {args.margin}")


class MarginLoss:
    """Cross-entropy of scaled cosines to learned proxies, the head's means, with a margin.

    arcface (Deng et al. 2019; the bound is ours): cos(min(θ + m, π)).
    cosface (Wang et al. 2018): cos θ - m.
    sphereface (Liu et al. 2017, with the characteristic function of SphereFace-R, Liu et al. 2022):
    cos(min(m θ, π)), and the embedding's own length as the scale.  Creating the loss initializes
    the proxies.
    """

    def __init__(self, kind, head, margin, scale, label_smoothing=arguments.LABEL_SMOOTHING):
        if kind not in MARGINS:
            raise ValueError(f"no margin loss is called {kind!r}; expected one of "
                             f"{', '.join(MARGINS)}")
        self.kind = kind
        self.scale = scale
        self.label_smoothing = label_smoothing
        self.margin = MARGINS[kind] if margin is None else margin
        self.proxies = torch.nn.init.normal_(head.means)

    def __call__(self, embeddings, labels):
        cosines = F.normalize(embeddings, dim=1) @ F.normalize(self.proxies, dim=1).T  # (B,C)
        own = cosines.gather(1, labels[:, None])
        angle = own.clamp(-1 + 1e-6, 1 - 1e-6).acos()  # its gradient is infinite at both ends
        if self.kind == "arcface":
            harder = (angle + self.margin).clamp(max=math.pi).cos()
        elif self.kind == "cosface":
            harder = own - self.margin
        else:
            harder = (angle * self.margin).clamp(max=math.pi).cos()
        scale = embeddings.norm(dim=1, keepdim=True) if self.kind == "sphereface" else self.scale
        logits = scale * cosines.scatter(1, labels[:, None], harder)
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
