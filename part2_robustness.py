"""Part 2: how robust is a trained model to perturbed and to attacked test images?

Measures accuracy on the whole test set under each perturbation (in the literature: corruption) and
severity. Attacks test images with the fast gradient sign method (FGSM, by cleverhans), and checks
for gradient masking. Draws clean, perturbed and attacked images in one UMAP, and compares with the
clean accuracy. Works on the checkpoint of any part.

    python part2_robustness.py --checkpoint results/part1.pt

On a JPEG copy of CIFAR-10, part 1's mean accuracy over perturbations is 68.5 ± 0.1 % at severity 3
(n = 10,000; 67.2 ± 0.1 % over all five severities), and its accuracy under FGSM at 8/255 is 13.1 ±
0.6 % (n = 2,000): mean and standard deviation of three trainings on three splits
(results/reference).

Writes results/part2.csv, .json, _correct.npz, and the figures _severities.png, _examples.png,
_fgsm.png, _adversarial.png, _umap.png (for part 3's checkpoint results/part3_robustness.csv …).
"""

import contextlib
import hashlib
from typing import NamedTuple

import arguments
import audit
import checkpoints
import common
import comparison
import datasets
import metrics
import plots
import report
import summary
import terminal
from arguments import UsageError

import torch

UMAP_PERTURBATIONS = ("gaussian_noise", "gaussian_blur", "color_jitter", "vertical_flip",
                      "rotation", "cutout")
EXAMPLES = 10  # images in the pictures of examples
AUDIT_EPS = (2, 8, 16)  # in 1/255: where all attacks are tried, if the sweep has them
FIGURE_EPS = 8  # in 1/255: of the attack that the UMAP shows; the usual eps for CIFAR-10


def parse_args(argv=None):
    parser = arguments.new_parser(__file__, __doc__)
    arguments.add_shared(parser)
    add = parser.add_argument_group("part 2").add_argument
    add("--checkpoint", type=arguments.path, default="results/part1.pt",
        help="a checkpoint that a training part wrote")
    add("--perturbations", nargs="+", choices=("all", *common.PERTURBATIONS), default=["all"],
        metavar="NAME", help="names from perturbations.py, or all")
    add("--severities", nargs="+", type=int, choices=range(1, 6), default=[3], metavar="N",
        help="severities to test, 1 to 5, for perturbations that have one")
    add("--cifar10c", type=arguments.path, metavar="DIR",
        help="also test on CIFAR-10-C: the folder of its <corruption>.npy and labels.npy")
    add("--eps-255", nargs="+", type=arguments.number(float, 0, 15_000),  # L2: all pixels 14,134
        default=[0, 1, 2, 4, 8, 16], metavar="EPS",
        help="attack strengths in 1/255 of the pixel range")
    add("--norm", choices=("inf", "2"), default="inf", help="norm that bounds the attack")
    add("--targeted", action="store_true", help="also attack towards the least likely class")
    add("--attack-images", type=arguments.number(int, 10, 1_000_000), default=2000,
        help="test images to attack, spread evenly over the test set")
    add("--audit-images", type=arguments.number(int, 10, 1_000_000), default=100,
        help="how many of these images PGD attacks as well, for the audit")
    arguments.leave_to_checkpoint(parser)
    args = arguments.parse(parser, argv)
    if args.norm == "inf" and max(args.eps_255) > 255:
        parser.error(f"--eps-255 {max(args.eps_255):g}: expected 0 to 255, all of the pixel range, "
                     "unless --norm is 2")
    args.severities = sorted(set(args.severities))
    args.eps_255 = sorted({float(f"{eps:g}") for eps in args.eps_255})  # as tables call them
    return args


