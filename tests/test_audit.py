"""Every audit of the attack passes on a sound attack, and one broken attack for each makes it fail."""

import pytest
import torch
import torch.nn.functional as F

import common
import part2_robustness
import report

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def victim(photos):
    """A model trained for a moment to tell 4 classes of images apart, and these images."""
    torch.manual_seed(0)
    labels = torch.arange(24) % 4
    images = (0.6 * photos[:24] / 255 + 0.1 * labels.view(-1, 1, 1, 1)).contiguous()
    model = common.Model(outputs=4)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for _ in range(12):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for _ in range(15):
            model(images)  # batch statistics
    assert common.accuracy(common.predict(model.eval(), images, common.Amp("off", CPU)).logits, labels) > 0.9
    return model, images, labels


def audit(model, images, labels):
    args = part2_robustness.parse_args(["--eps-255", "0", "4", "8", "16", "--audit-images", "24"])
    run = {"part": "part2", "dataset": "test", "seed": 0, "split_hash": "-"}
    checks, rows, *_ = part2_robustness.attack(args, run, model, images, labels)
    failed = [name for name, _, passed, _ in checks if not passed]
    assert sorted(failed) == sorted(r["metric"].removeprefix("audit: ") for r in rows if r["value"] == 0.0
                                    and r["metric"].startswith("audit: "))
    return failed


def test_a_sound_attack_passes(victim):
    assert audit(*victim) == []


def test_steps_in_normalized_units_are_too_long(victim, monkeypatch):
    honest = common.fgsm_direction
    monkeypatch.setattr(common, "fgsm_direction", lambda model, *args: honest(model, *args) / model.std)
    assert "|delta| is at most eps" in audit(*victim)


def test_saturated_logits_have_no_gradient(victim):
    model, images, labels = victim

    class Saturated(torch.nn.Module):
        def forward(self, logits):
            return 1e4 * logits

    model.head = Saturated()
    try:
        assert "few images without a gradient" in audit(model, images, labels)
    finally:
        model.head = torch.nn.Identity()


def test_clipping_normalized_images_changes_them_at_eps_0(victim):
    model, images, labels = victim

    class NoNormalization(torch.nn.Module):
        """The same model for images that are normalized outside: what [0,1] clipping then destroys."""

        def __init__(self):
            super().__init__()
            self.backbone = model.backbone

        def forward(self, normalized):
            return self.backbone(normalized)

    assert "eps 0 equals clean" in audit(NoNormalization().eval(), (images - model.mean) / model.std, labels)


def test_train_mode_left_on_shows_at_eps_0(victim, monkeypatch):
    model, images, labels = victim
    state = {k: v.clone() for k, v in model.state_dict().items()}
    honest = common.fgsm_direction

    def careless(model, *args):
        model.train()
        with torch.no_grad():
            for _ in range(10):
                model(1 - images.roll(1, 1))
        model.eval()
        return honest(model, *args)

    monkeypatch.setattr(common, "fgsm_direction", careless)
    try:
        assert "eps 0 equals clean" in audit(model, images, labels)
    finally:
        model.load_state_dict(state)


def test_a_wrong_sign_is_no_stronger_than_noise(victim, monkeypatch):
    honest = common.fgsm_direction
    monkeypatch.setattr(common, "fgsm_direction", lambda *args: -honest(*args))
    assert "random_sign 8/255 is weaker than FGSM" in audit(*victim)


def test_attacking_embeddings_leaves_pgd_weaker(victim, monkeypatch):
    honest = common.pgd

    class Embeddings(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            features = []
            hook = self.model.backbone.avgpool.register_forward_hook(lambda *call: features.append(call[2].flatten(1)))
            self.model(images)
            hook.remove()
            return -1e3 * features[0]

    monkeypatch.setattr(common, "pgd", lambda model, *args: honest(Embeddings(model), *args))
    assert "pgd 8/255 is stronger than FGSM" in audit(*victim)


def test_an_attack_that_does_nothing_leaves_too_much(victim, monkeypatch):
    monkeypatch.setattr(common, "pgd", lambda model, images, *args: images)
    assert {"pgd 16/255 leaves next to nothing", "pgd 16/255 is stronger than FGSM"} <= set(audit(*victim))


def test_a_failed_audit_is_said_in_the_plot(victim, monkeypatch, tmp_path):
    captions = []
    monkeypatch.setattr(report, "save", lambda figure, path, caption: captions.append(caption))
    run = {"part": "part2", "dataset": "test"}
    report.plot_attack(tmp_path / "x.png", [], run, "inf", [("eps 0 equals clean", "3 differ", False, 40)])
    report.plot_attack(tmp_path / "x.png", [], run, "inf", [("eps 0 equals clean", "0 differ", True, 40)])
    assert "AUDIT FAILED: eps 0 equals clean" in captions[0]
    assert "All audits of the attack pass" in captions[1]
