"""Part 3's training images: random crop and mirror, and who gets which perturbation."""

import collections
import re

import arguments
import common
import part3_augmented
import part4_angular

import pytest
import torch
import torch.nn.functional as F


@pytest.mark.parametrize(("size", "most"), [(32, 4), (16, 2)])  # pixels
def test_crop_and_flip_gives_one_of_the_crops_of_the_padded_image(photos, size, most):
    image = photos[:1, :, :size, :size]
    images = image.expand(400, -1, -1, -1)
    results = part3_augmented.crop_and_flip(images, torch.Generator().manual_seed(0))
    padded = F.pad(image.float(), [most] * 4, mode="reflect").to(torch.uint8)[0]
    places = range(2 * most + 1)
    crops = {}
    for top in places:
        for left in places:
            crop = padded[:, top : top + size, left : left + size]
            crops[crop.numpy().tobytes()] = (top, left, False)
            crops[crop.flip(2).contiguous().numpy().tobytes()] = (top, left, True)
    assert len(crops) == 2 * len(places) ** 2
    drawn = [crops[image.contiguous().numpy().tobytes()] for image in results]  # else a KeyError
    assert {top for top, _, _ in drawn} == {left for _, left, _ in drawn} == set(places)
    assert 150 < sum(mirrored for _, _, mirrored in drawn) < 250  # of 400; 5 standard deviations
    assert len(set(drawn)) > 0.7 * len(crops)  # each on its own, not a few for all


@pytest.fixture
def calls(monkeypatch):
    """Counts the images that each (name, severity) perturbs; the perturbations do nothing else."""
    counted = collections.Counter()

    def watch(name):
        def watched(images, severity, generator):
            counted[name, severity] += len(images)
            return images
        return watched

    watched = {name: watch(name) for name in common.PERTURBATIONS}
    monkeypatch.setattr(common, "PERTURBATIONS", watched)
    return counted


def by_family(calls):
    families = collections.Counter()
    for (name, _), images in calls.items():
        families[common.FAMILY[name]] += images
    return families


def test_every_seen_perturbation_takes_its_turn_at_every_severity(calls):
    for step in range(120):
        part3_augmented.augment(torch.zeros(64, 3, 8, 8), torch.Generator(), step)
    seen = {name for name in common.PERTURBATIONS if common.FAMILY[name] in common.SEEN_FAMILIES}
    expected = {(name, severity) for name in seen - {"horizontal_flip"} for severity in range(1, 6)}
    assert set(calls) == expected
    assert by_family(calls) == {"noise": 120 * 4, "color": 120 * 4, "geometry": 120 * 16}


def test_every_familys_share_is_right_within_one_image_and_exact_in_16_steps(calls):
    shares = {"noise": 1, "color": 1, "geometry": 4}  # of 16
    for n in (2, 7, 8, 60, 64, 100):  # part 4's batches have 60
        total = dict.fromkeys(shares, 0)
        for step in range(16):
            calls.clear()
            part3_augmented.augment(torch.zeros(n, 3, 8, 8), torch.Generator(), step)
            found = by_family(calls)
            for family, share in shares.items():
                assert abs(found.get(family, 0) - n * share / 16) < 1, (n, step, family)
                total[family] += found.get(family, 0)
        assert total == {family: n * share for family, share in shares.items()}


@pytest.mark.parametrize("families", [(), ("noise",), ("geometry",), ("color", "geometry")])
def test_only_the_wanted_families_are_trained_on(calls, families):
    part3_augmented.augment(torch.zeros(64, 3, 8, 8), torch.Generator(), 0, families)
    assert by_family(calls) == {name: 16 if name == "geometry" else 4 for name in families}
    flags = ["--families", *(families or ["none"])]
    args = part3_augmented.parse_args(flags)
    assert args.families == families
    assert part3_augmented.part_name(args) == ("part3" if families else "part3_crop_flip")


def test_perturbed_images_stay_in_range(photos):
    generator = torch.Generator().manual_seed(0)
    before = photos.clone()
    for step in range(30):
        result = part3_augmented.augment(photos / 255, generator, step)
        assert result.shape == photos.shape
        assert 0 <= result.min() <= result.max() <= 1
    assert torch.equal(photos, before)


def test_every_image_is_cropped_and_the_first_are_perturbed(photos):
    images = photos[:32] / 255
    generator, ours = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    names = "shot_noise", "contrast", "rotation"  # each the second of its family
    places = slice(0, 2), slice(2, 4), slice(4, 12)
    for step, severities in ((1, (1, 1, 1)), (61, (1, 1, 3))):  # after 15, 10 and 12 turns
        cropped = part3_augmented.crop_and_flip(images, generator)
        expected = cropped.clone()
        for name, place, severity in zip(names, places, severities, strict=True):
            perturb = common.PERTURBATIONS[name]
            expected[place] = perturb(cropped[place], severity, generator)
        result = part3_augmented.augment(images, ours, step)
        assert torch.equal(result, expected)
        changed = (result != cropped).flatten(1).any(1)
        assert changed.tolist() == [True] * (2 + 2 + 8) + [False] * 20  # noise, color, geometry


@pytest.mark.parametrize(("part", "flags"), [
    (part3_augmented, []), (part3_augmented, ["--families", "noise"]),
    (part4_angular, ["--augment"])])
def test_training_perturbs_every_step_with_the_next_turn(part, flags, monkeypatch, tmp_path,
                                                         tiny_backbone):
    steps = []
    wanted = []

    def watched(images, generator, step, families=None):
        steps.append(step)
        wanted.append(families)
        return images

    monkeypatch.setattr(part, "augment", watched)
    monkeypatch.setattr(part.report, "finish", lambda *args: [])
    monkeypatch.setattr(part.summary, "compare", lambda folder: None)
    part.main(["--dataset", "digits", "--quick", "--no-umap", "--no-part2", "--batch-size", "40",
               "--train-fraction", "0.9", "--amp", "off", "--device", "cpu",
               "--results-dir", str(tmp_path), *flags])
    assert steps == list(range(4))  # two epochs of 90 images
    assert set(wanted) == {None if part is part4_angular else part.parse_args(flags).families}


@pytest.mark.parametrize("shares", [
    {"noise": 1, "color": 1}, {"noise": 8, "color": 4, "geometry": 5},
    {"noise": -1, "color": 4, "geometry": 4}, {"noise": 0, "color": 1, "geometry": 4},
    {"noise": 1, "color": 1, "geometry": 4, "blur": 2},
    {"noise": 1, "color": 1, "geometry": 4, "wether": 2}])
@pytest.mark.parametrize(("part", "flags"), [(part3_augmented, []), (part4_angular, ["--augment"])])
def test_shares_that_do_not_fit_are_refused(shares, part, flags, monkeypatch):
    monkeypatch.setattr(part, "SHARES", shares)
    said = f"is {re.escape(str(shares))}, expected .* noise, color, geometry: each above 0, tog"
    with pytest.raises(arguments.UsageError, match=said):
        part.parse_args(flags)
    part4_angular.parse_args([])


def test_the_record_has_the_share_of_every_perturbation_that_is_trained_on():
    shares = part3_augmented.parse_args(["--families", "color", "geometry"]).shares
    assert (shares["grayscale"], shares["rotation"]) == (1, 4)
    assert {common.FAMILY[name] for name in shares} == {"color", "geometry"}
    assert part4_angular.parse_args(["--augment"]).shares == part3_augmented.parse_args([]).shares
    assert part3_augmented.parse_args(["--families", "none"]).shares == {}
