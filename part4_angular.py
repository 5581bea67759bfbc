"""Part 4: does the Angular loss do better than cross-entropy?

Part 1's training with the Angular loss (Wang et al., ICCV 2017), on an embedding of 128 numbers, of batches that one
learned center a class joins, 16 times. A class is the mean of its training embeddings; an image belongs to the one of
highest cosine. Then all that parts 1 and 2 measure.

    python part4_angular.py                (on part 3's training data: --augment; another loss: --loss arcface)

Writes what part 1 and part 2 write, as results/part4* and results/part4_robustness* (part4_augmented* with --augment).
"""

import math
import sys

import arguments

MAX_ALPHA_DEG = 70  # exp(8 tan² alpha), of which the loss adds up thousands, stays within float32
EMBEDDING = 128  # numbers
COPIES = 16  # of a class's learned center in every batch, beside the six images of the class


def parse_args(argv=None):
    as_part3 = "--augment" in (sys.argv if argv is None else argv)
    parser = arguments.new_parser(__doc__)
    arguments.add_shared(parser)
    arguments.add_training(parser, epochs=30 if as_part3 else 12, lr=0.1, weight_decay=5e-4 if as_part3 else 2e-3)
    add = parser.add_argument_group("loss").add_argument
    add("--loss", choices=("angular", "arcface", "cosface", "sphereface"), default="angular", help="what to train with")
    add("--alpha-deg", type=arguments.number(float, 0, MAX_ALPHA_DEG), default=36.0,
        help=f"Angular loss: the angle alpha, degrees, 0 to {MAX_ALPHA_DEG} (the paper: 36 to 55)")
    add("--no-centers", action="store_true", help="Angular loss: of the images alone, without learned centers")
    add("--npair-weight", type=arguments.number(float, 0, 100), default=0.0, help="Angular loss: N-pair loss's weight")
    add("--margin", type=arguments.number(float, 0, 4), default=None,
        help="margin: arcface in radians, cosface in cosine, sphereface a factor from 1 on (None: 0.2, 0.2, 1.1)")
    add("--scale", type=arguments.number(float, 0, 100, low_open=True), default=16.0,
        help="arcface, cosface: scale of the cosines (sphereface's is the embedding's length)")
    add("--augment", action="store_true", help="train on part 3's perturbed images for as long, with less weight decay")
    arguments.add_no_part2(parser)
    args = arguments.parse(parser, argv)
    if args.loss == "sphereface" and args.margin is not None and args.margin < 1:
        parser.error(f"argument --margin: sphereface multiplies the angle by it, expected 1 to 4, found {args.margin}")
    return args


if __name__ == "__main__":
    parse_args()  # before torch is imported: --help and wrong arguments answer at once

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import common  # noqa: E402
import part2_robustness  # noqa: E402
import report  # noqa: E402
import summary  # noqa: E402
from part3_augmented import augment  # noqa: E402


def angular_loss(embeddings, labels, alpha_deg):
    """Angular loss (Wang et al., ICCV 2017, eq. 8), all (anchor, positive) pairs against all negatives of a batch.

    embeddings: float (B,D), normalized here to unit length.  labels: int64 (B,).  alpha_deg: in [0, 70] degrees.
    Returns a float32 scalar: the mean over pairs (a,p) of log(1 + Σ_n exp f(a,p,n)), where
    f = 4 tan²α (x_a + x_p)·x_n - 2 (1 + tan²α) x_a·x_p; 0 (but for rounding) without a pair or a second class.
    Raises ValueError for an alpha outside its range, where float32 overflows.
    """
    if not 0 <= alpha_deg <= MAX_ALPHA_DEG:
        raise ValueError(f"alpha_deg {alpha_deg} is not in [0, {MAX_ALPHA_DEG}] degrees")
    tan2 = math.tan(math.radians(alpha_deg)) ** 2
    similarity, same, pairs = similarities(embeddings, labels)
    # (x_a + x_p)·x_n is S[a,n] + S[p,n], so the sum over negatives is a matrix product: no triplet is laid out.
    pull = torch.exp(4 * tan2 * similarity).masked_fill(same, 0)  # (B,B): 0 where n is no negative of a
    with torch.autocast(embeddings.device.type, enabled=False):
        negatives = pull @ pull.T
    return mean_over_pairs(negatives, 2 * (1 + tan2) * similarity, pairs)


