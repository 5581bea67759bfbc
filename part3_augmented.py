"""Part 3: what does perturbed training data change?

Trains as part 1 does, on images that are perturbed anew in every epoch; then measures what parts 1
and 2 measure. Blur and compression are never trained on (common.HELD_OUT_FAMILIES; but a JPEG
copy's images are compressed already): does robustness generalize to them?

    python part3_augmented.py                     (crop and flip alone: --families none)

15 epochs, as long as part 1. Accuracy on the 10,000 test images of a JPEG copy of CIFAR-10: 83.9 ±
0.3 %, mean and standard deviation of three trainings on three splits (results/reference).

Writes what parts 1 and 2 write, as results/part3* and results/part3_robustness*
(part3_crop_flip* with --families none).
"""

import arguments
import checkpoints
import common
import muon
import part2_robustness
import report
import summary
import terminal

import torch
import torch.nn.functional as F

SHARES = {"noise": 1, "color": 1, "geometry": 4}  # of 16 images; the rest: crop and flip alone


def parse_args(argv=None):
    parser = arguments.new_parser(__file__, __doc__)
    arguments.add_shared(parser)
    arguments.add_recipe(parser)
    parser.add_argument("--families", nargs="+", choices=("none", *common.SEEN_FAMILIES),
                        default=common.SEEN_FAMILIES, help="families of perturbations to train on; "
                        "none: crop and flip alone")
    arguments.add_no_part2(parser)
    args = arguments.parse(parser, argv)
    if "none" in args.families and len(args.families) > 1:
        parser.error("argument --families: none stands alone")
    args.families = tuple(name for name in common.SEEN_FAMILIES if name in args.families)
    args.shares = common.shares_of(SHARES, args.families)
    return args


def crop_and_flip(images, generator):
    """A random crop of every padded image, mirrored at random; images (B,3,H,W) of any type."""
    n, _, height, width = images.shape
    padding = height // 8  # 4 pixels of 32, as He et al. 2016 (who pad with zeros)
    padded = F.pad(images, (padding, padding, padding, padding), mode="reflect")
    top, left = torch.randint(2 * padding + 1, (2, n, 1), generator=generator, device=images.device)
    flip = torch.rand(n, 1, generator=generator, device=images.device) < 0.5
    row = torch.arange(height, device=images.device)
    column = torch.arange(width, device=images.device)
    rows = top + row  # (B,H)
    columns = left + torch.where(flip, width - 1 - column, column)  # (B,W)
    index = torch.arange(n, device=images.device).view(n, 1, 1)
    pixels = padded.permute(0, 2, 3, 1)[index, rows.unsqueeze(2), columns.unsqueeze(1)]
    return pixels.permute(0, 3, 1, 2)  # back from (B,H,W,3)


def augment(images, generator, step, families=common.SEEN_FAMILIES):
    """Perturbs the images of a shuffled training batch, float (B,3,H,W) in [0,1].

    Every image is cropped and mirrored at random. The first ones then get noise, the next a color
    change, the next a geometric one (SHARES): of 64 images 0 to 3, 4 to 7 and 8 to 23. Each step
    takes the family's next perturbation and, after each full turn, the next severity.
    """
    images = crop_and_flip(images, generator)
    start = 0
    share = 0
    for family in families:
        share += SHARES[family]
        end = int((len(images) * share + step % 16) / 16)  # rounded up or down by turns
        names = members(family)
        turn, member = divmod(step, len(names))
        severity = 1 + turn % 5
        if end > start:  # a small batch has an image for the family only in some steps
            perturb = common.PERTURBATIONS[names[member]]
            images[start:end] = perturb(images[start:end], severity, generator)
        start = end
    return images


def members(family):
    """A family's perturbations except horizontal_flip, which crop_and_flip does already."""
    return [name for name in common.PERTURBATIONS
            if common.FAMILY[name] == family and name != "horizontal_flip"]


def part_name(args):
    """Which part this run is, in tables and in the names of its files."""
    return "part3" if args.families else "part3_crop_flip"


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

    model = common.Model(outputs=len(data.classes))
    model = model.to(device, memory_format=common.layout(device))
    steps = common.steps_per_epoch(len(split.train_images), args.batch_size)
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
        batches = common.batches(split.train_images, split.train_labels, args.batch_size, generator)
        meter = terminal.EpochMeter(epoch, args.epochs, batches, steps)
        for images, labels in meter:  # the batches: uint8 (B,3,32,32), int64 (B,)
            images = common.to_float(images)  # (B,3,32,32) in [0,1]; Model normalizes
            images = augment(images, generator, epoch * steps + meter.steps, args.families)
            with amp.autocast():
                logits = model(images)  # (B, classes)
                loss = F.cross_entropy(logits, labels, label_smoothing=args.label_smoothing)
            amp.step(loss, optimizer)  # zero_grad, backward, step
            scheduler.step()  # after every batch
            average.update(model)
            meter.add(loss, labels, logits)
        averaged = average.for_evaluation(few.train_images, amp)  # estimates its BatchNorm
        accuracy = common.evaluation_accuracy(averaged, few, amp)
        history.append(meter.finish(accuracy, len(few.eval_labels), scheduler))
        checkpoints.save_state(run, history, state, generator)

    model = average.for_evaluation(split.train_images, amp)
    predictions = common.predict_splits(model, split, data, amp)
    rows = report.finish(run, model, predictions, history, data.repeated)
    summary.compare(run.folder)
    if not args.no_part2:
        rows += part2_robustness.main(["--checkpoint", run.checkpoint, *arguments.passed_on(args)])
    return rows


if __name__ == "__main__":
    arguments.run(main)
