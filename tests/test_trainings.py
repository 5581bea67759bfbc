"""The comparison of several trainings: what it says of a method, and what it refuses."""

import itertools
import re
import runpy

import claims
import comparison
import metrics
import report
import storage
import summary
import trainings
from arguments import UsageError

import pytest
from made import CLEAN, B, C, N, append, edited, head_row, perturbed, read, run_of, text_of, write
from scipy.stats import ttest_rel


def training(parent, seed, part1, part3=None, **args):
    """A results directory of one training: parts from {(split, condition, severity): accuracy}."""
    folder = parent / f"seed{seed}"
    for name, values, letter in (("part1", part1, "1"), ("part3", part3, "3")):
        if values:
            own = {key: value for key, value in values.items() if key[1] == "clean"}
            rest = {key: value for key, value in values.items() if key[1] != "clean"}
            weights = f"{seed:011x}{letter}"
            common_to_both = (name, weights, seed, f"{seed:012x}")
            write(run_of(folder, name, *common_to_both, **args), own)
            if rest:
                write(run_of(folder, storage.robustness_name(name), *common_to_both), rest)
    return folder


def trainings_text(folders):
    trainings.compare_trainings(folders)
    return (folders[0].parent / "trainings.md").read_text(encoding="utf-8")


def method(parent, folders):
    """{(line, part): row of trainings.csv}."""
    trainings.compare_trainings(folders)
    return {(row["line"], row["part"]): row for row in read(parent / "trainings.csv")}


def test_mean_and_deviation_over_trainings_of_different_splits(tmp_path):
    folders = [training(tmp_path, seed, {CLEAN: accuracy})
               for seed, accuracy in enumerate((0.70, 0.72, 0.74))]
    write(run_of(folders[2], "part3", "part4", C, 2, f"{2:012x}"), {CLEAN: 0.99})
    row = method(tmp_path, folders)["test set", "part1"]
    assert (float(row["mean"]), float(row["sd"]), row["n"]) == pytest.approx((0.72, 0.02, "3"))
    text = (tmp_path / "trainings.md").read_text(encoding="utf-8")
    assert "| test set | 72.0 ± 2.0 |" in text
    assert "part1 (cross-entropy), n = 3" in text
    assert f"- {folders[2].as_posix()}: part3.csv: rows of part4, expected part3\n" in text
    assert (tmp_path / "trainings.html").exists()


def test_the_same_head_on_both_parts_by_a_hand_calculation(tmp_path):
    folders = []
    for seed, gain in enumerate((0.01, 0.03)):
        folder = training(tmp_path, seed, {CLEAN: 0.7}, {CLEAN: 0.8})
        for name, knn in (("part1", 0.6), ("part3", 0.6 + gain)):
            run = run_of(folder, name, name, f"{seed:011x}{name[-1]}", seed, f"{seed:012x}")
            append(run, head_row(run, "test", "knn", knn), head_row(run, "evaluation", "knn", 0.5))
            again = run_of(folder, storage.robustness_name(name), name, run.weights, seed,
                           run.split_hash)
            write(again, {CLEAN: 0.5})  # part 2's figure, after the part's own
        folders.append(folder)
    append(run, head_row(run, "test", "probe", 0.9))  # of one training alone
    text = trainings_text(folders)
    table = text[text.index("## Loss or head?") : text.index("## What ran")]
    assert "| accuracy on the test set, % | own | knn | probe |" in table
    assert "| part1 (cross-entropy) | 70.0 ± 0.0 | 60.0 ± 0.0 | - |" in table
    assert "| part3 (augmented) | 80.0 ± 0.0 | 62.0 ± 1.4 | 90.0 (n = 1) |" in table
    # 2 ± 12.706 (t of one degree of freedom) × 1.414 / √2 points
    assert ("| part3 (augmented) against part1 | +10.0 points (no interval) | "
            "+2.0 points (-10.7 to +14.7) | - |") in table


def test_without_a_spread_no_test_and_no_p_are_claimed(tmp_path):
    both = training(tmp_path, 1, {CLEAN: 0.7}, {CLEAN: 0.8})
    text = trainings_text([both, training(tmp_path, 2, {CLEAN: 0.7})])
    assert "| +10.0 points (no interval), n = 1 training, no test |" in text
    assert "| test set | +10.0 | - | 1 | - | not resolved with 1 training |" in text
    assert "p = 1" not in text
    row = next(row for row in read(tmp_path / "trainings.csv")
               if (row["line"], row["part"]) == ("test set", "part3"))
    assert (row["sd"], row["ci_low"], row["ci_high"], row["pairs"]) == ("", "", "", "1")