def npair_loss(embeddings, labels):
    """N-pair loss (Sohn 2016) on unit vectors: the mean over pairs of log(1 + Σ_n exp(x_a·x_n - x_a·x_p)), or 0."""
    similarity, same, pairs = similarities(embeddings, labels)
    negatives = similarity.exp().masked_fill(same, 0).sum(1, keepdim=True)
    return mean_over_pairs(negatives.expand_as(similarity), similarity, pairs)


def similarities(embeddings, labels):
    """(B,B): the cosines in float32, which rows are of one class, and which of these are pairs of two images."""
    with torch.autocast(embeddings.device.type, enabled=False):
        x = F.normalize(embeddings.float(), dim=1)
        same = labels.unsqueeze(1) == labels
        return x @ x.T, same, same & ~torch.eye(len(x), dtype=torch.bool, device=x.device)


def mean_over_pairs(negatives, attraction, pairs):
    """The mean of log(1 + negatives · exp(-attraction)) over the pairs, all (B,B); 0 without a pair or a negative."""
    exponent = torch.where(pairs, negatives, 1).clamp(min=torch.finfo(torch.float32).tiny).log() - attraction
    return (F.softplus(exponent) * pairs).sum() / pairs.sum().clamp(min=1)


class MarginLoss(torch.nn.Module):
    """Cross-entropy (label smoothing as in part 1) of scaled cosines, with a margin, to learned centers: the head's.

    arcface (Deng et al. 2019): cos(θ + m).  cosface (Wang et al. 2018): cos θ - m.  sphereface (Liu et al. 2017, with
    SphereFace-R's characteristic function): cos(min(m θ, π)), and the embedding's own length as the scale.
    """

    def __init__(self, kind, head, margin, scale):
        super().__init__()
        self.kind, self.scale = kind, scale
        self.margin = {"arcface": 0.2, "cosface": 0.2, "sphereface": 1.1}[kind] if margin is None else margin
        self.centers = torch.nn.init.normal_(head.means)

    def forward(self, embeddings, labels):
        cosines = F.normalize(embeddings.float(), dim=1) @ F.normalize(self.centers, dim=1).T  # (B,C)
        own = cosines.gather(1, labels[:, None])
        angle = own.clamp(-1 + 1e-6, 1 - 1e-6).acos()  # the gradient of acos is infinite at both ends
        harder = {"arcface": (angle + self.margin).clamp(max=math.pi).cos(), "cosface": own - self.margin,
                  "sphereface": (angle * self.margin).clamp(max=math.pi).cos()}[self.kind]
        scale = embeddings.float().norm(dim=1, keepdim=True) if self.kind == "sphereface" else self.scale
        return F.cross_entropy(scale * cosines.scatter(1, labels[:, None], harder), labels, label_smoothing=0.1)


class AngularLoss(torch.nn.Module):
    """`angular_loss`, and `npair_loss` with a weight, of a batch that one learned center a class joins, as `COPIES`
    more of its embeddings: targets that outlast the batch, as proxies are (Movshovitz-Attias et al. 2017). They are
    the head's means until it is fitted; class means then take their place."""

    def __init__(self, head, alpha_deg, npair_weight, centers=True):
        super().__init__()
        self.alpha_deg, self.npair_weight = alpha_deg, npair_weight
        self.centers = torch.nn.init.normal_(head.means) if centers else head.means.detach()[:0]

    def forward(self, embeddings, labels):
        embeddings = torch.cat([embeddings.float(), self.centers.repeat(COPIES, 1)])
        labels = torch.cat([labels, torch.arange(len(self.centers), device=labels.device).repeat(COPIES)])
        npair = npair_loss(embeddings, labels) if self.npair_weight else 0
        return angular_loss(embeddings, labels, self.alpha_deg) + self.npair_weight * npair


