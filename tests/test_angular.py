"""The Angular loss: its definition, a published implementation, values by hand, differences."""

import math

import common
import part4_angular
import report
from margin_losses import MarginLoss
from metrics import class_means
from part4_angular import ProxyAngularLoss, angular_loss, fit_head

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

AMP = common.Amp("off", torch.device("cpu"))


def by_definition(embeddings, labels, alpha_deg, sign=1):
    """The mean over pairs of log(1 + Σ exp f), triplet by triplet. sign = -1: the wrong sign."""
    x = F.normalize(embeddings, dim=1)
    tan2 = math.tan(math.radians(alpha_deg)) ** 2
    terms = []
    for a in range(len(x)):
        for p in range(len(x)):
            if a != p and labels[a] == labels[p]:
                f = [4 * tan2 * (x[a] + x[p]) @ x[n] - sign * 2 * (1 + tan2) * x[a] @ x[p]
                     for n in range(len(x)) if labels[n] != labels[a]]
                terms.append(torch.log(1 + torch.stack(f).exp().sum()) if f else x.sum() * 0)
    return torch.stack(terms).mean()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(14) % 4
    means = 3 * torch.randn(4, 6, generator=generator)
    return means[labels] + 2 * torch.randn(14, 6, generator=generator), labels


def assert_close(ours, theirs):
    """Gradients that are the same but for float32's rounding."""
    assert torch.allclose(ours.double(), theirs, rtol=1e-5, atol=1e-6 * theirs.abs().max())


@pytest.mark.parametrize("alpha_deg", [0.01, 20, 36, 45, 55, 65])
def test_equals_the_definition(batch, alpha_deg):
    embeddings, labels = batch
    single = embeddings.clone().requires_grad_(True)
    double = embeddings.double().requires_grad_(True)
    value = angular_loss(single, labels, alpha_deg)
    expected = by_definition(double, labels, alpha_deg)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    value.backward()
    expected.backward()
    assert_close(single.grad, double.grad)
    wrong = by_definition(double, labels, alpha_deg, sign=-1)
    assert value.item() != pytest.approx(wrong.item(), rel=1e-2)


@pytest.mark.parametrize("alpha_deg", [36, 45, 55])
def test_equals_pytorch_metric_learning(alpha_deg):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    generator = torch.Generator().manual_seed(1)
    for n, dim in ((20, 8), (60, 32)):
        embeddings = F.normalize(torch.randn(n, dim, generator=generator), dim=1)
        labels = torch.randint(5, (n,), generator=generator)
        ours = embeddings.clone().requires_grad_(True)
        theirs = embeddings.clone().requires_grad_(True)
        value = angular_loss(ours, labels, alpha_deg)
        expected = losses.AngularLoss(alpha_deg)(theirs, labels)
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        value.backward()
        expected.backward()
        radial = (theirs.grad * embeddings).sum(1, keepdim=True)  # theirs fixes no length
        tangent = theirs.grad - radial * embeddings
        assert torch.allclose(ours.grad, tangent, atol=1e-5 * tangent.abs().max())


def test_is_float32_also_under_autocast(batch):
    with torch.autocast("cpu", torch.bfloat16):
        under = angular_loss(*batch, 45)
    assert torch.equal(under, angular_loss(*batch, 45))


def test_three_vectors_by_hand():
    # a = p = (1,0), n = (0,1), alpha = 45°: f = 4·0 - 4·1 for both pairs, so log(1 + e^-4)
    embeddings, labels = torch.tensor([[1.0, 0], [2.0, 0], [0, 5.0]]), torch.tensor([0, 0, 1])
    value = angular_loss(embeddings, labels, 45).item()
    assert value == pytest.approx(math.log1p(math.exp(-4)), rel=1e-6)
    # n = a as well: f = 4·2 - 4
    embeddings[2] = torch.tensor([3.0, 0])
    value = angular_loss(embeddings, labels, 45).item()
    assert value == pytest.approx(math.log1p(math.exp(4)), rel=1e-6)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [1, 1, 1, 1]])
