"""Part 4: does the Angular loss do better than cross-entropy?

Trains as part 1 does, with the Angular loss (Wang et al., ICCV 2017) on a 128-dimensional
embedding; then measures what parts 1 and 2 measure. The classifier is the nearest class mean: the
class whose mean training embedding has the highest cosine to the image's.

    python part4_angular.py       (on part 3's training images: --augment; with learned proxies of
                                   the classes: --proxies; another loss: --loss arcface)

15 epochs, as long as part 1. Accuracy on the 10,000 test images of a JPEG copy of CIFAR-10: 75.9 ±
0.3 %, mean and standard deviation of three trainings on three splits (results/reference).

The paper draws N-pair batches, of two images of each class. Here batches are class-balanced (with
10 classes six images of each: 60 where part 1 has 64, so more steps per epoch), every pair within a
class is a positive pair, and all images of other classes are negatives. The loss has no label
smoothing, which part 1's has.

Writes what parts 1 and 2 write, as results/part4* and results/part4_robustness*, whatever the
--loss (part4_proxies*, part4_augmented* and so on with these flags).
"""

import math

import arguments
import checkpoints
import common
import margin_losses
import muon
import part2_robustness
import report
import summary
import terminal
from margin_losses import MARGINS
from part3_augmented import SHARES, augment

import torch
import torch.nn.functional as F

MAX_ALPHA_DEG = 70  # exp(8 tan² alpha), of which the loss adds up thousands, stays within float32
PROXY_COPIES = 16  # of each class's proxy in a batch: better than 1 (benchmarks/recipes.md)


def parse_args(argv=None):
    parser = arguments.new_parser(__file__, __doc__)
    arguments.add_shared(parser)
    arguments.add_recipe(parser)
    add = parser.add_argument_group("loss").add_argument
    add("--loss", choices=("angular", *MARGINS), default="angular",
        help="training loss")
    add("--alpha-deg", type=arguments.number(float, 0, MAX_ALPHA_DEG), default=36.0,  # paper: 36-55
        help=f"Angular loss: the angle alpha, degrees, 0 to {MAX_ALPHA_DEG}")
    add("--proxies", action="store_true",
        help=f"Angular loss: a learned proxy of every class joins each batch, {PROXY_COPIES} times")
    margin_losses.add_arguments(add)
    add("--augment", action="store_true", help="train on part 3's perturbed images")
    arguments.add_no_part2(parser)
    args = arguments.parse(parser, argv)
    margin_losses.check_arguments(parser, args)
    if args.augment:
        args.shares = common.shares_of(SHARES, common.SEEN_FAMILIES)
    return args


# ---- the Angular loss and its classifier --------------------------------------------------------


def angular_loss(embeddings, labels, alpha_deg, copies=None):
    """Angular loss (Wang et al., ICCV 2017): all pairs of a class against all negatives.

    embeddings: float (B,D), normalized here to unit length.  labels: int64 (B,).  alpha_deg: in
    [0, 70] degrees.  copies: float (B,), how many times each row counts; None: once.
    Returns a float32 scalar: the mean over pairs (a,p) of log(1 + Σ_n exp f(a,p,n)), where
    f = 4 tan²α (x_a + x_p)·x_n - 2 (1 + tan²α) x_a·x_p; 0 (but for rounding) without a pair or a
    second class.  Raises ValueError for an alpha outside its range, where float32 overflows.
    """
    if not 0 <= alpha_deg <= MAX_ALPHA_DEG:
        raise ValueError(f"alpha_deg {alpha_deg} is not in [0, {MAX_ALPHA_DEG}] degrees")
    tan2 = math.tan(math.radians(alpha_deg)) ** 2
    same = labels.unsqueeze(1) == labels  # (B,B)
    if copies is None:
        copies = torch.ones(len(labels), device=labels.device)
    with torch.autocast(embeddings.device.type, enabled=False):
        x = F.normalize(embeddings.float(), dim=1)
        similarity = x @ x.T  # (B,B), the cosines
        # exp(x_a·x_n + x_p·x_n) is a product: the sum over negatives is one matrix product
        push = torch.exp(4 * tan2 * similarity).masked_fill(same, 0)  # of negatives alone
        negatives = (push * copies) @ push.T  # (B,B): Σ_n of each pair (a,p)
    # (a,p) counts c_a c_p times; a row of c copies has c (c - 1) positive pairs with itself
    pairs = same * (copies.unsqueeze(1) * copies - torch.diag(copies))
    tiny = torch.finfo(torch.float32).tiny  # keeps the logarithm and its gradient finite
    log_negatives = torch.where(pairs > 0, negatives, 1).clamp(min=tiny).log()
    terms = F.softplus(log_negatives - 2 * (1 + tan2) * similarity)
    return (terms * pairs).sum() / pairs.sum().clamp(min=1)


def fit_head(model, split, amp):
    """Sets the head's class means, unless a margin loss learned them, and its scale.

    Both are computed from the training images of `split`.
    """
    inference = common.Inference(model)
    inference.model.head = torch.nn.Identity()  # leaves what model.outputs gives
    embeddings = common.predict(inference, split.train_images, amp).logits
    model.head.fit(embeddings, split.train_labels)


