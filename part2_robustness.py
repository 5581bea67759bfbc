"""Part 2: how robust is a trained model to perturbed and to attacked test images?

Measures accuracy on the whole test set under each perturbation and severity; attacks test images with the fast
gradient sign method (cleverhans) and audits the attack; draws the UMAP of clean, perturbed and attacked images in one
frame; compares with the clean accuracy. Works on the checkpoint of any part.

    python part2_robustness.py --checkpoint results/part1.pt

Writes results/part2.csv, _severities.png, _examples.png, _fgsm.png, _adversarial.png, _umap.png, .npz
(for part 3's checkpoint results/part3_robustness.csv, and so on).
"""

import arguments

UMAP_PERTURBATIONS = ("gaussian_noise", "gaussian_blur", "color_jitter", "vertical_flip", "rotation", "cutout")
AUDIT_ZERO_GRADIENTS = 0.01  # share of images with no gradient at all from which robustness is an illusion
AUDIT_PGD_LEAVES = 0.1  # accuracy under PGD at 16/255, above which a model without adversarial training hides gradients


def parse_args(argv=None):
    parser = arguments.new_parser(__doc__)
    arguments.add_shared(parser)
    add = parser.add_argument_group("part 2").add_argument
    add("--checkpoint", default="results/part1.pt", help="a checkpoint that a training part wrote")
    add("--perturbations", nargs="+", default=["all"], metavar="NAME",
        help="names from perturbations.py, or all")
    add("--severities", nargs="+", type=int, choices=range(1, 6), default=[3], metavar="1-5",
        help="severities to test, for perturbations that have one")
    add("--cifar10c", metavar="DIR", help="also test on CIFAR-10-C: the published <corruption>.npy and labels.npy")
    add("--eps-255", nargs="+", type=arguments.number(float, 0, 15_000), default=[0, 1, 2, 4, 8, 16], metavar="EPS",
        help="attack strengths in 1/255 of the pixel range")
    add("--norm", choices=("inf", "2"), default="inf", help="norm that bounds the attack")
    add("--targeted", action="store_true", help="also attack towards the least likely class")
    add("--attack-images", type=arguments.number(int, 10, 1_000_000), default=2000,
        help="test images to attack, evenly spread")
    add("--audit-images", type=arguments.number(int, 10, 1_000_000), default=100,
        help="of these, images for the audit with PGD")
    arguments.from_checkpoint(parser)
    return arguments.parse(parser, argv)


if __name__ == "__main__":
    parse_args()  # before torch is imported: --help and wrong arguments answer at once

import numpy as np  # noqa: E402
import torch  # noqa: E402

import common  # noqa: E402
import report  # noqa: E402
import summary  # noqa: E402