@checkpoints.releases_locks()
def main(argv=None):
    args = parse_args(argv)
    device = common.pick_device(args.device)
    conditions = list_conditions(args.perturbations, args.severities)
    model, meta = common.load_checkpoint(args.checkpoint, device)
    arguments.take_from_checkpoint(args, meta)
    published = ()
    if args.cifar10c is not None:
        published = datasets.cifar10c(args.cifar10c, meta["classes"])
    amp = common.Amp(args.amp, device)
    data = common.load_data(args.dataset, args.data_dir, device, args.quick)
    split = common.split_data(data, args.train_fraction, args.split_seed)
    run = report.start_test(args, model, meta, data, split, device, amp)
    finished = checkpoints.resume_finished(run)
    attack_idx = common.evenly_spaced(len(data.test_labels), args.attack_images)
    clock = terminal.Clock()

    inference = common.Inference(model, args.compile)
    clean = common.predict(inference, data.test_images, amp, data.test_labels)
    report.check_network(args.checkpoint, meta, clean)
    sets = perturbed_sets(data, conditions, published, estimate=not args.resume)
    tested = test_perturbations(args, run, inference, data, amp, sets, clean, attack_idx, finished)
    clock.stop("perturbations")

    images = common.to_float(data.test_images[attack_idx])  # rows and maps call them "test"
    part1 = report.part1_beside(args.results_dir, meta, device)
    attacked = attack(args, run, model, images, data.test_labels[attack_idx], part1)
    clock.stop("attacks")

    rows = finish(args, run, tested, attacked, part1)
    clock.stop("UMAP, tables, figures")
    clock.print()
    summary.compare(run.folder)
    with contextlib.suppress(OSError):  # last: a run that is killed before can still resume
        run.path("_state.pt").unlink()
    return rows


# ---- perturbations ------------------------------------------------------------------------------


def list_conditions(names, severities):
    """[(perturbation, severity)] of names or "all", each once; severity "" where there is none."""
    conditions = []
    for name in common.PERTURBATIONS if "all" in names else dict.fromkeys(names):
        levels = [""] if name in common.NO_SEVERITY else severities
        conditions += [(name, level) for level in levels]
    return conditions


def perturbed_sets(data, conditions, published, estimate):
    """Yields (perturbation, severity, images uint8 (N,3,S,S), labels (N,)), CIFAR-10-C's last."""
    labels = data.test_labels
    for name, severity in terminal.timed(conditions, estimate):
        images = common.perturb(data.test_images, name, severity or 1)  # some ignore the severity
        yield name, severity, images, labels
    for name, severity, images, theirs in published:
        yield (name, severity, torch.from_numpy(images).to(labels.device),
               torch.from_numpy(theirs).to(labels.device))


class Tested(NamedTuple):
    """The results of the perturbations."""

    rows: list
    correct: dict  # "test/condition/severity" → booleans (N,)
    pixels: dict  # the same → hash of the perturbed images; of CIFAR-10-C's labels, too
    panels: list  # of the UMAP
    examples: list  # (title, images)


def test_perturbations(args, run, inference, data, amp, sets, clean, attack_idx, finished):
    """Accuracy and calibration on the whole test set, clean and under every perturbation."""
    images, labels = data.test_images, data.test_labels  # uint8 (N,3,S,S), int64 (N,)
    umap_idx = attack_idx[common.evenly_spaced(len(attack_idx), args.umap_points)]
    example_idx = attack_idx[of_all_classes(labels[attack_idx])]
    of_umap = clean.features[umap_idx]
    panel = report.Panel("clean", "test", "clean", "", of_umap, labels[umap_idx], of_umap)
    tested = Tested([], {}, {}, [panel], [("clean", images[example_idx])])
    add_condition(tested, run, "clean", "", clean.logits.argmax(1), labels,
                  metrics.calibration_error(clean.logits, labels))

    for name, severity, perturbed, truth in sets:
        ours = name in common.PERTURBATIONS
        strongest = ours and severity in ("", max(args.severities))
        sha = hashlib.sha256(perturbed.cpu().numpy())
        if not ours:  # CIFAR-10-C has labels of its own
            sha.update(truth.cpu().numpy())
        pixels = sha.hexdigest()[:12]
        key = name, severity, pixels  # of other pixels, such as edited code's: predicted anew
        if key not in finished:
            logits, features, _ = common.predict(inference, perturbed, amp)
            calibration_error = metrics.calibration_error(logits, truth)
            some = features[umap_idx] if strongest and name in UMAP_PERTURBATIONS else None
            # all that --resume finds of it: what else is measured on the logits must be kept, too
            finished[key] = logits.argmax(1), calibration_error, some
            checkpoints.save_finished(run, finished)
        predicted, calibration_error, features = finished[key]
        add_condition(tested, run, name, severity, predicted, truth, calibration_error)
        tested.pixels[f"test/{name}/{severity}"] = pixels
        title = f"{name} {severity}".replace("_", " ").strip()
        if strongest:
            tested.examples.append((title, perturbed[example_idx]))
        if features is not None:
            tested.panels.append(report.Panel(title, "test", name, str(severity), features,
                                              labels[umap_idx], of_umap))
    return tested