def test_the_interval_of_a_true_difference_is_that_of_a_hand_calculation(tmp_path):
    folders = []
    for seed, gain in enumerate((0.016, 0.020, 0.024)):  # mean 2 points, standard deviation 0.4
        folders.append(training(tmp_path, seed, {CLEAN: 0.7}, {CLEAN: 0.7 + gain}))
    row = method(tmp_path, folders)["test set", "part3"]
    half = 4.302653 * 0.004 / 3**0.5  # t of 0.975 with 2 degrees of freedom: 4.302653
    assert float(row["difference"]) == pytest.approx(0.02, abs=1e-6)
    assert float(row["ci_low"]) == pytest.approx(0.02 - half, abs=1e-6)
    assert float(row["ci_high"]) == pytest.approx(0.02 + half, abs=1e-6)
    t = 0.02 / (0.004 / 3**0.5)
    assert float(row["p_holm"]) == pytest.approx(1 - t / (2 + t * t) ** 0.5, rel=1e-4)  # 2 d.f.
    assert row["verdict"] == "better"
    text = (tmp_path / "trainings.md").read_text(encoding="utf-8")
    assert "| test set | +2.0 | +1.0 to +3.0 | 3 | 0.013 | better |" in text
    assert ("| part3 (augmented) is more accurate than part1 (cross-entropy) on clean test images "
            "| +2.0 points (+1.0 to +3.0), n = 3 trainings, p = 0.013 | **supported** |") in text


def test_holm_takes_the_verdict_that_one_interval_alone_would_give(tmp_path):
    folders = []
    for seed, gain in enumerate((0.016, 0.020, 0.024)):
        noise = 0.01 * (-1) ** seed
        rest = perturbed(rotation=0.5, jpeg=0.5, scale=0.5, contrast=0.5)
        more = {key: value + noise for key, value in rest.items()}
        more |= perturbed(rotation=0.5 + gain)
        folders.append(training(tmp_path, seed, {CLEAN: 0.7} | rest, {CLEAN: 0.7 + gain} | more))
    rows = method(tmp_path, folders)
    row = rows["rotation (geometry)", "part3"]
    assert float(row["ci_low"]) > 0
    assert float(row["p_holm"]) > 0.05
    assert row["verdict"] == "not resolved with 3 trainings"
    text = (tmp_path / "trainings.md").read_text(encoding="utf-8")
    said = claims.probability(float(row["p_holm"])).removeprefix("= ")
    assert f"| +2.0 | +1.0 to +3.0 | 3 | {said} | not resolved with 3 trainings |" in text
    seen = rows[comparison.SEEN, "part3"]
    [line] = [line for line in text.splitlines() if claims.CLAIMED[comparison.SEEN] in line]
    assert f", p {claims.probability(float(seen['p_holm']))} | **not resolved with" in line
    clean = rows["test set", "part3"]  # the same gain, not among the perturbations
    alone = metrics.paired_difference([0.716, 0.720, 0.724], [0.7, 0.7, 0.7])
    assert float(clean["p_holm"]) == pytest.approx(alone.p_value, rel=1e-4)
    assert clean["verdict"] == "better"


def test_what_perturbations_cost_is_one_quantity_for_one_and_for_several_trainings(tmp_path):
    """The accuracy on clean images without mPC, which has JPEG in it on the JPEG copy, too."""
    folders = []
    for seed in (0, 1):
        folder = tmp_path / f"seed{seed}"
        names = (f"{seed:011x}1", seed, f"{seed:012x}")
        write(run_of(folder, "part1", "part1", *names, dataset=comparison.JPEG_COPY), {CLEAN: 0.9})
        write(run_of(folder, "part2", "part1", *names, dataset=comparison.JPEG_COPY),
              perturbed(jpeg=0.8, rotation=0.6, pixelate=0.4))
        folders.append(folder)
        assert "accuracy | +30.0 points" in text_of(folder)  # 0.9 - (0.8 + 0.6 + 0.4) / 3
    text = trainings_text(folders)
    assert re.search(r"Perturbations cost part1 \(cross-entropy\) accuracy \| \+30\.0 points", text)


