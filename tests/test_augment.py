"""Part 3's training images: the random crop and mirror against all there can be, and who gets which perturbation."""

import collections

import pytest
import torch
import torch.nn.functional as F

import common
import part3_augmented
import part4_angular


def test_crop_and_flip_gives_one_of_the_crops_of_the_padded_image(photos):
    images = photos[:1].expand(400, -1, -1, -1)
    results = part3_augmented.crop_and_flip(images, torch.Generator().manual_seed(0))
    padded = F.pad(photos[:1].float(), (4, 4, 4, 4), mode="reflect").to(torch.uint8)[0]
    crops = {}
    for top in range(9):
        for left in range(9):
            crop = padded[:, top : top + 32, left : left + 32]
            crops[crop.numpy().tobytes()] = (top, left, False)
            crops[crop.flip(2).contiguous().numpy().tobytes()] = (top, left, True)
    assert len(crops) == 162
    drawn = [crops[image.contiguous().numpy().tobytes()] for image in results]  # KeyError: no such crop
    assert {top for top, _, _ in drawn} == {left for _, left, _ in drawn} == set(range(9))
    assert 150 < sum(mirrored for _, _, mirrored in drawn) < 250  # of 400; 5 standard deviations
    assert len(set(drawn)) > 120  # each on its own, not a few for all


def test_every_seen_perturbation_takes_its_turn_at_every_severity(monkeypatch, photos):
    calls = collections.Counter()

    def watch(name, perturb):
        def watched(images, severity, generator):
            calls[name, severity] += len(images)
            return perturb(images, severity, generator)
        return watched

    monkeypatch.setattr(common, "PERTURBATIONS", {n: watch(n, p) for n, p in common.PERTURBATIONS.items()})
    images = torch.cat([photos, photos])[:64] / 255
    for step in range(120):
        result = part3_augmented.augment(images, torch.Generator().manual_seed(step), step)
        assert result.shape == images.shape
        assert 0 <= result.min() <= result.max() <= 1
    seen = {name for name in common.PERTURBATIONS if common.FAMILY[name] in common.SEEN_FAMILIES} - {"horizontal_flip"}
    assert set(calls) == {(name, severity) for name in seen for severity in range(1, 6)}
    families = collections.Counter()
    for (name, _), images in calls.items():
        families[common.FAMILY[name]] += images
    assert families == {"noise": 120 * 4, "color": 120 * 4, "geometry": 120 * 16}


@pytest.mark.parametrize(("part", "flags"), [(part3_augmented, []), (part4_angular, ["--augment"])])
def test_training_perturbs_every_step_with_the_next_turn(part, flags, monkeypatch, tmp_path):
    steps = []

    def watched(images, generator, step):
        steps.append(step)
        return images

    monkeypatch.setattr(part, "augment", watched)
    part.main(["--dataset", "digits", "--quick", "--no-umap", "--no-part2", "--batch-size", "40", "--amp", "off",
               "--results-dir", str(tmp_path), *flags])
    assert len(steps) > 1
    assert steps == list(range(len(steps)))


def test_part_4_trains_as_long_as_part_3_does_on_its_images():
    part3, part4 = part3_augmented.parse_args([]), part4_angular.parse_args(["--augment"])
    assert (part4.epochs, part4.lr) == (part3.epochs, part3.lr)
    assert part4_angular.parse_args([]).epochs < part3.epochs  # without --augment: part 1's
    assert part4_angular.parse_args(["--augment", "--epochs", "3"]).epochs == 3
