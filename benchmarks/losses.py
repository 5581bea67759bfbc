"""Cross-entropy against the Angular and the margin losses: same split, seeds, epochs and recipe.

    python benchmarks/losses.py --seeds 0 -- --dataset folder --data-dir data/cifar10-jpg

What follows -- goes to every training. Trains parts 1 and 4 and tests each with part 2, in a
results directory of each loss and seed (results/losses/arcface-0, ...); what is finished there is
not run again. Prints the table and writes it to --output.
"""

import argparse
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import arguments
import metrics
import storage

import torch

ROOT = Path(__file__).parent.parent
LOSSES = {"cross-entropy": [], "angular": [], "angular + proxies": ["--proxies"],
          "arcface": ["--loss", "arcface"], "cosface": ["--loss", "cosface"],
          "sphereface": ["--loss", "sphereface"]}
PERTURBED = ["gaussian_noise", "jpeg", "color_jitter", "rotation"]  # one a family
TESTS = ["--perturbations", *PERTURBED, "--eps-255", "0", "2", "8", "16", "--no-umap"]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=arguments.number(int, 1, 100_000), default=15)
    parser.add_argument("--seeds", type=arguments.number(int, 0, 2**32 - 1), nargs="+", default=[0])
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--results-dir", type=Path, default=Path("results/losses"))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/losses.md")
    parser.add_argument("training", nargs="*", help="arguments of every training, after --")
    return parser.parse_args()


def part_of(loss):
    """The part that trains with a loss: what its files are called, and its script."""
    if loss == "cross-entropy":
        return "part1", "part1_baseline.py"
    if loss == "angular + proxies":
        return "part4_proxies", "part4_angular.py"
    return "part4", "part4_angular.py"


def study(loss, seed, args):
    """Trains and tests what is not there yet; returns the results directory and the part's name."""
    folder = ROOT / args.results_dir / f"{loss.replace(' ', '')}-{seed}"
    part, script = part_of(loss)
    train = [script, "--epochs", str(args.epochs), "--seed", str(seed), "--no-umap", *LOSSES[loss],
             *args.training]
    if part != "part1":
        train.append("--no-part2")
    test = ["part2_robustness.py", "--checkpoint", str(folder / f"{part}.pt"), *TESTS]
    run_once(train, folder, part)
    run_once(test, folder, storage.robustness_name(part))
    return folder, part


def run_once(command, folder, name):
    """Runs a part unless its results are there; ends if they are of another command."""
    command = [*command, "--results-dir", str(folder), "--resume"]
    record = storage.read_record(folder, name)
    if not record:
        print("$ python", shlex.join(command), flush=True)
        code = subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
        if code:
            sys.exit(code)  # the part has said why
    elif record["command"] != arguments.pasted(["python", *command]):
        raise arguments.UsageError(f"{folder}/{name}.json is of another command, "
                                   f"{record['command']}; give another --results-dir")


def values(folder, part):
    """{column: accuracy} of one study, fractions."""
    rows = storage.read_table(folder / f"{part}.csv")
    rows += storage.read_table(folder / f"{storage.robustness_name(part)}.csv")
    clean = {}
    perturbed = []
    attacked = {}
    for row in rows:
        if row["metric"] != "accuracy":
            continue
        if row["condition"] == "clean":
            key = row["split"], row["head"]
            clean.setdefault(key, row["value"])  # the part's own; part 2's differs by rounding
        elif row["condition"] in PERTURBED:
            perturbed.append(row["value"])
        else:
            attacked[row["condition"], row["severity"]] = row["value"]
    found = {"evaluation": clean["evaluation", "own"], "test": clean["test", "own"],
             "test, k-NN": clean["test", "knn"], "mPC (4)": statistics.mean(perturbed)}
    for attack in ("fgsm", "pgd"):
        for eps in ("2", "8"):
            found[f"{attack.upper()} {eps}"] = attacked[attack, eps]
    return found


def settings(folder, part):
    """What a loss was trained with, in words, and the commit it was trained at."""
    record = storage.read_record(folder, part)
    args = record["args"]
    words = [f"{args['epochs']} epochs", f"lr {args['lr']:g}"]
    if part == "part1":
        words.append(f"label smoothing {args['label_smoothing']:g}")
    elif args["loss"] == "angular":
        words.append(f"alpha {args['alpha_deg']:g}°")
    else:
        margin = "the default" if args["margin"] is None else args["margin"]
        scale = "its length" if args["loss"] == "sphereface" else f"{args['scale']:g}"
        words += [f"margin {margin}", f"scale {scale}"]
    return f"{', '.join(words)}; {record['versions'].get('commit', 'no commit')}"


def right(study):
    """Which clean test images a study's model classifies right: booleans."""
    return storage.read_correct(*study).images["test/clean/"]


def compared(studies):
    """{loss: p} of McNemar's test against cross-entropy, Holm-corrected, of seeds the largest."""
    others = [loss for loss in studies if loss != "cross-entropy"]
    if "cross-entropy" not in studies or not others:
        return {}
    p_values = []
    for loss in others:
        pairs = zip(studies["cross-entropy"], studies[loss], strict=True)
        p_values.append(max(metrics.mcnemar(right(a), right(b)) for a, b in pairs))
    return dict(zip(others, metrics.holm(p_values), strict=True))


def table(studies):
    """The lines of the Markdown table."""
    p_values = compared(studies)
    lines = []
    for loss, done in studies.items():
        found = [values(*one) for one in done]
        cells = []
        for column in found[0]:
            series = [100 * f[column] for f in found]
            spread = f" ± {statistics.stdev(series):.1f}" if len(series) > 1 else ""
            cells.append(f"{statistics.mean(series):.1f}{spread}")
        cells.append(f"{p_values[loss]:.1g}" if loss in p_values else "")
        lines.append(f"| {loss} ({settings(*done[0])}) | {' | '.join(cells)} |")
    return [f"| | {' | '.join(found[0])} | p |", f"| --- |{' ---: |' * (len(found[0]) + 1)}",
            *lines]


def datasets(studies):
    """What the studies were trained on, as their tables call it."""
    records = [storage.read_record(*one) for done in studies.values() for one in done]
    return " and ".join(sorted({record["dataset"] for record in records}))


def main():
    args = parse_args()
    studies = {loss: [] for loss in args.losses}
    for seed in args.seeds:
        for loss in args.losses:
            studies[loss].append(study(loss, seed, args))
    what = "one training each, seed" if len(args.seeds) == 1 else (
        "mean ± standard deviation over the seeds")
    text = "\n".join([
        "# Losses on the same split, seeds and epochs", "",
        f"`python benchmarks/losses.py {shlex.join(sys.argv[1:])}`, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}. {datasets(studies)}. Accuracy in %, {what} "
        f"{', '.join(map(str, args.seeds))}. mPC: mean over {', '.join(PERTURBED)} at severity 3. "
        "Eps in 1/255, on 2,000 test images (FGSM) and 100 of them (PGD) where there are as many. "
        "p: McNemar's exact test against cross-entropy on the clean test images, Holm-corrected, "
        "of several seeds the largest. The Angular loss classifies by the class means of the "
        "embeddings, the margin losses by the proxies they learn.", "", *table(studies), ""])
    print(text)
    storage.write_text(args.output, text)
    print(f"Written to {args.output}")


if __name__ == "__main__":
    arguments.run(main)