def test_what_perturbations_cost_counts_every_perturbation_once(tmp_path):
    """Rotation has three severities, grayscale none: 0.9 - ((0.8 + 0.7 + 0.6) / 3 + 0.3) / 2."""
    write(run_of(tmp_path, "part1", "part1"), {CLEAN: 0.9})
    rotations = {("test", "rotation", s): 0.9 - int(s) / 10 for s in "123"}
    run = run_of(tmp_path, "part2", "part1")
    write(run, rotations | {("test", "grayscale", ""): 0.3})
    assert "accuracy | +40.0 points" in text_of(tmp_path)
    images = storage.read_correct(tmp_path, "part2").images
    del images["test/rotation/2"]
    storage.write_correct(run.path("_correct.npz"), run, images)
    assert "Perturbations cost" not in text_of(tmp_path)  # of which images is not known for all


@pytest.mark.parametrize(("rotation", "verdict"), [
    (0.6, "supported"), (0.699, "not resolved"), (0.8, "contradicted")])
def test_a_cost_of_perturbations_is_claimed_where_it_is_shown(tmp_path, rotation, verdict):
    write(run_of(tmp_path, "part1", "part1"), {CLEAN: 0.7})
    write(run_of(tmp_path, "part2", "part1"), perturbed(rotation=rotation))
    [line] = [line for line in text_of(tmp_path).splitlines() if "Perturbations cost" in line]
    assert f"| **this network: {verdict}** |" in line


@pytest.mark.parametrize(("gaps", "losses", "verdict"), [
    ((0.04, 0.05, 0.06), (0.1, 0.11, 0.12), "supported"),  # the next: uncorrected p 0.049, 0.037
    ((0.03, 0.05, 0.07), (0.076, 0.11, 0.144), "not resolved with 3 trainings")])
def test_what_several_trainings_say_of_part_1_alone(tmp_path, gaps, losses, verdict):
    costs = {"training images": gaps, "Perturbations": losses}
    folders = [training(tmp_path, seed, {("train", "clean", ""): 0.7 + gap, CLEAN: 0.7}
                        | perturbed(rotation=0.7 - loss))
               for seed, (gap, loss) in enumerate(zip(*costs.values(), strict=True))]
    text = trainings_text(folders)
    gap, loss = (ttest_rel(values, (0, 0, 0)).pvalue for values in costs.values())
    assert loss < gap  # so that Holm doubles it
    for what, mean, p_value in (("training images", "+5.0", max(gap, 2 * loss)),
                                ("Perturbations", "+11.0", 2 * loss)):
        [line] = [line for line in text.splitlines() if what in line and "n = 3 trainings" in line]
        assert f"| {mean} points" in line and f"p {claims.probability(p_value)} " in line
        assert f"| **{verdict}** |" in line


def test_only_what_compares_is_tested_and_corrected_for(tmp_path):
    folders = []
    for seed, gain in enumerate((0.016, 0.020, 0.024)):
        one = {("train", "clean", ""): 0.9, CLEAN: 0.7, ("test", "fgsm", "0"): 0.7}
        one |= perturbed(rotation=0.5)
        folders.append(training(tmp_path, seed, one, {key: v + gain for key, v in one.items()}))
    rows = method(tmp_path, folders)
    tested = {key for key, row in rows.items() if row["reference"]}
    assert tested == {(line, "part3") for line in (
        "test set", "rotation (geometry)", comparison.SEEN, comparison.ALL_PERTURBED)}
    alone = metrics.paired_difference([0.716, 0.720, 0.724], [0.7, 0.7, 0.7])
    assert float(rows["test set", "part3"]["p_holm"]) == pytest.approx(alone.p_value, rel=1e-4)


def test_attacks_are_corrected_apart_from_perturbations(tmp_path):
    folders = []
    for seed, gain in enumerate((0.196, 0.200, 0.204)):
        one = perturbed(rotation=0.5, jpeg=0.5, scale=0.5, fgsm=0.1)
        other = perturbed(rotation=0.5, jpeg=0.5, scale=0.5, fgsm=0.1 + gain)
        folders.append(training(tmp_path, seed, {CLEAN: 0.7} | one, {CLEAN: 0.7} | other))
    row = method(tmp_path, folders)["FGSM 8/255, n = 1,000", "part3"]
    alone = metrics.paired_difference([0.296, 0.3, 0.304], [0.1, 0.1, 0.1])
    assert float(row["p_holm"]) == pytest.approx(alone.p_value, rel=1e-4)
    assert row["verdict"] == "better"
    text = (tmp_path / "trainings.md").read_text(encoding="utf-8")
    assert "than part1 (cross-entropy) under FGSM 8/255, n = 1,000 | +20.0 points" in text


