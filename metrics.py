"""Measures: intervals and tests of accuracies, calibration, and how features separate classes."""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

# ---- intervals and tests ------------------------------------------------------------------------

SIX_DIGITS = 1.5e-6  # what rounding accuracies to six digits, as tables do, can make of a spread


def percent(value, sign=""):
    """A fraction as text: percent, one decimal; half of that away from zero, as floats may not do.

    sign: "+" to show one.
    """
    return f"{100 * value + math.copysign(1e-9, value):{sign}.1f}"


def wilson_interval(correct, n, z=1.959964):
    """95 % score interval of a proportion (Wilson 1927).

    correct, n: counts, 0 <= correct <= n, n > 0.  z: normal quantile.
    Returns (low, high), fractions in [0, 1].  Raises ValueError outside these ranges.
    """
    if not 0 <= correct <= n or n <= 0:
        raise ValueError(f"{correct} of {n} is not a proportion: expected 0 <= correct <= n, n > 0")
    share = correct / n
    z2 = z * z / n
    center = (share + z2 / 2) / (1 + z2)
    half = z * math.sqrt(share * (1 - share) / n + z2 / (4 * n)) / (1 + z2)
    low = center - half if correct > 0 else 0.0  # exact at the ends
    high = center + half if correct < n else 1.0
    return low, high


def check_pairs(ours, theirs):
    """Raises ValueError for arrays of other shapes than (n,), which would broadcast."""
    if np.ndim(ours) != 1 or np.shape(ours) != np.shape(theirs):
        raise ValueError("expected two arrays (n,) of pairs, found the shapes "
                         f"{tuple(np.shape(ours))} and {tuple(np.shape(theirs))}")


def mcnemar(correct_a, correct_b):
    """Two-sided exact p-value of McNemar's test (1947) that two models err equally often.

    correct_a, correct_b: booleans (N,) of the same images.  Returns a p-value in [0, 1].
    Raises ValueError for different shapes.
    """
    from scipy.stats import binomtest

    check_pairs(correct_a, correct_b)
    only_a = int((correct_a & ~correct_b).sum())
    only_b = int((correct_b & ~correct_a).sum())
    if only_a + only_b == 0:
        return 1.0
    return binomtest(only_a, only_a + only_b, 0.5).pvalue


def holm(p_values):
    """Holm's step-down correction (1979): p-values (M,) adjusted for the M tests of one table."""
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values)
    tests_left = len(order) - np.arange(len(order))
    adjusted = np.maximum.accumulate(p_values[order] * tests_left)
    result = np.empty_like(adjusted)
    result[order] = np.minimum(adjusted, 1)
    return result


class Difference(NamedTuple):
    """A mean paired difference over n trainings or images, with Student's 95 % interval and p."""

    mean: float
    low: float
    high: float
    p_value: float
    n: int


def paired_difference(ours, theirs):
    """The Difference `ours - theirs` of a measure over n pairs (Student's t, n - 1 degrees).

    ours, theirs: (n,) numbers, entry i of both from the same split and seed, or image.  With one
    pair, or if all differences are the same but for a table's rounding, the spread is unknown:
    unbounded interval, p of 1.  Raises ValueError for different shapes.
    """
    from scipy.stats import t

    check_pairs(ours, theirs)
    differences = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    n = len(differences)
    mean = float(differences.mean())
    spread = float(differences.std(ddof=1)) if n > 1 else 0.0
    if spread < SIX_DIGITS:
        return Difference(mean, -math.inf, math.inf, 1.0, n)
    error = spread / math.sqrt(n)
    half = float(t.ppf(0.975, n - 1)) * error
    p_value = float(2 * t.sf(abs(mean) / error, n - 1))
    return Difference(mean, mean - half, mean + half, p_value, n)


# ---- calibration and features -------------------------------------------------------------------


def calibration_error(logits, labels, bins=15):
    """Expected calibration error (Guo et al. 2017): Σ n_b/n · |accuracy_b - confidence_b|.

    logits (N,C), labels (N,); b runs over `bins` equal-width bins of confidence.
    Returns a fraction in [0, 1].
    """
    confidence, predicted = logits.softmax(1).max(1)
    bin_of = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, device=logits.device)
    gap.index_add_(0, bin_of, (predicted == labels).float() - confidence)
    return (gap.abs().sum() / len(labels)).item()


def class_means(embeddings, labels, classes):
    """L2-normalized means (C,D) of the L2-normalized rows (N,D) of each of `classes` classes."""
    one_hot = F.one_hot(labels, classes).to(embeddings)
    return F.normalize(one_hot.T @ F.normalize(embeddings, dim=1), dim=1)


def neighbours_for(labels, most=20, not_itself=False):
    """How many neighbours k-NN may ask: at most `most` and the smallest class's size.

    With more, a small class is outvoted however well it is separated. 0: k-NN is not possible.
    """
    counts = labels.bincount()
    smallest = int(counts[counts > 0].min())
    return min(most, smallest - not_itself)


def knn_predict(train_features, train_labels, features, k, not_itself=False):
    """Labels (N,) by majority of the k training features (M,D) of highest cosine to features (N,D).

    Ties go to the nearer neighbours.  not_itself: leaves out training feature i for feature i,
    where the two stand for the same image.  Raises ValueError for a k below 1.
    """
    if k < 1:  # as `neighbours_for` may say; without a vote all would be class 0
        raise ValueError(f"k-NN needs at least one neighbour, found k = {k}")
    train_features = F.normalize(train_features, dim=1)
    features = F.normalize(features, dim=1)
    classes = int(train_labels.max()) + 1
    result = []
    for start in range(0, len(features), 2048):
        similarity = features[start : start + 2048] @ train_features.T
        if not_itself:
            similarity[:, start : start + len(similarity)].fill_diagonal_(-2)
        near = similarity.topk(k)
        weight = 1 + 1e-3 * near.values.unsqueeze(2)  # so that ties go to the nearer ones
        votes = F.one_hot(train_labels[near.indices], classes) * weight
        result.append(votes.sum(1).argmax(1))
    return torch.cat(result)


def probe_predict(train_features, train_labels, features, l2=1e-3):
    """Labels (N,) by a linear probe: multinomial logistic regression on standardized features.

    train_features (M,D), train_labels (M,), features (N,D).  l2: penalty of the weights.
    """
    mean = train_features.mean(0)
    std = train_features.std(0) + 1e-6
    x = (train_features - mean) / std
    classes = int(train_labels.max()) + 1
    weight = torch.zeros(x.shape[1], classes, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight + bias, train_labels) + l2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return ((features - mean) / std @ weight + bias).argmax(1)


def silhouette(features, labels):
    """Mean silhouette width (Rousseeuw 1987) of features (N,D) under classes (N,), in [-1, 1].

    By Euclidean distance (k-NN goes by cosine).  nan where there is none: fewer than two classes,
    or every image a class of its own.
    """
    from sklearn.metrics import silhouette_score

    if not 1 < len(labels.unique()) < len(labels):
        return math.nan
    return float(silhouette_score(features.cpu().numpy(), labels.cpu().numpy()))