def main(argv=None):
    args = parse_args(argv)
    device, names = common.pick_device(args.device), common.perturbation_names(args.perturbations)
    model, meta = common.load_checkpoint(args.checkpoint, device)
    part1 = common.part1_beside(args.results_dir, meta, device)
    published = common.cifar10c(args.cifar10c, meta["classes"], device) if args.cifar10c else ()
    for name in arguments.FROM_CHECKPOINT:
        setattr(args, name, getattr(args, name, meta["args"][name]))
    if args.quick:
        args.attack_images, args.audit_images = min(50, args.attack_images), min(10, args.audit_images)
    amp = common.Amp(args.amp, device)
    data = common.load_data(args.dataset, args.data_dir, device, args.quick)
    split = common.split_data(data, args.train_fraction, args.split_seed)
    run = common.describe(args, "part2" if meta["part"] == "part1" else meta["part"], data, split, device, amp)
    common.check_same_data(args.checkpoint, meta, run)
    paths = report.start(run, name=report.robustness_name(meta["part"]))
    images, labels = data.test_images, data.test_labels  # uint8 (N,3,32,32), int64 (N,)
    attacked = common.spread(len(labels), args.attack_images)  # positions of the images to attack,
    drawn = common.spread(len(attacked), args.umap_points)  # and, of these, of the images in the UMAP
    shown = attacked[common.spread(len(attacked), 10)]  # and in the pictures
    clock = report.Clock()

    clean = common.predict(model, images, amp)
    clean_panel = clean.features[attacked[drawn]], labels[attacked[drawn]]
    panels = [("clean", "test", "clean", "", *clean_panel, clean_panel)]
    rows, correct, examples = [], {}, [("clean", images[shown])]

    def record(condition, severity, predicted, truth=labels):
        rows.append(report.accuracy_row(run, args.checkpoint, "test", condition, severity, "own", predicted, truth))
        correct[f"{condition}/{severity}"] = report.correct(predicted, truth)

    record("clean", "", clean.logits.argmax(1))
    conditions = [(n, s) for n in names for s in (args.severities if n not in common.NO_SEVERITY else [""])]
    identity = common.identity(run, device) | {"--checkpoint with the weights": common.digest(model),
                                               "--umap-points": args.umap_points}
    done = common.finished(paths("_state.pt"), run, identity, device)  # {} without --resume
    for name, severity in report.progress(conditions, "perturbations"):
        perturbed = common.perturb(images, name, severity or 1)  # the same pixels for every model
        strongest = severity in ("", max(args.severities))
        if (name, severity) not in done:
            logits, features = common.predict(model, perturbed, amp)
            in_umap = strongest and name in UMAP_PERTURBATIONS
            done[name, severity] = logits.argmax(1), features[attacked[drawn]] if in_umap else None
            common.save_finished(paths("_state.pt"), identity, done)
        predicted, features = done[name, severity]
        record(name, severity, predicted)
        title = f"{name} {severity}".replace("_", " ").strip()
        if strongest:
            examples.append((title, perturbed[shown]))
        if features is not None:
            panels.append((title, "test", name, severity, features, clean_panel[1], clean_panel))
    for name, severity, corrupted, truth in published:
        record(name, severity, common.predict(model, corrupted, amp).logits.argmax(1), truth)
    clock.stop("perturbations")

    audit, attack_rows, right, eps_255, features, adversarial = attack(
        args, run, model, common.to_float(images[attacked]), labels[attacked], part1)
    rows, correct = rows + attack_rows, correct | right
    panels.append((f"FGSM {eps_255}/255", "test", report.ATTACKS[args.norm][0], eps_255, features[drawn],
                   clean_panel[1], clean_panel))
    clock.stop("attacks")

    rows += report.umap_panels(paths, run, args.checkpoint, panels)
    clock.stop("UMAP")
    report.write_rows(paths(".csv"), rows)
    report.write_arrays(paths("_correct.npz"), command=run["command"], part1=common.digest(part1), **correct)
    paths("_state.pt").unlink(missing_ok=True)
    report.plot_severities(paths("_severities.png"), rows, run)
    report.plot_examples(paths("_examples.png"), examples, run, f"Perturbations at severity {max(args.severities)}")
    report.plot_examples(paths("_adversarial.png"), adversarial, run, "FGSM: attacked images")
    report.plot_attack(paths("_fgsm.png"), rows, run, args.norm, audit)
    clock.stop("tables and plots")
    report.print_accuracies(f"{args.checkpoint} on the test set", rows)
    report.print_table("Audit of the attack", ("check", "found", "passed"),
                       [(name, found, "yes" if passed else "NO") for name, found, passed, _ in audit])
    clock.print()
    summary.compare(paths.folder)
    return rows