@checkpoints.releases_locks()  # report.start locks this part's files
def main(argv=None):
    args = parse_args(argv)
    device = common.pick_device(args.device)
    generator = common.seed_everything(args.seed, device)  # of batches and augmentation
    amp = common.Amp(args.amp, device)
    data = common.load_data(args.dataset, args.data_dir, device, args.quick)
    split = common.split_data(data, args.train_fraction, args.split_seed)
    few = common.few_of(split)  # a small Split, for the accuracy after each epoch
    run = report.start(args, part_name(args), data, split, device, amp)  # named in report.LABELS

    learned = args.loss in MARGINS  # these learn proxies as class means; else fit_head sets them
    head = common.ClassMeans(len(data.classes), common.EMBEDDING_DIM, learned)
    model = common.Model(common.EMBEDDING_DIM, head)
    model = model.to(device, memory_format=common.layout(device))
    criterion = make_criterion(args, model.head)
    steps = common.balance(split.train_labels, args.batch_size).steps
    optimizer = muon.Muon(model, args.lr, momentum=0.9, weight_decay=args.weight_decay,
                          dtype=amp.dtype or torch.float32)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.lr, total_steps=max(10, args.epochs * steps),  # fewer cannot warm up
        pct_start=0.2,  # warms up in a fifth of the steps
        div_factor=10, final_div_factor=100,  # starts at lr / 10, ends at lr / 1000
        cycle_momentum=False)  # momentum stays at 0.9
    average = common.WeightAverage(model, power=12)  # step t weighs as t¹²; it is what is tested
    if args.compile:
        common.compile_backbone(model, device)

    state = {"model": model, "average": average, "optimizer": optimizer, "scheduler": scheduler,
             "scaler": amp.scaler}
    history = report.resume(run, state, generator)  # of epochs so far; loads state, with --resume
    for epoch in range(len(history), args.epochs):
        model.train()
        batches = common.balanced_batches(split.train_images, split.train_labels, args.batch_size,
                                          generator)
        meter = terminal.EpochMeter(epoch, args.epochs, batches, steps)
        for images, labels in meter:  # the batches: uint8 (B,3,32,32), int64 (B,)
            images = common.to_float(images)  # (B,3,32,32) in [0,1]; Model normalizes
            if args.augment:
                images = augment(images, generator, epoch * steps + meter.steps)
            with amp.autocast():
                embeddings = model.outputs(images)  # (B,128)
            loss = criterion(embeddings.float(), labels)  # in float32, for its exponentials
            amp.step(loss, optimizer)  # zero_grad, backward, step
            scheduler.step()  # after every batch
            average.update(model)
            meter.add(loss, labels)
        averaged = average.for_evaluation(few.train_images, amp)  # estimates its BatchNorm
        fit_head(averaged, few, amp)
        accuracy = common.evaluation_accuracy(averaged, few, amp)
        history.append(meter.finish(accuracy, len(few.eval_labels), scheduler))
        checkpoints.save_state(run, history, state, generator)

    model = average.for_evaluation(split.train_images, amp)
    fit_head(model, split, amp)
    predictions = common.predict_splits(model, split, data, amp)
    rows = report.finish(run, model, predictions, history, data.repeated)
    summary.compare(run.folder)
    if not args.no_part2:
        rows += part2_robustness.main(["--checkpoint", run.checkpoint, *arguments.passed_on(args)])
    return rows


# ---- variants: learned proxies, part 3's images, other losses -----------------------------------


def part_name(args):
    """Which part this run is, in tables and in the names of its files."""
    name = "part4"
    if args.proxies:
        name += "_proxies"
    if args.augment:
        name += "_augmented"
    return name


def make_criterion(args, head):
    """The loss (embeddings (B,D), labels (B,)) → scalar that the arguments ask for.

    To add one, name it in --loss's choices, too: tables and figures call the part by that name.
    """
    if args.loss in MARGINS:
        return margin_losses.MarginLoss(args.loss, head, args.margin, args.scale,
                                        args.label_smoothing)
    if args.proxies:
        return ProxyAngularLoss(head, args.alpha_deg)
    if args.loss == "angular":
        return lambda embeddings, labels: angular_loss(embeddings, labels, args.alpha_deg)
    raise ValueError(f"make_criterion makes no loss {args.loss!r}")


class ProxyAngularLoss:
    """`angular_loss` of a batch that one learned proxy of every class joins, PROXY_COPIES times.

    A proxy is a parameter and persists over batches (Movshovitz-Attias et al. 2017). This is no
    longer the published loss: of the 462 pairs of a class with six images, 30 are of two images,
    192 of an image and its proxy, 240 of the proxy and its copies. The proxies are the head's
    means, initialized here; after training, `fit_head` replaces them by class means.
    """

    def __init__(self, head, alpha_deg):
        self.alpha_deg = alpha_deg
        self.proxies = torch.nn.init.normal_(head.means)

    def __call__(self, embeddings, labels):
        classes = torch.arange(len(self.proxies), device=labels.device)
        copies = torch.ones(len(labels) + len(classes), device=labels.device)
        copies[len(labels):] = PROXY_COPIES
        return angular_loss(torch.cat([embeddings, self.proxies]),
                            torch.cat([labels, classes]), self.alpha_deg, copies)


if __name__ == "__main__":
    arguments.run(main)