@torch.no_grad()
def fit_head(model, images, labels, amp):
    """Fits the class means (of margin losses: learned) and their scale to training images."""
    model.head.fit(model.backbone.fc(common.predict(model, images, amp).features), labels)


def main(argv=None):
    args = parse_args(argv)
    device = common.pick_device(args.device)
    generator = common.seed_everything(args.seed, device)
    amp = common.Amp(args.amp, device)
    data = common.load_data(args.dataset, args.data_dir, device, args.quick)
    split = common.split_data(data, args.train_fraction, args.split_seed)
    run = common.describe(args, "part4_augmented" if args.augment else "part4", data, split, device, amp)
    paths = report.start(run)

    head = common.ClassMeans(len(data.classes), EMBEDDING, learned=args.loss != "angular")
    model = common.Model(EMBEDDING, head).to(device, memory_format=torch.channels_last)
    criterion = (MarginLoss(args.loss, model.head, args.margin, args.scale) if args.loss != "angular" else
                 AngularLoss(model.head, args.alpha_deg, args.npair_weight, not args.no_centers))
    steps = common.balanced_steps(split.train_labels, args.batch_size)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, nesterov=True,
                                weight_decay=args.weight_decay)
    power, end = (24, 100) if args.augment else (3, 1)  # as in part 3, as in part 1
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.epochs * steps, pct_start=0.21,
                                                    cycle_momentum=False, div_factor=10, final_div_factor=end)
    average = common.Average(model, split.train_images, amp, power)  # what is tested
    if args.compile:
        common.compile_backbone(model, device)

    state = {"model": model, "average": average, "optimizer": optimizer, "scheduler": scheduler, "scaler": amp.scaler}
    done, history = common.resume(paths("_state.pt"), run, state, generator)  # (0, []) without --resume
    some = common.spread(len(split.train_labels), 1000)  # enough for class means on the learning curve
    for number in range(done, args.epochs):
        model.train()
        batches = common.balanced_batches(split.train_images, split.train_labels, args.batch_size, generator)
        epoch = common.Epoch(number, args.epochs, batches, steps)
        for images, labels in epoch:  # uint8 (B,3,32,32), int64 (B,)
            images = common.to_float(images)  # (B,3,32,32) in [0,1]
            if args.augment:
                images = augment(images, generator, scheduler.last_epoch)
            with amp.autocast():
                embeddings = model.outputs(images)  # (B,128)
            loss = criterion(embeddings, labels)
            amp.step(loss, optimizer)
            scheduler.step()
            average.update(model)
            epoch.add(loss, None, labels)
        fit_head(average.measured(1000), split.train_images[some], split.train_labels[some], amp)
        history.append(epoch.finish(common.watch(average.module, split, amp), scheduler))
        report.write_history(paths, history, run)
        common.save_state(paths("_state.pt"), run, number + 1, history, state, generator)

    model = average.measured()
    fit_head(model, split.train_images, split.train_labels, amp)
    passes = common.predict_splits(model, split, data, amp)  # {"train", "evaluation", "test"}: (Prediction, labels)
    rows = report.clean_rows(run, paths(".pt"), passes)
    report.retire(paths, model)  # part 2's results of a former checkpoint
    common.save_checkpoint(paths(".pt"), model, run | {"outputs": EMBEDDING, "head": "class_means",
                                                       "epoch": args.epochs, "metrics": report.headline(rows)})
    rows += report.clean_umap(paths, run, paths(".pt"), passes)
    report.write_rows(paths(".csv"), rows)
    report.write_clean_correct(paths, *passes["test"])
    report.plot_confusion(paths("_confusion.png"), *passes["test"], run)
    report.print_accuracies(f"{run['part']}: {args.epochs} epochs, averaged weights", rows)
    summary.compare(paths.folder)
    if not args.no_part2:
        rows += part2_robustness.main(["--checkpoint", str(paths(".pt")), *arguments.passed_on(args)])
    return rows


if __name__ == "__main__":
    arguments.run(main)