def attack(args, run, model, images, labels, part1=None):
    """The FGSM sweep and its audit, in float32, on images (n,3,32,32) in [0,1] with their true labels.

    part1: the model whose adversarial images are tried as well.  Returns the audit [(check, found, passed, n)], rows,
    which images are right at each eps, the eps_255 nearest above 8 with its features (n,512), and examples to show.
    """
    norm = np.inf if args.norm == "inf" else 2
    float32 = common.Amp("off", images.device)
    sweep = sorted({int(e) if e == int(e) else e for e in [0, *args.eps_255]})
    fgsm, pgd, random_noise = report.ATTACKS[args.norm]
    few, clean = common.spread(len(labels), args.audit_images), common.predict(model, images, float32).logits

    def row(condition, eps_255, prediction, truth):
        return report.accuracy_row(run, args.checkpoint, "test", condition, eps_255, "own", prediction, truth)

    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images.device)
    directions = {  # of eps 1: none depends on eps, so each serves the whole sweep
        fgsm: common.fgsm_direction(model, images, labels, norm),  # true labels: the attack that counts
        f"{fgsm}_predicted": common.fgsm_direction(model, images, clean.argmax(1), norm),
        random_noise: noise.sign() if norm == np.inf else noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)}
    target = clean.argmin(1)  # the least likely class
    if args.targeted:
        directions[f"{fgsm}_targeted"] = common.fgsm_direction(model, images, target, norm, targeted=True)
    if part1 is not None:
        directions[f"{fgsm}_from_part1"] = common.fgsm_direction(part1, images, labels, norm)
    rows, examples, largest, predicted, features = [], [], 0.0, {}, None
    at = next((e for e in sweep if e >= 8), sweep[-1])
    for eps_255, name in report.progress([(e, n) for e in sweep for n in directions if e or n == fgsm], "FGSM"):
        eps = eps_255 / 255
        adversarial = (images + eps * directions[name]).clamp(0, 1)
        logits, found = common.predict(model, adversarial, float32)
        predicted[name, eps_255] = logits.argmax(1)
        rows.append(row(name, eps_255, predicted[name, eps_255], labels))
        largest = max(largest, (adversarial - images).flatten(1).norm(norm, dim=1).max().item() - eps)
        if name == fgsm:
            features = found if eps_255 == at else features
            examples.append((f"FGSM {eps_255:g}/255", adversarial[common.spread(len(labels), 10)]))
        if name == f"{fgsm}_targeted":
            rows.append(row(name, eps_255, logits.argmax(1), target) | {"metric": "target class reached"})
    for eps_255 in report.progress(sorted({2, 8, 16}.intersection(sweep) or sweep[-1:]), "PGD"):
        adversarial = common.pgd(model, images[few], labels[few], eps_255 / 255, norm)
        predicted[pgd, eps_255] = common.predict(model, adversarial, float32).logits.argmax(1)
        rows.append(row(pgd, eps_255, predicted[pgd, eps_255], labels[few]))

    zero = (directions[fgsm].flatten(1).abs().amax(1) == 0).float().mean().item()
    changed = int((predicted[fgsm, 0] != clean.argmax(1)).sum())
    audit = [("|delta| is at most eps", f"{largest * 255:+.1e}/255", largest < 1e-6, len(labels)),
             ("few images without a gradient", f"{zero:.2%}", zero < AUDIT_ZERO_GRADIENTS, len(labels)),
             ("eps 0 equals clean", f"{changed} differ", changed == 0, len(labels))]
    for name, eps_255 in (key for key in predicted if key[0] in (pgd, random_noise) and key[1] > 0):
        some = few if name == pgd else slice(None)
        mine, other = ((p == labels[some]).float().mean().item()
                       for p in (predicted[fgsm, eps_255][some], predicted[name, eps_255]))
        audit.append((f"{name} {eps_255:g}/255 is {'stronger' if name == pgd else 'weaker'} than FGSM",
                      f"{report.percent(other)} against {report.percent(mine)} %",
                      other <= mine if name == pgd else other >= mine, len(labels[some])))
        if (name, eps_255) == ("pgd", 16):
            audit.append(("pgd 16/255 leaves next to nothing", f"{other:.1%}", other <= AUDIT_PGD_LEAVES, len(few)))
    facts = [("share of images without a gradient", zero, len(labels)),
             ("largest |delta| beyond eps, 1/255", largest * 255, len(labels)),
             *((f"audit: {name}", float(passed), n) for name, _, passed, n in audit)]
    rows += [report.row(run, args.checkpoint, "test", fgsm, "", "own", *fact) for fact in facts]
    right = {f"{name}/{eps}": report.correct(p, labels) for (name, eps), p in predicted.items() if name == fgsm}
    return audit, rows, right, at, features, examples


if __name__ == "__main__":
    arguments.run(main)