def test_without_pairs_or_negatives_the_loss_is_zero(labels):
    embeddings = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    loss = angular_loss(embeddings, torch.tensor(labels), 45)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(loss, embeddings)[0].abs().max() < 1e-6


def test_range_of_alpha():
    embeddings = torch.eye(2).repeat(32, 1)  # the worst case: negatives that coincide
    labels = torch.tensor([0, 0, 1, 1]).repeat(16)
    for alpha_deg in (0, 70):
        value = angular_loss(embeddings.requires_grad_(True), labels, alpha_deg)
        assert torch.isfinite(value)
        assert torch.isfinite(torch.autograd.grad(value, embeddings)[0]).all()
    for alpha_deg in (-1, 70.1, 89.9, math.nan):
        with pytest.raises(ValueError, match="not in"):
            angular_loss(embeddings, labels, alpha_deg)


def test_copies_count_as_repeated_rows(batch):
    embeddings, labels = batch
    embeddings = embeddings.double()
    copies = torch.tensor([1, 3, 1, 2, 1, 1, 16, 1, 1, 5, 1, 1, 2, 1])
    ours = embeddings.clone().requires_grad_(True)
    theirs = embeddings.clone().requires_grad_(True)
    value = angular_loss(ours, labels, 45, copies.float())
    repeated = torch.arange(14).repeat_interleave(copies)
    expected = by_definition(theirs[repeated], labels[repeated], 45)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert value.item() != pytest.approx(angular_loss(embeddings, labels, 45).item(), rel=1e-2)
    value.backward()
    expected.backward()
    assert_close(ours.grad, theirs.grad)


def test_proxies_join_the_batch_and_class_means_classify(batch):
    embeddings, labels = batch
    head = common.ClassMeans(4, 6)
    criterion = ProxyAngularLoss(head, 45)
    proxies = criterion.proxies.detach().clone()
    assert 0.3 < proxies.std() < 2  # the shorter they are, the faster they turn
    value = criterion(embeddings.bfloat16(), labels)
    value.backward()
    rows = [embeddings.bfloat16().double()] + 16 * [proxies.double()]
    expected = by_definition(torch.cat(rows), torch.cat([labels, torch.arange(4).repeat(16)]), 45)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (criterion.proxies.grad != 0).any(1).all()  # each of the four
    head.fit(embeddings, labels)
    assert torch.allclose(head.means, class_means(embeddings, labels, 4))


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("classes", [200, 600])
def test_proxies_of_many_classes_cost_no_more_than_their_pairs(classes):
    criterion = ProxyAngularLoss(common.ClassMeans(classes, 128), 36)
    labels = torch.arange(32).repeat(2)
    with Largest() as largest:
        criterion(torch.randn(64, 128), labels).backward()
    assert classes**2 < largest.elements <= (64 + classes) ** 2


def test_a_margin_loss_of_another_name_is_not_taken_for_the_last_one():
    with pytest.raises(ValueError, match="no margin loss is called 'ArcFace'"):
        MarginLoss("ArcFace", common.ClassMeans(2, 16), 0.5, scale=10.0)


@pytest.mark.parametrize("theta", [0, 0.7, 3.0, math.pi])
@pytest.mark.parametrize(("kind", "margin"), [
    ("arcface", None), ("arcface", 0.5), ("arcface", 0.0), ("cosface", None), ("cosface", 0.35),
    ("cosface", 0.0), ("sphereface", None), ("sphereface", 2.0)])
