"""Part 1: how well does a ResNet18 generalize from a fifth of CIFAR-10's training data?

Trains with cross-entropy and without augmentation. Then measures accuracy on the evaluation split
(the other four fifths) and on the test set, and draws a UMAP of the features (the 512 inputs of the
last layer) of images from both: the network was trained on none of them.

    python part1_baseline.py

15 epochs (150,000 images) take 22 to 52 minutes on one core with bf16. Accuracy on the 10,000 test
images of a JPEG copy of CIFAR-10: 77.5 ± 0.1 %, mean and standard deviation of three trainings on
three splits (results/reference).

Writes results/part1.pt, .csv, .json, _history.csv, _correct.npz, _state.pt (for --resume), and the
figures _history.png, _confusion.png, _umap.png (coordinates: _umap.npz); then the comparison of all
parts run so far: summary.html, summary.md, comparison.csv and comparison.png.
"""

import arguments
import checkpoints
import common
import muon
import report
import summary
import terminal

import torch
import torch.nn.functional as F


def parse_args(argv=None):
    parser = arguments.new_parser(__file__, __doc__)
    arguments.add_shared(parser)
    arguments.add_recipe(parser)
    return arguments.parse(parser, argv)


@checkpoints.releases_locks()  # report.start locks this part's files
def main(argv=None):
    args = parse_args(argv)
    device = common.pick_device(args.device)
    generator = common.seed_everything(args.seed, device)  # of batches and augmentation
    amp = common.Amp(args.amp, device)
    data = common.load_data(args.dataset, args.data_dir, device, args.quick)
    split = common.split_data(data, args.train_fraction, args.split_seed)
    few = common.few_of(split)  # a small Split, for the accuracy after each epoch
    run = report.start(args, "part1", data, split, device, amp)  # named in report.LABELS

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
    return rows


if __name__ == "__main__":
    arguments.run(main)
