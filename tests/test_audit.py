"""A sound attack passes every audit; for each audit, one broken attack or model makes it fail."""

import copy

import audit
import common
import network
import part2_robustness
import report

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

CPU = torch.device("cpu")
N = 200


class Small(nn.Module):
    """A network with a Model's parts that trains to the end within seconds: a sturdy victim."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
                                  nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(128, 4)

    def forward(self, images):
        return self.fc(self.avgpool(self.body(images)).flatten(1))


class Times(nn.Module):
    """A head that multiplies the logits: the same decisions."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, logits):
        return self.factor * logits


@pytest.fixture(scope="module")
def victim():
    """(model, images, labels): trained until the loss is small, far from any last bit."""
    torch.manual_seed(0)
    labels = torch.arange(N) % 4
    patterns = torch.rand(4, 3, 4, 4)[labels]
    fields = 0.5 + 0.25 * (patterns - 0.5) + 0.25 * (torch.rand(N, 3, 4, 4) - 0.5)
    images = F.interpolate(fields, size=(16, 16), mode="bilinear")
    images = (images + 0.03 * torch.randn(N, 3, 16, 16)).clamp(0.02, 0.98)
    model = common.Model(outputs=4)
    model.backbone = Small()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for _ in range(100):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for _ in range(15):
            model(images)  # batch statistics
    model.eval()
    assert common.accuracy(model(images), labels) == 1
    return model, images, labels


def a_run():
    return report.Run("part2", "cross-entropy", "part2", None, "x.pt", "0" * 12, "toy",
                      tuple("abcd"), {}, "abc", 0, {}, "x", {}, CPU, "cpu", "off")


def attack(model, images, labels, *flags, part1=None):
    """(names of the failed checks, accuracy by (attack, eps), all that `attack` gives)."""
    args = part2_robustness.parse_args(["--eps-255", "0", "4", "8", "16", "--audit-images", "60",
                                        *flags])
    attacked = part2_robustness.attack(args, a_run(), model, images, labels, part1)
    failed = {check.name for check in attacked.audit if not check.passed}
    said = {row["metric"].removeprefix("audit: ") for row in attacked.rows
            if row["metric"].startswith("audit: ") and row["value"] == 0}
    assert failed == said
    left = {}
    for row in attacked.rows:
        if row["metric"] == "accuracy":
            left[row["condition"], row["severity"]] = row["value"]
    return failed, left, attacked


def scaled(model, factor):
    model = copy.deepcopy(model)
    model.head = Times(factor)
    return model


def test_a_sound_attack_passes(victim):
    failed, left, attacked = attack(*victim)
    assert not failed
    for check in attacked.audit:
        assert check.n == (60 if check.name.startswith("pgd") else N)
    assert left["fgsm", "0"] == 1
    assert left["random_sign", "8"] > left["fgsm", "8"] + 0.2


@pytest.mark.parametrize(("wanted", "shown"), [(4, 4), (5, 8), (32, 16)])
def test_the_umap_is_of_the_next_eps_or_of_the_largest(victim, monkeypatch, wanted, shown):
    monkeypatch.setattr(part2_robustness, "FIGURE_EPS", wanted)
    model, images, labels = victim
    attacked = attack(model, images[:60], labels[:60])[2]
    assert attacked.eps_255 == shown
    eps = shown / 255
    adversarial = common.fgsm(model, images[:60], labels[:60], eps)
    features = common.predict(model, adversarial, common.Amp("off", CPU)).features
    assert torch.allclose(attacked.features, features, atol=1e-4)


