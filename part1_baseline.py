"""Part 1: how well does a ResNet18 generalize from one fifth of CIFAR-10's training data?

Trains with cross-entropy and no augmentation; then measures accuracy on the evaluation split (the other four fifths)
and on the test set, and draws a UMAP of the backbone's output on both, none of which it was trained on.

    python part1_baseline.py

Writes results/part1.pt, part1.csv, part1_history.csv, part1_history.png, part1_confusion.png, part1_umap.png, .npz.
"""

import arguments


def parse_args(argv=None):
    parser = arguments.new_parser(__doc__)
    arguments.add_shared(parser)
    arguments.add_training(parser, epochs=12, lr=0.1, weight_decay=2e-3)
    parser.add_argument("--label-smoothing", type=arguments.number(float, 0, 0.9), default=0.1,
                        help="probability spread over all classes in the training target")
    return arguments.parse(parser, argv)


if __name__ == "__main__":
    parse_args()  # before torch is imported: --help and wrong arguments answer at once

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import common  # noqa: E402
import report  # noqa: E402
import summary  # noqa: E402

PART = "part1"


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
                                                    cycle_momentum=False, div_factor=10, final_div_factor=1)
    average = common.Average(model, split.train_images, amp, power=3)  # what is tested; step t weighs as t³
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
    return rows


if __name__ == "__main__":
    arguments.run(main)
