"""Cross-entropy against the Angular and the margin losses: the same split, seeds and epochs, the parts' own commands.

    python benchmarks/losses.py --epochs 12 --seeds 0 -- --dataset folder --data-dir data/cifar10-jpg

What follows -- goes to every training. Trains parts 1 and 4 and tests each with part 2, in a results directory a loss
and seed (results/losses/arcface-0, ...); what is finished there is not run again. Prints the table and writes it to
benchmarks/results/losses.md.
"""

import argparse
import csv
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

LOSSES = {"cross-entropy": [], "angular": [], "angular, no centers": ["--no-centers"],
          "angular + N-pair": ["--npair-weight", "0.5"],
          **{loss: ["--loss", loss] for loss in ("arcface", "cosface", "sphereface")}}
PERTURBED = ["gaussian_noise", "jpeg", "color_jitter", "rotation"]  # one a family
TESTS = ["--perturbations", *PERTURBED, "--eps-255", "0", "2", "8", "16", "--no-umap"]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--results-dir", type=Path, default=Path("results/losses"))
    parser.add_argument("training", nargs="*", help="arguments of every training, after --")
    return parser.parse_args()


def study(loss, seed, args):
    """Trains and tests what is not there yet; returns the results directory and the part's name."""
    folder = ROOT / args.results_dir / f"{loss.replace(' ', '')}-{seed}"
    part, script = ("part1", "part1_baseline.py") if loss == "cross-entropy" else ("part4", "part4_angular.py")
    train = [script, "--epochs", str(args.epochs), "--seed", str(seed), "--no-umap", *LOSSES[loss], *args.training]
    record = folder / "training.txt"
    if record.exists() and record.read_text() != shlex.join(train):
        sys.exit(f"{folder} holds the results of {record.read_text()}, this would be {shlex.join(train)}; give another "
                 "--results-dir")
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(shlex.join(train))
    test = ["part2_robustness.py", "--checkpoint", str(folder / f"{part}.pt"), *TESTS]
    for command, result in ((train + ["--no-part2"] * (part == "part4"), f"{part}.csv"),
                            (test, "part2.csv" if part == "part1" else "part4_robustness.csv")):
        if not (folder / result).exists():
            command += ["--results-dir", str(folder), "--resume"]
            print("$ python", shlex.join(command), flush=True)
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    return folder, part


def values(folder, part):
    """{column: fraction} of one study."""
    rows = []
    for name in (f"{part}.csv", "part2.csv" if part == "part1" else "part4_robustness.csv"):
        with open(folder / name, newline="") as file:
            rows += csv.DictReader(file)

    def accuracies(wanted):
        return statistics.mean(float(r["value"]) for r in rows if r["metric"] == "accuracy" and wanted(r))

    return {
        "evaluation": accuracies(lambda r: r["split"] == "evaluation" and r["head"] == "own"),
        "test": accuracies(lambda r: r["split"] == "test" and r["condition"] == "clean" and r["head"] == "own"),
        "test, 20-NN": accuracies(lambda r: r["split"] == "test" and r["head"] == "knn"),
        "mPC (4)": accuracies(lambda r: r["condition"] in PERTURBED),
        **{f"{attack.upper()} {eps}": accuracies(lambda r: (r["condition"], r["severity"]) == (attack, eps))  # noqa: B023
           for attack in ("fgsm", "pgd") for eps in ("2", "8")},
    }


def settings(folder, part):
    """What a loss was trained with beside it, in words, and the commit it was trained at."""
    from common import read_meta

    meta = read_meta(folder / f"{part}.pt")
    args = meta["args"]
    words = [f"lr {args['lr']:g}"]
    if part == "part1":
        words.append(f"label smoothing {args['label_smoothing']:g}")
    elif args["loss"] == "angular":
        words += [f"alpha {args['alpha_deg']:g}°", f"{'no' if args['no_centers'] else 'learned'} centers"]
        words += [f"N-pair weight {args['npair_weight']:g}"] * (args["npair_weight"] > 0)
    else:
        words += [f"margin {'the default' if args['margin'] is None else args['margin']}", "label smoothing 0.1",
                  "scale " + ("its length" if args["loss"] == "sphereface" else f"{args['scale']:g}")]
    return f"{', '.join(words)}; {meta['versions']['commit']}"


def right(study):
    """Which clean test images a study's model classifies right: booleans."""
    import numpy as np

    return np.load(study[0] / f"{study[1]}_correct.npz")["clean/"]


def main():
    args = parse_args()
    studies = {loss: [] for loss in args.losses}
    for seed in args.seeds:
        for loss in args.losses:
            studies[loss].append(study(loss, seed, args))
    import torch

    from common import holm, mcnemar

    others = [loss for loss in args.losses if loss != "cross-entropy" and "cross-entropy" in studies]
    p_values = [max(mcnemar(right(a), right(b)) for a, b in zip(studies["cross-entropy"], studies[loss], strict=True))
                for loss in others]  # of several seeds, the least significant
    tests = dict(zip(others, holm(p_values), strict=True))
    lines = []
    for loss, done in studies.items():
        found = [values(*one) for one in done]
        cells = []
        for column in found[0]:
            series = [100 * f[column] for f in found]
            spread = f" ± {statistics.stdev(series):.1f}" if len(series) > 1 else ""
            cells.append(f"{statistics.mean(series):.1f}{spread}")
        cells.append(f"{tests[loss]:.1g}" if loss in tests else "")
        lines.append(f"| {loss} ({settings(*done[0])}) | {' | '.join(cells)} |")
    many = len(args.seeds) > 1
    text = "\n".join([
        "# Losses on the same split, seeds and epochs", "",
        f"`python benchmarks/losses.py {shlex.join(sys.argv[1:])}`, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}. Accuracy in %, {args.epochs} epochs, "
        f"{'mean ± standard deviation over the seeds' if many else 'one training each, seed'} "
        f"{', '.join(map(str, args.seeds))}. mPC: mean over {', '.join(PERTURBED)} at severity 3. "
        "Eps in 1/255, on 2,000 test images (FGSM) and 100 of them (PGD) where there are as many. p: McNemar's exact "
        "test against cross-entropy on the clean test images, corrected after Holm, of several seeds the largest. "
        "The Angular loss classifies by the class means of the embeddings, the margin losses by the centers they "
        "learn, with the margins and scales tried first (recipes.md has what else was tried).", "",
        f"| | {' | '.join(found[0])} | p |", f"| --- |{' ---: |' * (len(found[0]) + 1)}", *lines, ""])
    print(text)
    path = ROOT / "benchmarks" / "results" / "losses.md"
    path.write_text(text)
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
