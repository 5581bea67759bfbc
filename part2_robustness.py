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
    add("--attack-images", type=arguments.number(int, 10, 1_000_000), default=2000,
        help="test images to attack, evenly spread")
    add("--audit-images", type=arguments.number(int, 10, 1_000_000), default=100,
        help="of these, images for the audit with PGD and random noise")
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
    device = common.pick_device(args.device)
    names = common.perturbation_names(args.perturbations)
    model, meta = common.load_checkpoint(args.checkpoint, device)
    published = common.cifar10c(args.cifar10c, meta["classes"], device) if args.cifar10c else ()
    for name in arguments.DATA_ARGUMENTS:
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
    correct = {"clean/": report.correct(clean.logits, labels)}
    rows = [report.accuracy_row(run, args.checkpoint, "test", "clean", "", "own", clean.logits.argmax(1), labels)]
    examples = [("clean", images[shown])]
    conditions = [(n, s) for n in names for s in (args.severities if n not in common.NO_SEVERITY else [""])]
    for name, severity in report.progress(conditions, "perturbations"):
        perturbed = common.perturb(images, name, severity or 1)  # the same pixels for every model
        logits, features = common.predict(model, perturbed, amp)
        correct[f"{name}/{severity}"] = report.correct(logits, labels)
        rows.append(report.accuracy_row(run, args.checkpoint, "test", name, severity, "own", logits.argmax(1), labels))
        if severity in ("", max(args.severities)):
            title = f"{name.replace('_', ' ')} {severity}".strip()
            examples.append((title, perturbed[shown]))
            if name in UMAP_PERTURBATIONS:
                panels.append((title, "test", name, severity, features[attacked[drawn]], clean_panel[1], clean_panel))
    for name, severity, corrupted, truth in published:
        logits = common.predict(model, corrupted, amp).logits
        rows.append(report.accuracy_row(run, args.checkpoint, "test", name, severity, "own", logits.argmax(1), truth))
        correct[f"{name}/{severity}"] = report.correct(logits, truth)
    clock.stop("perturbations")

    audit, attack_rows, right, eps_255, features, adversarial = attack(
        args, run, model, common.to_float(images[attacked]), labels[attacked])
    rows += attack_rows
    correct |= right
    panels.append((f"FGSM {eps_255}/255", "test", report.ATTACKS[args.norm][0], eps_255, features[drawn],
                   clean_panel[1], clean_panel))
    clock.stop("attacks")

    rows += report.umap_panels(paths, run, args.checkpoint, panels)
    clock.stop("UMAP")
    report.write_rows(paths(".csv"), rows)
    report.write_arrays(paths("_correct.npz"), **correct)
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


def attack(args, run, model, images, labels):
    """The FGSM sweep and its audit, in float32, on images (n,3,32,32) in [0,1] with their true labels.

    Returns the audit [(check, found, passed, n)], the rows, which images are right at each eps, the eps_255 nearest
    above 8 with the attacked images' features (n,512), and examples for the picture.
    """
    norm = np.inf if args.norm == "inf" else 2
    float32 = common.Amp("off", images.device)
    sweep = sorted({int(e) if e == int(e) else e for e in [0, *args.eps_255]})
    fgsm, pgd, random_noise = report.ATTACKS[args.norm]
    few = common.spread(len(labels), args.audit_images)
    clean = common.predict(model, images, float32).logits.argmax(1)

    def row(condition, eps_255, prediction, truth):
        return report.accuracy_row(run, args.checkpoint, "test", condition, eps_255, "own", prediction, truth)

    direction = common.fgsm_direction(model, images, labels, norm)  # of the loss's growth; one for all eps
    noise = torch.randn(images[few].shape, generator=torch.Generator().manual_seed(0)).to(images.device)
    noise = noise.sign() if norm == np.inf else noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    rows, examples, largest, fooled, right = [], [], 0.0, {}, {}
    features, at = None, next((e for e in sweep if e >= 8), sweep[-1])
    for eps_255 in report.progress(sweep, "FGSM"):
        eps = eps_255 / 255
        adversarial = (images + eps * direction).clamp(0, 1)
        logits, found = common.predict(model, adversarial, float32)
        features = found if eps_255 == at else features
        fooled[eps_255] = logits.argmax(1)
        rows.append(row(fgsm, eps_255, fooled[eps_255], labels))
        right[f"{fgsm}/{eps_255}"] = report.correct(logits, labels)
        size = (adversarial - images).flatten(1).norm(norm, dim=1).max().item()
        largest = max(largest, size - eps)
        examples.append((f"FGSM {eps_255:g}/255", adversarial[common.spread(len(labels), 10)]))
        random = (images[few] + eps * noise).clamp(0, 1)
        rows.append(row(random_noise, eps_255, common.predict(model, random, float32).logits.argmax(1), labels[few]))
    for eps_255 in report.progress(sorted({8, 16}.intersection(sweep) or sweep[-1:]), "PGD"):
        adversarial = common.pgd(model, images[few], labels[few], eps_255 / 255, norm)
        logits = common.predict(model, adversarial, float32).logits
        rows.append(row(pgd, eps_255, logits.argmax(1), labels[few]))

    zero = (direction.flatten(1).abs().amax(1) == 0).float().mean().item()
    changed = int((fooled[0] != clean).sum())
    audit = [("|delta| is at most eps", f"{largest * 255:+.1e}/255", largest < 1e-6, len(labels)),
             ("few images without a gradient", f"{zero:.2%}", zero < AUDIT_ZERO_GRADIENTS, len(labels)),
             ("eps 0 equals clean", f"{changed} differ", changed == 0, len(labels))]
    for r in (r for r in rows if r["condition"] != fgsm and r["severity"] > 0):
        mine = (fooled[r["severity"]][few] == labels[few]).sum().item() / len(few)
        weaker = r["condition"] == random_noise
        audit.append((f"{r['condition']} {r['severity']:g}/255 is {'weaker' if weaker else 'stronger'} than FGSM",
                      f"{report.percent(r['value'])} against {report.percent(mine)} %",
                      r["value"] >= mine if weaker else r["value"] <= mine, len(few)))
    facts = [("share of images without a gradient", zero, len(labels)),
             ("largest |delta| beyond eps, 1/255", largest * 255, len(labels)),
             *((f"audit: {name}", float(passed), n) for name, _, passed, n in audit)]
    rows += [report.row(run, args.checkpoint, "test", fgsm, "", "own", *fact) for fact in facts]
    return audit, rows, right, at, features, examples


if __name__ == "__main__":
    arguments.run(main)