@pytest.mark.parametrize("factor", [5, 20])
def test_a_saturated_softmax_changes_no_figure_on_unit_logits_and_is_found(victim, factor):
    model, images, labels = victim
    with torch.no_grad():
        logits = model(images)
        own = F.one_hot(labels, 4).bool()
        margin = (logits[own] - logits.masked_fill(own, -1e9).amax(1)).median().item()
    sound = 12 / margin  # with margins beyond 16, float32 loses the true class's gradient
    failed, before, _ = attack(scaled(model, sound), images, labels)
    assert not failed
    failed, after, _ = attack(scaled(model, factor * sound), images, labels)
    for (name, eps), value in before.items():
        if name in ("fgsm_unit", "pgd_unit"):
            assert after[name, eps] == pytest.approx(value, abs=0.017), (name, eps)  # one of 60
    assert after["fgsm", "8"] > before["fgsm", "8"]  # what would be taken for robustness
    assert "fgsm_unit 8/255 is hardly stronger than fgsm" in failed


def test_an_image_without_a_gradient_has_none_anywhere(victim, monkeypatch):
    def masked(*args):
        direction = honest(*args).clone()
        direction[:10] = 0
        direction[10:, :, :8] = 0  # half of each image
        return direction

    honest = common.fgsm_direction
    monkeypatch.setattr(common, "fgsm_direction", masked)
    model, images, labels = victim
    failed, _, attacked = attack(model, images[:40], labels[:40], "--audit-images", "10")
    [row] = [row for row in attacked.rows if row["metric"] == "share of images without a gradient"]
    assert (row["value"], row["n"]) == (0.25, 40)
    assert "few images without a gradient" in failed


def test_pgd_that_goes_too_far_is_found(victim, monkeypatch):
    def too_far(model, images, labels, eps, norm):
        return pgd(model, images, labels, 2 * eps, norm)

    pgd = common.pgd
    monkeypatch.setattr(common, "pgd", too_far)
    failed, _, _ = attack(*victim)
    assert "|delta| is at most eps" in failed


def test_steps_in_normalized_units_are_too_long(victim, monkeypatch):
    """Also where only one of the attacks takes them."""
    honest = part2_robustness.make_directions

    def make_directions(args, names, *rest):
        found = honest(args, names, *rest)
        return found | {names.fgsm: found[names.fgsm] / network.STD[0]}

    monkeypatch.setattr(part2_robustness, "make_directions", make_directions)
    assert "|delta| is at most eps" in attack(*victim)[0]


def test_normalized_images_are_refused(victim):  # clipped, they would be other images at eps 0
    model, images, labels = victim
    normalized = (images - model.mean) / model.std
    outside = copy.deepcopy(model)  # the same model for images that are normalized outside
    outside.mean.zero_()
    outside.std.fill_(1)
    assert common.accuracy(outside(normalized), labels) == 1
    with pytest.raises(ValueError, match="a model must normalize them itself"):
        attack(outside, normalized, labels)


def test_train_mode_left_on_shows_at_eps_0(victim, monkeypatch):
    model, images, labels = victim
    model = copy.deepcopy(model)
    honest = common.fgsm_direction

    def careless(model, *args):
        model.train()
        with torch.no_grad():
            for _ in range(10):
                model(images.flip(0) * torch.tensor([0.2, 1, 2]).view(3, 1, 1))
        model.eval()
        return honest(model, *args)

    monkeypatch.setattr(common, "fgsm_direction", careless)
    assert "eps 0 equals clean" in attack(model, images, labels)[0]


def test_a_wrong_sign_is_no_stronger_than_noise(victim, monkeypatch):
    honest = common.fgsm_direction
    monkeypatch.setattr(common, "fgsm_direction", lambda *args: -honest(*args))
    assert "random_sign 8/255 is weaker than fgsm" in attack(*victim)[0]


def test_an_attack_that_does_nothing_leaves_too_much(victim, monkeypatch):
    monkeypatch.setattr(common, "pgd", lambda model, images, *args: images)
    failed = attack(*victim)[0]
    assert {"pgd 8/255 is stronger than fgsm", "pgd 16/255 leaves next to nothing",
            "pgd_unit 16/255 leaves next to nothing"} <= failed