def test_margins_by_hand(kind, margin, theta):
    head = common.ClassMeans(2, 16)
    criterion = MarginLoss(kind, head, margin, scale=10.0)
    with torch.no_grad():
        head.means.zero_()[:, :2] = torch.diag(torch.tensor([2.0, 0.5]))  # of any length
    embedding = torch.zeros(1, 16)
    embedding[0, 0], embedding[0, 1] = 3 * math.cos(theta), 3 * math.sin(theta)
    m = {"arcface": 0.2, "cosface": 0.2, "sphereface": 1.1}[kind] if margin is None else margin
    own = {"arcface": math.cos(min(theta + m, math.pi)), "cosface": math.cos(theta) - m,
           "sphereface": math.cos(min(m * theta, math.pi))}
    gap = (3 if kind == "sphereface" else 10) * (own[kind] - math.sin(theta))
    expected = math.log1p(math.exp(-gap)) + 0.05 * gap  # a tenth is spread over both classes
    value = criterion(embedding.requires_grad_(True), torch.tensor([0]))
    tolerance = 1e-5 if 0 < theta < math.pi else 1e-3  # the cosines are clamped to 1 - 1e-6
    assert value.item() == pytest.approx(expected, rel=tolerance, abs=tolerance)
    assert torch.isfinite(torch.autograd.grad(value, embedding)[0]).all()
    criterion.label_smoothing = 0.4
    value = criterion(embedding, torch.tensor([0]))
    assert value.item() == pytest.approx(expected + 0.15 * gap, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("kind", ["arcface", "cosface", "sphereface"])
def test_finite_differences_of_the_margins(batch, kind):
    embeddings, labels = batch
    criterion = MarginLoss(kind, common.ClassMeans(4, 6).double(), None, 10.0)
    at = embeddings.double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x, _: criterion(x, labels), (at, criterion.proxies))


@pytest.mark.parametrize(("flags", "made"), [
    (["--alpha-deg", "50"], lambda head: lambda x, y: angular_loss(x, y, 50)),
    (["--proxies", "--alpha-deg", "50"], lambda head: ProxyAngularLoss(head, 50)),
    (["--loss", "sphereface", "--margin", "1"],
     lambda head: MarginLoss("sphereface", head, 1.0, 16.0)),
    (["--loss", "cosface", "--margin", "0.3", "--scale", "5", "--label-smoothing", "0"],
     lambda head: MarginLoss("cosface", head, 0.3, 5.0, 0.0))])
def test_the_loss_is_made_as_the_arguments_say(batch, flags, made):
    values = []
    for make in (made, lambda head: part4_angular.make_criterion(
            part4_angular.parse_args(flags), head)):
        torch.manual_seed(0)  # of the proxies
        values.append(make(common.ClassMeans(4, 6))(*batch).item())
    assert values[0] == values[1]


def test_head_classifies_by_the_nearest_mean_and_keeps_gradients(small_photos, tiny_backbone):
    torch.manual_seed(0)
    model = common.Model(outputs=16, head=common.ClassMeans(4, 16))
    labels = torch.arange(40) % 4
    split = common.Split(small_photos, labels, None, None, "")
    fit_head(model, split, AMP)
    images = common.to_float(small_photos)
    model.eval()
    with torch.no_grad():
        embeddings = F.normalize(model.outputs(images), dim=1)
        logits = model(images)
    means = torch.stack([F.normalize(embeddings[labels == c].mean(0), dim=0) for c in range(4)])
    assert torch.allclose(logits, model.head.scale * embeddings @ means.T, atol=1e-4)
    assert (common.fgsm_direction(model, images, labels) != 0).flatten(1).any(1).all()