@pytest.mark.parametrize(("again", "verdict"), [
    (0.3, "supported"), (0.6, "not resolved"), (None, "this network: supported")])
def test_a_verdict_on_attacks_stands_if_every_training_gives_it(tmp_path, again, verdict):
    folders = []
    for seed, accuracy in enumerate((0.4, again)):
        attacked = {} if accuracy is None else perturbed(worst_case=accuracy)
        folders.append(training(tmp_path, seed, {CLEAN: 0.7} | attacked))
        if attacked:
            run = run_of(folders[-1], "part2", "part1", f"{seed:011x}1", seed, f"{seed:012x}")
            append(run, report.row(run, "test", "fgsm", "", "own", "audit: a", 1.0 - seed, N))
    text = trainings_text(folders)
    [line] = [line for line in text.splitlines() if "is not robust to" in line]
    assert f"| **{verdict}** |" in line
    assert line.count(" % (") == (1 if again is None else 2)  # of each training
    audited = "1 of 1 pass | **supported**" if again is None else "1 of 2 pass | **contradicted**"
    assert audited in text


def test_parts_that_not_all_folders_have_stand_with_their_n(tmp_path):
    folders = [training(tmp_path, 1, {CLEAN: 0.7}, {CLEAN: 0.8}),
               training(tmp_path, 2, {CLEAN: 0.71}, {CLEAN: 0.83}),
               training(tmp_path, 3, {CLEAN: 0.72}), training(tmp_path, 4, {}, {CLEAN: 0.9}),
               training(tmp_path, 5, {}, {CLEAN: 0.9})]
    row = method(tmp_path, folders)["test set", "part3"]
    assert (row["n"], row["pairs"]) == ("4", "2")
    assert float(row["difference"]) == pytest.approx(0.11)
    text = (tmp_path / "trainings.md").read_text(encoding="utf-8")
    assert "part1 (cross-entropy), n = 3 | part3 (augmented), n = 4 |" in text
    assert ", n = 2 trainings, p = 0.058 | **not resolved with 2 trainings** |" in text