def test_pgd_must_leave_nothing_at_the_largest_eps_of_any_sweep(victim, monkeypatch):
    honest = common.pgd

    def weak_from_20(model, images, labels, eps, norm):
        return honest(model, images, labels, eps, norm) if eps < 20 / 255 else images

    monkeypatch.setattr(common, "pgd", weak_from_20)
    assert not any("leaves next to nothing" in name for name in attack(*victim)[0])
    failed, left, _ = attack(*victim, "--eps-255", "8", "24")
    assert {"pgd 24/255 leaves next to nothing", "pgd_unit 24/255 leaves next to nothing"} <= failed
    names = [check.name for check in attack(*victim, "--eps-255", "1")[2].audit]
    assert "pgd 8/255 leaves next to nothing" in names  # a sweep of small eps is no way out


@pytest.mark.parametrize(("fgsm", "pgd", "passed"), [(4, 4, False), (4, 3, True), (0, 0, True),
                                                     (4, 5, False)])
def test_a_tie_above_zero_is_not_stronger(fgsm, pgd, passed):
    checks = checks_of(fgsm=fgsm, pgd=pgd, pgd_unit=pgd)
    assert checks["pgd 8/255 is stronger than fgsm"] == passed


@pytest.mark.parametrize(("fgsm", "noise", "passed"), [(4, 5, True), (4, 4, False), (4, 3, False),
                                                       (0, 0, True)])
def test_noise_must_be_weaker_not_as_strong(fgsm, noise, passed):
    checks = checks_of(fgsm=fgsm, random_sign=noise)
    assert checks["random_sign 8/255 is weaker than fgsm"] == passed


@pytest.mark.parametrize(("transfer", "passed"), [(5, True), (4, True), (3, False)])
def test_what_part_1_finds_must_not_be_stronger_than_the_models_own(transfer, passed):
    checks = checks_of(fgsm_from_part1=transfer)
    assert checks["fgsm_from_part1 8/255 is not stronger than fgsm"] == passed


def checks_of(**left):
    """{check: passed} at eps 8/255 for so many of ten images withstanding each attack."""
    counts = {"fgsm": 4, "fgsm_unit": 4, "random_sign": 9, "pgd": 1, "pgd_unit": 1} | left
    withstood = {(name, 8): torch.arange(10) < n for name, n in counts.items()}
    few = torch.arange(10)
    checks = audit.checks_at(audit.NAMES["inf"], withstood, few, 8)
    return {check.name: check.passed for check in checks}


@pytest.mark.parametrize(("unit", "passed"), [(95, True), (94, False)])
def test_unit_logits_may_take_off_two_points_of_fgsm_and_five_of_pgd(unit, passed):
    withstood = {(name, 8): torch.arange(100) < n for name, n in
                 {"fgsm": 100, "fgsm_unit": unit + 3, "random_sign": 100, "pgd": 100,
                  "pgd_unit": unit}.items()}
    checks = audit.checks_at(audit.NAMES["inf"], withstood, torch.arange(100), 8)
    found = {check.name: check.passed for check in checks}
    assert found["pgd_unit 8/255 is hardly stronger than pgd"] == passed
    assert found["fgsm_unit 8/255 is hardly stronger than fgsm"] == passed


def test_pgd_is_compared_with_fgsm_on_the_images_of_both():
    withstood = {(name, 8): torch.arange(10) >= 4 for name in ("fgsm", "fgsm_unit", "random_sign")}
    withstood |= {(name, 8): torch.arange(4) < 1 for name in ("pgd", "pgd_unit")}
    checks = audit.checks_at(audit.NAMES["inf"], withstood, torch.arange(4), 8)
    [check] = [check for check in checks if check.name == "pgd 8/255 is stronger than fgsm"]
    assert (check.passed, check.found) == (False, "25.0 against 0.0 %")