class Projected(common.Model):
    """A student's: one more layer between the backbone and the classifier."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.projection = torch.nn.Linear(16, 16)

    def outputs(self, images):
        return self.projection(super().outputs(images)).relu()


def test_class_means_are_of_what_the_model_puts_out(small_photos, tiny_backbone):
    torch.manual_seed(0)
    model = Projected(16, common.ClassMeans(4, 16))
    labels = torch.arange(40) % 4
    fit_head(model, common.Split(small_photos, labels, None, None, ""), AMP)
    model.eval()
    with torch.no_grad():
        embeddings = F.normalize(model.outputs(common.to_float(small_photos)), dim=1)
    for c in range(4):
        mean = embeddings[labels == c].mean(0)
        assert F.cosine_similarity(model.head.means[c], mean, dim=0) > 0.9999


def test_an_attack_before_the_class_means_are_set_is_refused(small_photos, tiny_backbone):
    model = common.Model(16, common.ClassMeans(4, 16))
    images = common.to_float(small_photos[:8])
    for attack in (common.fgsm, common.pgd):
        with pytest.raises(ValueError, match="until fit_head sets them"):
            attack(model, images, torch.arange(8) % 4, 8 / 255)
    model.head.means.data.fill_(math.inf)
    with pytest.raises(ValueError, match="head.means has values that are not finite"):
        common.pgd(model, images, torch.arange(8) % 4, 8 / 255)


def test_a_margin_loss_trains_the_proxies_that_its_head_classifies_by(small_photos, tiny_backbone):
    torch.manual_seed(0)
    model = common.Model(outputs=16, head=common.ClassMeans(4, 16, learned=True))
    labels = torch.arange(40) % 4
    criterion = MarginLoss("cosface", model.head, None, 16.0)
    average = common.WeightAverage(model, power=3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = model.head.means.detach().clone()
    assert 0.7 < before.std() < 1.3  # the shorter they are, the faster they turn
    for _ in range(2):
        optimizer.zero_grad()
        criterion(model.outputs(common.to_float(small_photos)), labels).backward()
        optimizer.step()
        average.update(model)
    assert not torch.equal(model.head.means, before)
    averaged = average.for_evaluation(small_photos, AMP)
    learned = averaged.head.means.detach().clone()
    assert not torch.equal(learned, model.head.means)  # of both steps
    fit_head(averaged, common.Split(small_photos, labels, None, None, ""), AMP)
    assert torch.equal(averaged.head.means, learned)
    with torch.no_grad():
        logits = averaged.head(5 * learned)  # a proxy lies nearest to itself
    assert torch.allclose(logits.diag(), averaged.head.scale.expand(4), rtol=1e-5)


def test_scale_is_the_best_on_the_embeddings_it_was_fitted_to():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    means = torch.randn(4, 16, generator=generator)
    embeddings = F.normalize(means[labels] + torch.randn(400, 16, generator=generator), dim=1)
    head = common.ClassMeans(4, 16)
    head.fit(5 * embeddings, labels)

    def loss(scale):
        return F.cross_entropy(scale * embeddings @ head.means.T, labels, label_smoothing=0.1)

    assert 1 < head.scale < 64
    assert loss(head.scale) < min(loss(head.scale - 1), loss(head.scale + 1))
    exact = head(embeddings)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(embeddings), exact)
    head.fit(5 * embeddings, labels)  # as after every epoch
    assert torch.equal(head(embeddings), exact)


@pytest.mark.parametrize("gap", [0.06, 0.3])
def test_scale_by_hand(gap):
    # two classes whose cosine is 1 - gap; the target is 0.95, so scale · gap = log(0.95 / 0.05)
    angle = math.acos(1 - gap)
    embeddings = torch.tensor([[1.0, 0], [math.cos(angle), math.sin(angle)]])
    head = common.ClassMeans(2, 2)
    head.fit(embeddings, torch.arange(2))
    assert head.scale == round(math.log(19) / gap)  # 49 and 10


@pytest.mark.parametrize(("flags", "name", "label"), [
    ([], "part4", "Angular"), (["--augment"], "part4_augmented", "Angular, augmented"),
    (["--proxies"], "part4_proxies", "Angular + proxies"),
    (["--proxies", "--augment"], "part4_proxies_augmented", "Angular + proxies, augmented"),
    (["--loss", "cosface", "--augment"], "part4_augmented", "CosFace, augmented")])
def test_a_model_is_called_what_it_was_trained_with(flags, name, label):
    args = part4_angular.parse_args(flags)
    assert part4_angular.part_name(args) == name
    assert report.label(name, vars(args)) == label


def test_a_students_own_loss_keeps_its_name_and_is_asked_for():
    assert report.label("part4", {"loss": "triplet"}) == "triplet"
    assert report.label("part4_augmented", {"loss": "triplet"}) == "triplet, augmented"
    assert report.label("part4", {"loss": ["?"]}) == report.label("part4", {}) == "Angular"
    args = part4_angular.parse_args([])
    args.loss = "triplet"
    with pytest.raises(ValueError, match="makes no loss 'triplet'"):
        part4_angular.make_criterion(args, None)