def of_all_classes(labels):
    """Positions of at most EXAMPLES images, equally many of all classes, or of some in between."""
    classes = labels.unique().cpu()
    classes = classes[common.evenly_spaced(len(classes), EXAMPLES)]
    positions = []
    for c in classes:
        mine = (labels.cpu() == c).nonzero().flatten()
        positions.append(mine[common.evenly_spaced(len(mine), EXAMPLES // len(classes))])
    return torch.cat(positions)


def add_condition(tested, run, condition, severity, predicted, labels, calibration_error):
    """Adds accuracy and calibration error of the model's own head, and which images are right."""
    tested.rows.append(report.accuracy_row(run, "test", condition, severity, "own", predicted,
                                           labels))
    tested.rows.append(report.row(run, "test", condition, severity, "own", "calibration_error",
                                  calibration_error, len(labels)))
    tested.correct[f"test/{condition}/{severity}"] = report.correct(predicted, labels)


# ---- the attack ---------------------------------------------------------------------------------


class Attacked(NamedTuple):
    """The results of the attacks."""

    rows: list
    correct: dict  # "test/condition/eps" → booleans (n,)
    audit: list  # of audit.Check
    features: torch.Tensor  # (n,512) under FGSM at `eps_255`
    labels: torch.Tensor  # (n,)
    eps_255: float
    examples: list  # (title, images)


def attack(args, run, model, images, labels, part1=None):
    """The FGSM sweep and its audit, in float32, on images (n,3,H,W) in [0,1], true labels (n,).

    part1: the model whose adversarial images are tried as well.
    """
    names = audit.NAMES[args.norm]
    largest = max(audit.PGD_AT_LEAST[args.norm], *args.eps_255)  # must leave next to nothing
    sweep = sorted({0, *args.eps_255, largest})  # 0 must change nothing
    audited = sorted({largest, *AUDIT_EPS}.intersection(sweep))
    pgd_idx = common.evenly_spaced(len(labels), args.audit_images)
    float32 = common.Amp("off", images.device)
    clean = common.predict(model, images, float32).logits
    directions = make_directions(args, names, model, images, labels, clean, part1)

    predicted = {}  # (attack, eps in 1/255) → labels (n,), or (len(pgd_idx),) of "pgd…"
    features = {}
    examples = []
    excess = 0.0  # largest |delta| - eps
    example_idx = of_all_classes(labels)
    plan = plan_sweep(names, directions, sweep, audited)
    for name, eps_255 in terminal.progress(plan, "FGSM"):
        eps = eps_255 / 255
        adversarial = (images + eps * directions[name]).clamp(0, 1)
        logits, features[name, eps_255], _ = common.predict(model, adversarial, float32)
        predicted[name, eps_255] = logits.argmax(1)
        excess = max(excess, excess_over(eps, images, adversarial, args.norm))
        if name == names.fgsm:
            examples.append((f"FGSM {eps_255:g}/255", adversarial[example_idx]))
    for eps_255 in terminal.progress(audited, "PGD"):
        eps = eps_255 / 255
        for name, victim in ((names.pgd, model), (f"{names.pgd}_unit", common.UnitLogits(model))):
            adversarial = common.pgd(victim, images[pgd_idx], labels[pgd_idx], eps,
                                     float(args.norm))
            logits = common.predict(model, adversarial, float32).logits
            predicted[name, eps_255] = logits.argmax(1)
            excess = max(excess, excess_over(eps, images[pgd_idx], adversarial, args.norm))

    right = {}
    rows = []
    for (name, eps_255), found in predicted.items():
        if not name.startswith(comparison.ATTACKS):
            raise UsageError(f"comparison.ATTACKS has no beginning of the name {name!r}, without "
                             "which tables and tests take this attack for a perturbation; add one")
        place = (run, "test", name, f"{eps_255:g}", "own", found)
        truth = labels[pgd_idx] if name.startswith(names.pgd) else labels
        right[name, eps_255] = found == truth
        rows.append(report.accuracy_row(*place, truth))
        if name == f"{names.fgsm}_targeted":
            rows.append(report.accuracy_row(*place, clean.argmin(1), "target class reached"))
    no_gradient = (directions[names.fgsm].flatten(1).abs().amax(1) == 0).float().mean().item()
    changed = int((predicted[names.fgsm, 0] != clean.argmax(1)).sum())
    checks = audit.audit_attacks(names, right, pgd_idx, audited, no_gradient, excess, changed)

    rows += audit.worst_case_rows(run, names, right, pgd_idx, sweep)
    rows.append(report.row(run, "test", names.fgsm, "", "own", "share of images without a gradient",
                           no_gradient, len(labels)))
    for check in checks:
        rows.append(report.row(run, "test", names.fgsm, "", "own", f"audit: {check.name}",
                               float(check.passed), check.n))
    at = min((eps for eps in sweep if eps >= FIGURE_EPS), default=largest)
    kept = {f"test/{name}/{eps:g}": found.cpu().numpy() for (name, eps), found in right.items()}
    return Attacked(rows, kept, checks, features[names.fgsm, at], labels, at, examples)


def excess_over(eps, images, adversarial, norm):
    """By how much the largest change of an image exceeds eps; as a share of eps where eps > 1."""
    largest = (adversarial - images).flatten(1).norm(float(norm), dim=1).max().item()
    return (largest - eps) / max(eps, 1)


def make_directions(args, names, model, images, labels, clean, part1):
    """{attack: step of eps 1}; none depends on eps, so each serves the whole sweep.

    An attack that is added here is in the tables if its name begins as one in comparison.ATTACKS,
    and in the figure if plots.ATTACK has a look for it.
    """
    norm = float(args.norm)
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same noise on every device
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    if args.norm == "inf":
        noise = noise.sign()
    else:
        noise = noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    unit = common.UnitLogits(model)  # in which a saturated softmax cannot hide the gradient
    directions = {
        names.fgsm: common.fgsm_direction(model, images, labels, norm),  # the reported attack
        f"{names.fgsm}_unit": common.fgsm_direction(unit, images, labels, norm),
        # without the true labels, which one-step attacks may leak (Kurakin et al. 2017)
        f"{names.fgsm}_predicted": common.fgsm_direction(model, images, clean.argmax(1), norm),
        names.random: noise}
    if args.targeted:
        directions[f"{names.fgsm}_targeted"] = common.fgsm_direction(
            model, images, clean.argmin(1), norm, targeted=True)
    if part1 is not None:
        directions[f"{names.fgsm}_from_part1"] = common.fgsm_direction(part1, images, labels, norm)
    return directions


def plan_sweep(names, directions, sweep, audited):
    """[(attack, eps)]: FGSM at every eps, the others where they are compared with it."""
    plan = [(names.fgsm, eps) for eps in sweep]
    for name in directions:
        if name == f"{names.fgsm}_unit":
            plan += [(name, eps) for eps in sweep if eps > 0]
        elif name != names.fgsm:
            plan += [(name, eps) for eps in audited]
    return plan


# ---- tables and figures -------------------------------------------------------------------------


def finish(args, run, tested, attacked, part1):
    """Writes tables, then figures; prints them; returns the rows."""
    names = audit.NAMES[args.norm]
    umap_idx = common.evenly_spaced(len(attacked.features), args.umap_points)
    clean = tested.panels[0]
    panels = [*tested.panels]
    if torch.equal(attacked.labels[umap_idx], clean.labels):
        panels.append(report.Panel(f"FGSM {attacked.eps_255:g}/255", "test", names.fgsm,
                                   f"{attacked.eps_255:g}", attacked.features[umap_idx],
                                   clean.labels, clean.features))
    else:  # edited code attacks some of them, such as those that are classified right
        print("No map of the attack: it was on other images than the other maps show")
    measured = report.umap_rows(run, panels)
    rows = [*tested.rows, *attacked.rows, *measured]
    report.write_results(run, {".csv": rows}, report.ROBUSTNESS_FIGURES,
                         tested.correct | attacked.correct, checkpoints.weights_hash(part1),
                         tested.pixels)
    strongest = f"Perturbations at severity {max(args.severities)}"
    failed = [check.name for check in attacked.audit if not check.passed]
    plots.severities(run.path("_severities.png"), rows, run)
    plots.examples(run.path("_examples.png"), tested.examples, run, strongest)
    plots.examples(run.path("_adversarial.png"), attacked.examples, run, "FGSM: attacked images")
    plots.attack(run.path("_fgsm.png"), rows, run, args.norm, failed)
    report.draw_umap(run, panels, measured)
    terminal.print_accuracies(f"{args.checkpoint} on the test set", rows)
    terminal.print_table("Audit of the attack", ("check", "found", "passed"),
                         [(check.name, check.found, "yes" if check.passed else "NO")
                          for check in attacked.audit])
    return rows


if __name__ == "__main__":
    arguments.run(main)
