"""Time and memory of our Angular loss against pytorch-metric-learning's, forward and backward.

    python benchmarks/angular.py

Prints a Markdown table. Memory is the peak of a process of its own above what it held before.
Without pytorch-metric-learning its columns are empty.
"""

import argparse
import importlib.util
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import arguments

BATCHES, DIM, CLASSES, ALPHA_DEG = (128, 512, 2048), 128, 10, 45
TRIPLET_LIMIT = 2e8  # pytorch-metric-learning lays every triplet out; from here on it does not fit
UNITS_PER_MB = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss


def measure(library, batch, repeats, queue):
    """Puts the median seconds of a forward and backward pass, and the peak memory in MB."""
    from part4_angular import angular_loss

    import torch

    torch.manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(batch, DIM), dim=1)
    embeddings.requires_grad_(True)
    labels = torch.arange(batch) % CLASSES
    loss = angular_loss
    if library:
        from pytorch_metric_learning.losses import AngularLoss

        theirs = AngularLoss(ALPHA_DEG)
        loss = lambda x, y, _: theirs(x, y)  # noqa: E731
    loss(embeddings[:20], labels[:20], ALPHA_DEG).backward()  # loads what is loaded once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        loss(embeddings, labels, ALPHA_DEG).backward()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    queue.put((statistics.median(seconds), (peak - before) / UNITS_PER_MB))


def in_a_process_of_its_own(*arguments):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure, args=(*arguments, queue))
    process.start()
    process.join()
    return queue.get() if process.exitcode == 0 else None


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=arguments.number(int, 2 * CLASSES, 16384), nargs="+",
                        default=BATCHES)
    parser.add_argument("--repeats", type=arguments.number(int, 1, 10_000), default=5)
    args = parser.parse_args()
    installed = importlib.util.find_spec("pytorch_metric_learning") is not None
    print("| batch | ours, ms | ours, MB | pytorch-metric-learning, ms | MB | ratio of time |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for batch in args.batches:
        seconds, memory = in_a_process_of_its_own(False, batch, args.repeats)
        each = batch // CLASSES
        triplets = batch * each * (batch - each)
        result = None
        theirs = "not installed | - | -"
        if installed:
            theirs = "does not fit | - | -"
            if triplets < TRIPLET_LIMIT:
                result = in_a_process_of_its_own(True, batch, args.repeats)
        if result:
            theirs = f"{1000 * result[0]:.0f} | {result[1]:.0f} | {result[0] / seconds:.0f}"
        print(f"| {batch} | {1000 * seconds:.1f} | {memory:.0f} | {theirs} |", flush=True)


if __name__ == "__main__":
    main()