@pytest.mark.parametrize(("name", "value", "passed"), [
    ("no_gradient", 0.009, True), ("no_gradient", 0.01, False), ("excess", 9e-7, True),
    ("excess", 1e-5, False), ("changed", 0, True), ("changed", 1, False), ("left", 10, True),
    ("left", 11, False)])
def test_the_bounds_of_the_audit(name, value, passed):
    at = {"no_gradient": 0.0, "excess": 0.0, "changed": 0, "left": 0} | {name: value}
    right = {(attack, eps): torch.arange(100) < at["left"] for eps in (0, 8) for attack in
             ("fgsm", "fgsm_unit", "random_sign", "pgd", "pgd_unit")}
    checks = audit.audit_attacks(audit.NAMES["inf"], right, torch.arange(100), [8],
                                 at["no_gradient"], at["excess"], at["changed"])
    said = {"no_gradient": "few images without a gradient", "excess": "|delta| is at most eps",
            "changed": "eps 0 equals clean", "left": "pgd 8/255 leaves next to nothing"}
    assert {check.name: check.passed for check in checks}[said[name]] == passed


def test_a_masked_model_is_found_by_part_1s_adversarial_images(victim):
    model, images, labels = victim

    class Steps(nn.Module):
        """Pixels in steps of 1/16, with a gradient that misleads."""

        def __init__(self):
            super().__init__()
            self.model = model
            self.backbone = model.backbone  # whose features `predict` keeps

        def forward(self, images):
            stairs = (images * 16).round() / 16
            return self.model(stairs.detach() + (images - images.detach()).flip(3))

    failed, left, attacked = attack(Steps().eval(), images, labels, part1=model)
    assert left["fgsm_from_part1", "8"] < left["fgsm", "8"]
    assert "fgsm_from_part1 8/255 is not stronger than fgsm" in failed


def test_part_1s_images_do_not_count_in_the_worst_case():
    """Part 1 itself is attacked with its own alone: it would be judged by fewer attacks."""
    right = {("fgsm", 8): [1, 1, 0, 0], ("random_sign", 8): [1, 1, 1, 1],
             ("fgsm_from_part1", 8): [0, 0, 0, 0], ("pgd", 8): [1, 1]}  # of images 1 and 2
    right = {key: torch.tensor(value, dtype=torch.bool) for key, value in right.items()}
    some = torch.tensor([1, 2])
    rows = audit.worst_case_rows(a_run(), audit.NAMES["inf"], right, some, [0, 8])
    assert {(row["condition"], row["value"]) for row in rows} == {("worst_case", 0.5),
                                                                  ("worst_case_audit", 0.5)}


def test_the_worst_case_is_of_each_image_over_all_attacks(victim):
    _, left, attacked = attack(*victim, "--targeted", part1=victim[0])
    few = common.evenly_spaced(N, 60).numpy()
    for eps in ("4", "8", "16"):
        all_images = np.ones(N, bool)
        audited = np.ones(60, bool)
        for key, withstood in attacked.correct.items():
            _, name, at = key.split("/")
            if name == "fgsm_from_part1":
                continue
            if at == eps and name.startswith("pgd"):
                audited &= withstood
            elif at == eps:
                all_images &= withstood
                assert left["worst_case", eps] <= withstood.mean()
        assert left["worst_case", eps] == all_images.mean()
        if eps != "4":
            assert left["worst_case_audit", eps] == (audited & all_images[few]).mean()
    assert ("worst_case_audit", "4") not in left  # no PGD there
    assert [eps for name, eps in left if name == "fgsm_unit"] == ["4", "8", "16"]


def test_in_the_l2_norm_as_well(victim):
    failed, left, attacked = attack(*victim, "--norm", "2", "--eps-255", "64")
    assert "|delta| is at most eps" not in failed
    checks = [check.name for check in attacked.audit]
    assert "pgd_l2 256/255 leaves next to nothing" in checks  # though not asked for
    assert left["worst_case_l2", "256"] <= min(left["fgsm_l2", "256"], left["random_l2", "256"])
