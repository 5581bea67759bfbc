"""Part 3: what does perturbed training data change?

Part 1's training on images that are perturbed anew in every epoch; then all that parts 1 and 2 measure. Families of
perturbations that are in training count as seen, the others (common.HELD_OUT_FAMILIES) as held out.

    python part3_augmented.py

Writes what part 1 and part 2 write, as results/part3* and results/part3_robustness*.
"""

import arguments


def parse_args(argv=None):
    parser = arguments.new_parser(__doc__)
    arguments.add_shared(parser)
    arguments.add_training(parser, epochs=30, lr=0.1, weight_decay=1e-3)
    parser.add_argument("--label-smoothing", type=arguments.number(float, 0, 0.9), default=0.1,
                        help="probability spread over all classes in the training target")
    arguments.add_no_part2(parser)
    return arguments.parse(parser, argv)


if __name__ == "__main__":
    parse_args()  # before torch is imported: --help and wrong arguments answer at once

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import common  # noqa: E402
import part2_robustness  # noqa: E402
import report  # noqa: E402
import summary  # noqa: E402

PART = "part3"
SHARE = {"noise": 1, "color": 1, "geometry": 4}  # of 16 training images, so many get a perturbation of the family


def crop_and_flip(images, generator, padding=4):
    """A random crop of every reflection-padded image, half of them mirrored; images (B,3,H,W) of any type."""
    n, _, height, width = images.shape
    padded = F.pad(images, [padding] * 4, mode="reflect")
    top, left = torch.randint(2 * padding + 1, (2, n, 1), generator=generator, device=images.device)
    flip = torch.rand(n, 1, generator=generator, device=images.device) < 0.5
    row = torch.arange(height, device=images.device)
    column = torch.arange(width, device=images.device)
    rows = top + row  # (B,H)
    columns = left + torch.where(flip, width - 1 - column, column)  # (B,W)
    image = torch.arange(n, device=images.device).view(n, 1, 1)
    return padded.permute(0, 2, 3, 1)[image, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def augment(images, generator, step):
    """Perturbs a training batch, float (B,3,32,32) in [0,1] in random order: every image is cropped and mirrored at
    random; for each of the seen families SHARE/16 of them get a perturbation of it, with the step's turn of its members
    (but for the mirror, which half of all images have) and severities."""
    images = crop_and_flip(images, generator)
    groups = list(images.chunk(16))
    families = [family for family in common.SEEN_FAMILIES for _ in range(SHARE.get(family, 1))]
    for i, family in enumerate(families[: len(groups)]):
        names = [n for n in common.PERTURBATIONS if common.FAMILY[n] == family and n != "horizontal_flip"]
        turn, member = divmod(step + i, len(names))
        groups[i] = common.PERTURBATIONS[names[member]](groups[i], 1 + turn % 5, generator)
    return torch.cat(groups)


def main(argv=None):
    args = parse_args(argv)
    device = common.pick_device(args.device)
    generator = common.seed_everything(args.seed, device)
    amp = common.Amp(args.amp, device)
    data = common.load_data(args.dataset, args.data_dir, device, args.quick)
    split = common.split_data(data, args.train_fraction, args.split_seed)
    run = common.describe(args, PART, data, split, device, amp)
    paths = report.start(run)

    model = common.Model(outputs=len(data.classes)).to(device, memory_format=torch.channels_last)
    steps = common.steps_per_epoch(len(split.train_images), args.batch_size)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, nesterov=True,
                                weight_decay=args.weight_decay)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.epochs * steps, pct_start=0.21,
                                                    cycle_momentum=False, div_factor=10, final_div_factor=100)
    average = common.Average(model, split.train_images, amp, power=24)  # what is tested; step t weighs as t²⁴
    if args.compile:
        common.compile_backbone(model, device)

    state = {"model": model, "average": average, "optimizer": optimizer, "scheduler": scheduler, "scaler": amp.scaler}
    done, history = common.resume(paths("_state.pt"), run, state, generator)  # (0, []) without --resume
    for number in range(done, args.epochs):
        model.train()
        batches = common.batches(split.train_images, split.train_labels, args.batch_size, generator)
        epoch = common.Epoch(number, args.epochs, batches, steps)
        for images, labels in epoch:  # uint8 (B,3,32,32), int64 (B,)
            images = common.to_float(images)  # (B,3,32,32) in [0,1]
            images = augment(images, generator, scheduler.last_epoch)
            with amp.autocast():
                logits = model(images)  # (B,C)
                loss = F.cross_entropy(logits, labels, label_smoothing=args.label_smoothing)
            amp.step(loss, optimizer)
            scheduler.step()
            average.update(model)
            epoch.add(loss, logits, labels)
        history.append(epoch.finish(common.watch(average.measured(1000), split, amp), scheduler))
        report.write_history(paths, history, run)
        common.save_state(paths("_state.pt"), run, number + 1, history, state, generator)

    model = average.measured()
    passes = common.predict_splits(model, split, data, amp)  # {"train", "evaluation", "test"}: (Prediction, labels)
    rows = report.clean_rows(run, paths(".pt"), passes)
    report.retire(paths, model)  # part 2's results of a former checkpoint
    common.save_checkpoint(paths(".pt"), model, run | {"outputs": len(data.classes), "head": "none",
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
