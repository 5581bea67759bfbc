"""Part 3's training images: the random crop and mirror against all there can be, and who gets which perturbation."""

import collections

import pytest
import torch
import torch.nn.functional as F

import common
import part3_augmented
import part4_angular


def test_crop_and_flip_gives_one_of_the_crops_of_the_padded_image(photos):
    generator = torch.Generator().manual_seed(0)
    images = (photos[:1] / 255).expand(200, -1, -1, -1)
    results = [image for epoch in (0, 1) for image in part3_augmented.crop_and_flip(images, generator, epoch)]
    padded = F.pad(images[:1], (4, 4, 4, 4), mode="reflect")[0]
    crops = {}
    for top in range(9):
        for left in range(9):
            crop = padded[:, top : top + 32, left : left + 32]
            crops[crop.numpy().tobytes()] = (top, left, False)
            crops[crop.flip(2).contiguous().numpy().tobytes()] = (top, left, True)
    assert len(crops) == 162
    drawn = [crops[image.contiguous().numpy().tobytes()] for image in results]  # KeyError: no such crop
    assert {top for top, _, _ in drawn} == {left for _, left, _ in drawn} == set(range(9))
    assert {mirrored for _, _, mirrored in drawn[:200]} != {mirrored for _, _, mirrored in drawn[200:]}  # by epoch
    assert len(set(drawn)) > 120  # each on its own, not a few for all


def test_an_image_is_mirrored_in_every_other_epoch_and_about_half_in_each(photos):
    mirrored = torch.stack([(photos.long().sum((1, 2, 3)) + epoch) % 2 == 1 for epoch in range(4)])
    assert 0.25 < mirrored[0].float().mean() < 0.75
    for epoch in range(4):
        for images in (common.to_float(photos), common.to_float(photos) + 1e-4):  # not quite 8 bits, too
            results = part3_augmented.crop_and_flip(images, torch.Generator(), epoch, padding=0)
            assert torch.equal(results, torch.where(mirrored[epoch].view(-1, 1, 1, 1), images.flip(3), images))


@pytest.mark.parametrize(("part", "flags"), [(part3_augmented, []), (part4_angular, ["--augment"])])
def test_training_tells_augment_its_step_and_epoch(part, flags, monkeypatch, tmp_path):
    calls = []

    def watched(images, generator, step, epoch):
        calls.append((step, epoch))
        return part3_augmented.crop_and_flip(images, generator, epoch)

    monkeypatch.setattr(part, "augment", watched)
    part.main(["--dataset", "digits", "--quick", "--no-umap", "--no-part2", "--batch-size", "40", "--amp", "off",
               "--results-dir", str(tmp_path), *flags])
    assert [step for step, _ in calls] == list(range(len(calls)))
    half = len(calls) // 2
    assert [epoch for _, epoch in calls] == [0] * half + [1] * half  # --quick: two epochs


def test_part_4_trains_as_long_as_part_3_on_its_images():
    part3, part4 = part3_augmented.parse_args([]), part4_angular.parse_args(["--augment"])
    for name in ("epochs", "lr", "weight_decay"):
        assert getattr(part4, name) == getattr(part3, name)
    assert part4_angular.parse_args(["--augment", "--epochs", "3"]).epochs == 3


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
        result = part3_augmented.augment(images, torch.Generator().manual_seed(step), step, 0)
        assert result.shape == images.shape
        assert 0 <= result.min() <= result.max() <= 1
    seen = {name for name in common.PERTURBATIONS if common.FAMILY[name] in common.SEEN_FAMILIES} - {"horizontal_flip"}
    assert set(calls) == {(name, severity) for name in seen for severity in range(1, 6)}
    families = collections.Counter()
    for (name, _), images in calls.items():
        families[common.FAMILY[name]] += images
    assert families == {"noise": 120 * 4, "color": 120 * 4, "geometry": 120 * 8}