def test_every_pair_of_several_trainings_has_its_own_table(tmp_path):
    folders = [training(tmp_path, seed, {CLEAN: 0.5}, {CLEAN: 0.8}) for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        write(run_of(folder, "part3_crop_flip", "part3_crop_flip", f"{seed:011x}c", seed,
                     f"{seed:012x}"), {CLEAN: 0.7})
    table = r"^## (\w+) .* against (\w+) .*\n\n.*\n.*\n\| test set \| (\S+) .*\n\n"
    assert re.findall(table, trainings_text(folders), re.M) == [
        ("part3", "part1", "+30.0"), ("part3", "part3_crop_flip", "+10.0"),
        ("part3_crop_flip", "part1", "+20.0")]


def test_means_over_trainings_are_over_conditions_that_all_have(tmp_path):
    folders = [training(tmp_path, 1, {CLEAN: 0.7} | perturbed(rotation=0.6)),
               training(tmp_path, 2, {CLEAN: 0.7} | perturbed(rotation=0.5, jpeg=0.9))]
    row = method(tmp_path, folders)[comparison.ALL_PERTURBED, "part1"]
    assert float(row["mean"]) == pytest.approx(0.55)
    text = (tmp_path / "trainings.md").read_text(encoding="utf-8")
    assert "Left out, as not every model was tested on them: 1 pairs" in text


@pytest.mark.parametrize(("name", "flag"), [("epochs", "--epochs"), ("batch_size", "--batch-size"),
                                            ("lr", "--lr"), ("train_fraction", "--train-fraction")])
def test_trainings_that_differ_in_an_argument_are_refused(tmp_path, name, flag):
    folders = [training(tmp_path, 0, {CLEAN: 1.0}, **{name: 1}),
               training(tmp_path, 1, {CLEAN: 0.5}, **{name: 6})]
    with pytest.raises(UsageError, match=f"part1 has {flag} 1 in .*seed0 and 6 in .*seed1"):
        trainings.compare_trainings(folders)


def test_other_code_precision_and_device_are_told(tmp_path):
    folders = [training(tmp_path, seed, {CLEAN: 0.5 + seed / 10} | perturbed(rotation=0.5),
                        {CLEAN: 0.6}) for seed in (0, 1, 2)]
    text = trainings_text(folders)
    assert text.count("mixed precision off; device cpu; torch 2") == 3
    assert "Not all of these" not in text
    usual = {"amp": "off", "device": "cpu", "versions": {"torch": "2"}}
    for file, change, said in (("part1", {"amp": "bf16"}, "mixed precision"),
                               ("part1", {"amp": ["?"]}, "mixed precision"),
                               ("part1", {"device": "NVIDIA H100"}, "device"),
                               ("part2", {"device": "NVIDIA H100"}, "device"),
                               ("part1", usual | {"versions": {"commit": "a", "torch": "2"}},
                                "commit")):
        for name, folder in itertools.product(("part1", "part2"), folders):  # all are alike
            with edited(folder / f"{name}.json") as record:
                record |= usual | (change if name == file else {})
        text = trainings_text(folders)
        assert f"- **Not all of these have the same {said}.**" in text


def test_families_are_those_of_the_part_3_that_some_folder_has(tmp_path):
    tested = {CLEAN: 0.7} | perturbed(rotation=0.8, gaussian_noise=0.2)
    folders = [training(tmp_path, seed, tested) for seed in (0, 1, 2)]
    write(run_of(folders[2], "part3", "part3", B, 2, f"{2:012x}", families=["noise"]), {CLEAN: 0.7})
    rows = method(tmp_path, folders)
    assert float(rows[comparison.SEEN, "part1"]["mean"]) == pytest.approx(0.2)
    assert float(rows[comparison.HELD_OUT, "part1"]["mean"]) == pytest.approx(0.8)
    text = (tmp_path / "trainings.md").read_text(encoding="utf-8")
    assert "Families that part 3 trains on: noise; held out: blur, color, geometry." in text


def test_other_data_of_the_same_name_are_refused(tmp_path):
    for key, other, match in (("classes", ["cow", "dog"], r"seed0 has the classes \['cat'"),
                              ("sizes", {"test": 60}, "seed0 has the numbers of images .* 60")):
        folders = [training(tmp_path, seed, {CLEAN: 0.5}) for seed in (0, 1)]
        with edited(folders[1] / "part1.json") as record:
            record[key] = other
        with pytest.raises(UsageError, match=match):
            trainings.compare_trainings(folders)


def test_part_2_is_compared_where_the_first_folder_has_none(tmp_path):
    folders = [training(tmp_path, 0, {CLEAN: 0.5})]
    folders += [training(tmp_path, seed, {CLEAN: 0.5} | perturbed(rotation=0.5)) for seed in (1, 2)]
    write(run_of(folders[2], "part2", "part1", f"{2:011x}1", 2, f"{2:012x}", targeted=True),
          perturbed(rotation=0.5))
    with pytest.raises(UsageError, match="part2 has --targeted absent in .*seed1 and True in"):
        trainings.compare_trainings(folders)
    (folders[2] / "part2.json").unlink()
    with pytest.raises(UsageError, match="seed2/part2.json is missing"):
        trainings.compare_trainings(folders)


@pytest.mark.parametrize("condition", ["cifar10c fog", "rotation"])
@pytest.mark.parametrize("differing", ["part1", "part3", None])  # of one part, or of another one
def test_trainings_tested_on_other_pixels_are_refused(tmp_path, condition, differing):
    folders = []
    for seed in (0, 1):
        folders.append(training(tmp_path, seed, {CLEAN: 0.5}, {CLEAN: 0.6}))
        for name, part in (("part2", "part1"), ("part3_robustness", "part3")):
            run = run_of(folders[-1], name, part, f"{seed:011x}{part[-1]}", seed, f"{seed:012x}",
                         cifar10c=f"folder{seed}")
            pixels = "b" if (part, seed) == (differing, 1) else "a"
            write(run, {("test", condition, "3"): 0.3 + seed / 10},
                  pixels={f"test/{condition}/3": pixels})
    if differing is None:
        assert trainings.compare_trainings(folders)
        return
    with pytest.raises(UsageError, match=f"part1 in .*0 and .* images under {condition} 3,"):
        trainings.compare_trainings(folders)


def test_perturbations_that_not_all_have_are_told_with_no_mean_left(tmp_path):
    ours, theirs = {CLEAN: 0.7} | perturbed(rotation=0.5), {CLEAN: 0.7} | perturbed(cutout=0.5)
    folders = [training(tmp_path, 0, ours, theirs), training(tmp_path, 1, ours, theirs)]
    trainings.compare_trainings(folders)
    told = "Left out, as not every model was tested on them: 2 pairs of condition and severity."
    assert told in (tmp_path / "trainings.md").read_text(encoding="utf-8")
    assert told in text_of(folders[0])


def test_arguments_in_which_part_and_reference_differ_stand_with_their_table(tmp_path):
    folders = [training(tmp_path, seed, {CLEAN: 0.7} | perturbed(rotation=0.5),
                        {CLEAN: 0.8} | perturbed(rotation=0.6)) for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        about = (f"{seed:011x}3", seed, f"{seed:012x}")
        write(run_of(folder, "part3", "part3", *about, epochs=200), {CLEAN: 0.8})
        write(run_of(folder, "part3_robustness", "part3", *about, attack_images=9),
              perturbed(rotation=0.6))
    text = trainings_text(folders)
    assert "Their trainings differ in `--epochs` (200; part1 6)." in text
    assert ("Their tests by part 2 differ in no argument that both have; arguments that only one "
            "has: `--attack-images` 9. (By the records in `") in text
    assert text.count(f"(By the records in `{folders[0].as_posix()}`.)") == 1  # not in all alike


def test_differing_arguments_are_of_a_training_that_has_both_parts(tmp_path):
    folders = [training(tmp_path, 0, None, {CLEAN: 0.8})]
    folders += [training(tmp_path, seed, {CLEAN: 0.7}, {CLEAN: 0.8}) for seed in (1, 2)]
    assert f"(By the records in `{folders[1].as_posix()}`.)" in trainings_text(folders)


def test_families_of_a_part_3_without_a_record_are_said_to_be_assumed(tmp_path):
    folder = training(tmp_path, 0, {CLEAN: 0.7}, {CLEAN: 0.7}, families=["noise"])
    (folder / "part3.json").unlink()
    assumed = "part 3 is assumed to have trained on noise, color, geometry"
    assert assumed in text_of(folder)


def test_held_out_is_said_of_part_3_alone_where_part_4_trains_on_more(tmp_path):
    folder = training(tmp_path, 0, {CLEAN: 0.7} | perturbed(rotation=0.5),
                      {CLEAN: 0.7} | perturbed(rotation=0.5), families=["noise"])
    write(run_of(folder, "part4_augmented", "part4_augmented", C, 0, f"{0:012x}"), {CLEAN: 0.7})
    write(run_of(folder, "part4_augmented_robustness", "part4_augmented", C, 0, f"{0:012x}"),
          perturbed(rotation=0.9))
    text = text_of(folder)
    assert "under perturbations that part 3 does not train on |" in text
    assert "Trained on noise, color, geometry: part4_augmented." in text


def test_shares_are_compared_where_both_records_have_them(tmp_path):
    folders = [training(tmp_path, seed, {CLEAN: 0.5}) for seed in (0, 1, 2)]
    for folder, shares in zip(folders[1:], ({"rotation": 4}, {"rotation": 2}), strict=True):
        with edited(folder / "part1.json") as record:
            record["args"]["shares"] = shares
    trainings.compare_trainings(folders[:2])  # an older record has none
    with pytest.raises(UsageError, match=r"part1 has SHARES \(part3_augmented.py\) .*4.* and .*2"):
        trainings.compare_trainings(folders[1:])


def test_compiled_trainings_are_compared_with_others_and_told(tmp_path):
    folders = [training(tmp_path, seed, {CLEAN: 0.5 + seed / 10}, {CLEAN: 0.6}, compile=seed > 1)
               for seed in (0, 1, 2)]
    text = trainings_text(folders)
    assert text.count("--compile False") == 2
    assert text.count("--compile True") == 1
    assert "- **Not all of these have the same --compile.**" in text


def test_seeds_directories_devices_and_pictures_may_differ(tmp_path):
    folders = [training(tmp_path, seed, {CLEAN: 0.5}, device=f"cuda:{seed}", no_umap=seed > 0,
                        umap_points=50 + seed, results_dir=str(seed), data_dir=str(seed),
                        resume=seed > 0, no_part2=seed > 0) for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        write(run_of(folder, "part2", "part1", f"{seed:011x}1", seed, f"{seed:012x}",
                     checkpoint=str(folder), batch_size=seed, cifar10c=str(folder)),
              perturbed(rotation=0.5))
    assert trainings.compare_trainings(folders)


def test_trainings_are_written_beside_links_to_them(tmp_path):
    study = tmp_path / "study"
    study.mkdir()
    links = []
    for seed in (0, 1):
        folder = training(study, seed, {CLEAN: 0.5})
        links.append(tmp_path / f"link{seed}")
        links[-1].symlink_to(folder, target_is_directory=True)
    trainings.compare_trainings(iter(links))  # as Path.glob gives them
    assert (tmp_path / "trainings.md").exists()
    assert not (study / "trainings.md").exists()


def test_what_is_no_several_trainings_is_refused(tmp_path):
    first = training(tmp_path, 0, {CLEAN: 0.5}, {CLEAN: 0.6})
    second = training(tmp_path, 1, {CLEAN: 0.5}, {CLEAN: 0.6})
    for folders, match in (([first], "at least two"), ([first, tmp_path / "none"], "no results"),
                           ([first, second, first], "seed0 and .*seed0 are both of seed 0, spl")):
        with pytest.raises(UsageError, match=match):
            trainings.compare_trainings(folders)
    copy = tmp_path / "copy"
    write(run_of(copy, "part1", "part1", f"{0:011x}1", 7, "7" * 12), {CLEAN: 0.5})
    with pytest.raises(UsageError, match="part1 has the same weights in"):
        trainings.compare_trainings([first, copy])
    write(run_of(copy, "part1", "part1", C, 7, f"{0:012x}"), {CLEAN: 0.5})
    assert trainings.compare_trainings([first, copy])  # another seed on the same split
    write(run_of(copy, "part1", "part1", C, 0, "7" * 12), {CLEAN: 0.5})
    assert trainings.compare_trainings([first, copy])  # the same seed on another split
    write(run_of(copy, "part1", "part1", C, 0, f"{0:012x}"), {CLEAN: 0.5})
    with pytest.raises(UsageError, match="are both of seed 0, split 000000000000"):
        trainings.compare_trainings([first, copy])
    write(run_of(copy, "part1", "part1", C, 7, "7" * 12, dataset="other"), {CLEAN: 0.5})
    with pytest.raises(UsageError, match="holds results on toy, .* on other"):
        trainings.compare_trainings([first, copy])
    write(run_of(second, "part3", "part3", B, 2, f"{1:012x}"), {CLEAN: 0.5})
    with pytest.raises(UsageError, match=r"holds parts of the seeds \[1, 2\]"):
        trainings.compare_trainings([first, second])
    (second / "part3.csv").unlink()
    (second / "part1.json").unlink()
    with pytest.raises(UsageError, match="part1.json is missing"):
        trainings.compare_trainings([first, second])


def test_the_command_line_takes_folders(tmp_path, monkeypatch):
    folders = [training(tmp_path, seed, {CLEAN: 0.5}) for seed in (0, 1)]
    monkeypatch.setattr("sys.argv", ["summary.py", *map(str, folders)])
    runpy.run_path(summary.__file__, run_name="__main__")
    assert (tmp_path / "trainings.csv").exists()


@pytest.mark.parametrize(("name", "first", "second"), [
    ("optimizer", "Muon (lr 0.02)", "AdamW (lr 0.001)"),
    ("script", "part1_baseline.py", "part1_mine.py"),
    ("stopped", "after epoch 1 of 6", "absent")])
def test_trainings_of_other_code_are_not_averaged(tmp_path, name, first, second):
    """An optimizer, script or end that no argument names."""
    folders = [training(tmp_path, seed, {CLEAN: 0.7}) for seed in (1, 2)]
    for folder, value in zip(folders, (first, second), strict=True):
        with edited(folder / "part1.json") as record:
            record["versions"][name] = value
    with pytest.raises(UsageError, match=f"{name} {re.escape(first)} in .* and {second[:5]}"):
        trainings.compare_trainings(folders)
    with edited(folders[0] / "part1.json") as record:
        del record["versions"][name]
    assert trainings.compare_trainings(folders)  # an older record does not name it
