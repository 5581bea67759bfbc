"""Data and split: counts, purity, and what happens when the data is not there or not right."""

import hashlib
import http.server
import pickle
import re
import shutil
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import common
import datasets
from arguments import RunError, UsageError

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image
from sklearn.datasets import load_digits

CPU = torch.device("cpu")


def test_split_has_exact_counts_and_loses_nothing():
    labels = torch.randint(0, 10, (50_000,), generator=torch.Generator().manual_seed(0))
    train, rest = common.stratified_split(labels, 0.2, seed=3)
    assert train.dtype == rest.dtype == torch.int64
    assert torch.equal(torch.cat([train, rest]).sort().values, torch.arange(50_000))
    assert torch.equal(train, train.sort().values)
    assert torch.equal(rest, rest.sort().values)
    for c in range(10):
        assert (labels[train] == c).sum() == round(0.2 * (labels == c).sum().item())


def test_split_is_a_pure_function_that_a_seed_changes():
    labels = np.repeat(np.arange(10), 5000)
    torch.manual_seed(1)
    first = common.stratified_split(labels, 0.2, 0)
    np.random.seed(5)
    again = common.stratified_split(torch.from_numpy(labels).to(torch.int32), 0.2, 0)
    other = common.stratified_split(labels, 0.2, 1)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    # The same on every platform: this digest must never change, or published splits are lost.
    assert hashlib.sha256(first[0].numpy().tobytes()).hexdigest()[:16] == "38c3cbebba6dbf84"


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_split_refuses_to_leave_a_class_empty(fraction):
    with pytest.raises(ValueError, match="must be at least 1"):
        common.stratified_split([0, 0, 0, 1, 1, 1], fraction)


def test_a_class_too_small_is_named_with_the_fractions_that_work():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 50)
    images = torch.zeros(103, 3, 4, 4, dtype=torch.uint8)
    data = common.Data("toy", ("ant", "bee", "cow"), images, labels, images, labels)
    for fraction in (0.1, 0.95):
        with pytest.raises(UsageError, match="class 'bee' has 3 training images") as error:
            common.split_data(data, fraction, 0)
        low, high = re.search(r"; ([0-9.]+) to ([0-9.]+) leave", str(error.value)).groups()
        for works in (float(low), float(high)):
            split = common.split_data(data, works, 0)
            assert (split.train_labels == 1).sum() + (split.eval_labels == 1).sum() == 3
            assert len(split.train_labels.unique()) == len(split.eval_labels.unique()) == 3
    alone = data._replace(train_labels=torch.tensor([0] * 51 + [1] + [2] * 51))
    with pytest.raises(UsageError, match="'bee' has 1 training images.*needs at least two"):
        common.split_data(alone, 0.2, 0)


@pytest.mark.parametrize("where", ["training", "test"])
def test_a_class_without_images_is_refused_before_it_is_trained_on(legible, where):
    """As where a student takes a class out of the images alone."""
    kept = legible.train_labels != 3
    if where == "training":
        data = legible._replace(train_images=legible.train_images[kept],
                                train_labels=legible.train_labels[kept])
    else:
        data = legible._replace(test_images=legible.test_images[kept],
                                test_labels=legible.test_labels[kept])
    said = rf"the {where} images have the labels \[0, 1, 2, 4\], but there are 5 classes"
    with pytest.raises(UsageError, match=said):
        common.split_data(data, 0.5, 0)


@pytest.fixture
def legible():
    """Data in random order; an image's red is its label, green and blue are its number."""
    labels = torch.arange(5).repeat(120)
    labels = labels[torch.randperm(600, generator=torch.Generator().manual_seed(0))]
    place = torch.arange(1200)
    images = torch.stack([labels.repeat(2), place % 256, place // 256], 1).to(torch.uint8)
    images = images.view(-1, 3, 1, 1).repeat(1, 1, 4, 4)
    return common.Data("toy", tuple("abcde"), images[:600], labels, images[600:], labels)


def test_every_image_keeps_its_label(legible):
    split = common.split_data(legible, 0.5, 2)
    train, rest = common.stratified_split(legible.train_labels, 0.5, 2)
    assert torch.equal(split.train_images, legible.train_images[train])
    assert torch.equal(split.eval_images, legible.train_images[rest])
    few = common.few_of(split)
    assert len(few.train_labels) > len(few.eval_labels) > 10
    for some in (split, few):
        assert (some.train_images[:, 0, 0, 0] == some.train_labels).all()
        assert (some.eval_images[:, 0, 0, 0] == some.eval_labels).all()


def test_data_that_differ_in_images_or_labels_are_other_splits(legible, monkeypatch):
    positions = torch.arange(0, 600, 2), torch.arange(1, 600, 2)  # whatever the labels
    monkeypatch.setattr(common, "stratified_split", lambda *_: positions)
    images, labels = legible.train_images, legible.train_labels
    alike = legible._replace(name="copy")
    other = [legible._replace(train_images=images + 1), legible._replace(test_images=images + 1),
             legible._replace(train_labels=4 - labels), legible._replace(test_labels=4 - labels)]
    hashes = [common.split_data(data, 0.5, 0).hash for data in (alike, legible, *other)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 5
    monkeypatch.setattr(common, "stratified_split", lambda *_: positions[::-1])
    assert common.split_data(legible, 0.5, 0).hash not in hashes


def test_evaluation_accuracy_is_of_the_evaluation_images(legible, monkeypatch):
    def reads(model, images, amp):
        return common.Prediction(torch.eye(5)[images[:, 0, 0, 0].long()], None)

    monkeypatch.setattr(common, "predict", reads)
    split = common.split_data(legible, 0.5, 0)
    split.train_labels.add_(1)  # all wrong
    assert common.evaluation_accuracy(None, split, None) == 1


# ---- batches ------------------------------------------------------------------------------------


def epochs_of(labels, batch_size, epochs=1, of=common.balanced_batches):
    """The batches of some epochs: (positions of the images, labels)."""
    places = torch.arange(len(labels)).view(-1, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(epochs):
        batches += of(places, labels, batch_size, generator)
    return [(x.flatten(), y) for x, y in batches]


def test_batches_are_shuffled_and_hold_no_image_twice():
    labels = torch.arange(4).repeat_interleave(10)
    batches = epochs_of(labels, 9, epochs=2, of=common.batches)
    assert len(batches) == 8
    for x, y in batches:
        assert torch.equal(labels[x], y)
        assert len(y.unique()) > 1  # not in the order of classes
    first, second = (torch.cat([x for x, _ in batches[i : i + 4]]) for i in (0, 4))
    assert len(first.unique()) == len(second.unique()) == 36
    assert not torch.equal(first, second)


@pytest.mark.parametrize("draw", [common.batches, common.balanced_batches])
def test_batches_are_those_of_their_generator(draw):
    labels = torch.arange(30).repeat(4)
    epochs = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # the global generator has no say
        epochs.append(torch.cat([x for x, _ in epochs_of(labels, 8, of=draw)]))
    assert torch.equal(*epochs)


def test_balanced_batches_hold_every_class_equally_often():
    labels = torch.arange(3).repeat(20)
    batches = epochs_of(labels, 12)
    assert len(batches) == common.balance(labels, 12).steps == 5
    for x, y in batches:
        assert y.bincount().tolist() == [4, 4, 4]
        assert torch.equal(labels[x], y)
    assert len(torch.cat([x for x, _ in batches]).unique()) == 60  # the whole epoch, nothing twice
    places = torch.stack([y for _, y in epochs_of(labels, 12, epochs=20)])
    assert all(len(place.unique()) == 3 for place in places.T)  # what is by place is of all classes
    assert all(len(y[:4].unique()) > 1 for _, y in batches)  # not class by class


@pytest.mark.parametrize(("classes", "each", "batch_size", "size"), [
    (10, 1000, 64, 60), (3, 20, 16, 15), (30, 10, 8, 8), (4, 3, 1000, 12), (200, 20, 64, 64),
    (600, 8, 64, 64), (3, 40, 4, 4), (5, 40, 8, 8), (100, 20, 64, 64)])
def test_balanced_batches_of_many_classes_hold_pairs_of_some(classes, each, batch_size, size):
    labels = torch.arange(classes).repeat(each)
    batches = epochs_of(labels, batch_size)
    assert {len(y) for _, y in batches} == {size}
    assert size <= batch_size
    assert len(batches) == common.balance(labels, batch_size).steps == len(labels) // size
    counts = []
    for _, y in batches:
        assert len(y.unique()) == common.balance(labels, batch_size).classes  # none twice
        assert y.unique(return_counts=True)[1].min() >= 2  # a pair of every class in it
        counts.append(y.bincount(minlength=classes))
    total = torch.stack(counts).sum(0)
    assert total.max() - total.min() <= max(2, batch_size // classes)  # one group of a class
    seen = torch.cat([x for x, _ in batches])
    assert len(seen.unique()) == len(seen)


def test_every_batch_is_of_other_images_and_other_classes():
    few = epochs_of(torch.arange(3).repeat(20), 12, epochs=2)
    met = {tuple(sorted(x[y == 0].tolist())) for x, y in few}
    assert len(met) == len(few) == 10
    many = epochs_of(torch.arange(30).repeat(20), 8)
    assert len({frozenset(y.tolist()) for _, y in many}) == len(many) == 75


def test_small_classes_take_their_images_again():
    labels = torch.tensor([0] * 40 + [1] * 3)
    batches = epochs_of(labels, 10)
    total = torch.stack([y.bincount() for _, y in batches]).sum(0)
    assert total.tolist() == [20, 20]
    times = torch.cat([x for x, _ in batches]).bincount()[40:]
    assert sorted(times.tolist()) == [6, 7, 7]


def test_the_learning_curve_knows_every_class():
    """Part 4 classifies by the means of these images; a class without one is never found."""
    labels = torch.arange(60).repeat_interleave(4)
    images = torch.zeros(240, 1, 1, 1, dtype=torch.uint8)
    few = common.few_of(common.Split(images, labels, images, labels, "abc"))
    assert few.train_labels.unique().tolist() == list(range(60))
    assert len(few.train_images) == len(few.train_labels) == 60


@pytest.mark.parametrize("n", [20, 33, 100, 500, 1000, 5000, 10_000, 50_000])
def test_watching_the_training_costs_at_most_a_tenth_of_an_epoch(n):
    images = torch.zeros(n, 1, 1, 1, dtype=torch.uint8)
    labels = torch.zeros(n, dtype=torch.long)
    few = common.few_of(common.Split(images, labels, images, labels, "abc"))
    passes = 2 * len(few.train_labels) + len(few.eval_labels)  # part 4's: twice, for its means
    assert 0 < len(few.eval_labels) <= 500
    assert passes <= max(10, 0.1 * 3 * n)  # an epoch is a forward pass and a backward, of two


# ---- files --------------------------------------------------------------------------------------


def test_test_images_that_are_trained_on_are_counted_and_said(monkeypatch, capsys):
    images = np.random.RandomState(0).randint(0, 256, (8, 4, 4, 3), np.uint8)
    test = np.concatenate([images[:3], images[:1], images[4:6] ^ 1])
    assert common.count_repeated(images, test) == 4
    labels = np.arange(8) % 2
    arrays = datasets.Data("toy", ("a", "b"), images, labels, test, labels[:6])
    monkeypatch.setattr(datasets, "digits", lambda: arrays)
    assert common.load_data("digits", "x", CPU).repeated == 4
    assert "warning: 4 of 6 test images are also in the training set" in capsys.readouterr().out
    monkeypatch.setattr(common, "QUICK_PER_CLASS", 1)
    assert common.load_data("digits", "x", CPU, quick=True).repeated == 2  # the first of each class
    assert "warning: 2 of 2 test images" in capsys.readouterr().out
    monkeypatch.setattr(datasets, "digits", lambda: arrays._replace(test_images=test ^ 3))
    assert common.load_data("digits", "x", CPU).repeated == 0
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["CIFAR10", "cifar-10", "data/cifar10", ""])
def test_a_name_of_no_data_set_is_not_answered_with_the_digits(name):
    with pytest.raises(UsageError, match=f"no data set is called '{name}'; expected one of cifar"):
        common.load_data(name, "x", CPU)


def test_digits_are_sklearns_at_twice_the_size():
    data = common.load_data("digits", "x", CPU)
    assert data.train_images.shape[1:] == data.test_images.shape[1:] == (3, 16, 16)
    images = torch.cat([data.train_images, data.test_images]).float()
    small = torch.nn.functional.avg_pool2d(images, 2).mean(1).flatten(1)
    bundled = load_digits()
    theirs = torch.from_numpy(bundled.data).float() * 255 / 16  # (1797,64)
    nearest = torch.cdist(small, theirs).argmin(1)
    assert len(nearest.unique()) == 1797
    assert (small.mean(1) - theirs[nearest].mean(1)).abs().max() < 3
    labels = torch.cat([data.train_labels, data.test_labels])
    assert labels.tolist() == bundled.target[nearest].tolist()
    tested = nearest[len(data.train_labels):]
    for c in range(10):  # every fifth
        of_class = np.flatnonzero(bundled.target == c)
        assert tested[data.test_labels == c].tolist() == of_class[::5].tolist()
    assert (images[..., ::2] != images[..., 1::2]).any()  # interpolated
    quick = common.load_data("digits", "x", CPU, quick=True)
    for half in ("train", "test"):
        labels, images = getattr(quick, f"{half}_labels"), getattr(quick, f"{half}_images")
        assert labels.bincount().tolist() == [10] * 10
        zeros = getattr(data, f"{half}_images")[getattr(data, f"{half}_labels") == 0]
        assert torch.equal(images[labels == 0], zeros[:10])


@pytest.fixture
def cifar_server(tmp_path, monkeypatch):
    """A local server with a small archive of CIFAR-10's form; torchvision expects its checksums."""
    from torchvision.datasets import CIFAR10

    tree = tmp_path / "made" / CIFAR10.base_folder
    tree.mkdir(parents=True)
    random = np.random.RandomState(0)

    def write(name, content):
        (tree / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((tree / name).read_bytes()).hexdigest()

    def batch(n):
        pixels = random.randint(0, 256, (n, 3072), dtype=np.uint8)
        return {"data": pixels, "labels": list(range(10)) * (n // 10)}

    for name, n in (("data_batch_1", 50), ("test_batch", 20)):
        of = "test_list" if name == "test_batch" else "train_list"
        monkeypatch.setattr(CIFAR10, of, [[name, write(name, batch(n))]])
    names = {"label_names": [f"class {c}" for c in range(10)]}
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names",
                                          "md5": write("batches.meta", names)})
    served = tmp_path / "served"
    served.mkdir()
    archive = served / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tree, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())

    class Handler(http.server.SimpleHTTPRequestHandler):
        cut = False

        def __init__(self, *args):
            super().__init__(*args, directory=served)

        def do_GET(self):  # noqa: N802
            if not self.cut:
                return super().do_GET()
            body = archive.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            return self.wfile.write(body[: len(body) // 2])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{CIFAR10.filename}")
    yield archive, Handler, server
    server.shutdown()


def load_cifar(folder):
    return common.load_data("cifar10", str(folder), CPU)


def test_cifar10_is_downloaded_then_found(tmp_path, cifar_server):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    data = load_cifar(folder)
    for name, images, labels in (("data_batch_1", data.train_images, data.train_labels),
                                 ("test_batch", data.test_images, data.test_labels)):
        raw = pickle.loads((folder / "cifar-10-batches-py" / name).read_bytes())
        assert np.array_equal(images, raw["data"].reshape(-1, 3, 32, 32))
        assert labels.tolist() == raw["labels"]
    cifar_server[2].shutdown()
    assert torch.equal(load_cifar(folder).test_images, data.test_images)  # no server needed
    (folder / "cifar-10-batches-py/test_batch").rename(tmp_path / "test_batch")
    with pytest.raises(RunError, match=f"remove {folder}/cifar-10-batches-py and put cifar-10-"):
        load_cifar(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["cifar-10-batches-py", "notes.txt"]
    assert (folder / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_an_archive_of_the_users_is_unpacked_once_and_stays(tmp_path, cifar_server, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(cifar_server[0], folder)
    cifar_server[2].shutdown()  # nothing is downloaded
    unpacked = []

    def extract(*args):
        unpacked.append(args)
        time.sleep(0.1)  # the other run comes
        honest(*args)

    honest = torchvision.datasets.utils.extract_archive
    monkeypatch.setattr(torchvision.datasets.utils, "extract_archive", extract)
    with ThreadPoolExecutor(2) as pool:
        assert [len(data.train_images) for data in pool.map(load_cifar, [folder] * 2)] == [50, 50]
    assert len(unpacked) == 1
    kept = folder / cifar_server[0].name
    assert kept.read_bytes() == cifar_server[0].read_bytes()


@pytest.mark.parametrize("share", [0, 0.5, 1.5])
def test_an_incomplete_archive_of_the_users_is_named_and_left_as_it_is(tmp_path, cifar_server,
                                                                       share):
    content = 2 * cifar_server[0].read_bytes()
    content = content[: int(share * len(content) / 2)]
    archive = tmp_path / "data" / cifar_server[0].name
    archive.parent.mkdir()
    archive.write_bytes(content)
    with pytest.raises(RunError, match=f"{re.escape(str(archive))} is incomplete or damaged"):
        load_cifar(archive.parent)
    assert archive.read_bytes() == content
    assert list(archive.parent.iterdir()) == [archive]


@pytest.mark.parametrize("fault", ["html", "cut", "refused"])
def test_a_download_that_fails_leaves_nothing_that_is_taken_for_the_data(tmp_path, cifar_server,
                                                                         fault, monkeypatch):
    from torchvision.datasets import CIFAR10

    archive, handler, _ = cifar_server
    good = archive.read_bytes()
    folder = tmp_path / "new" / "data"
    with monkeypatch.context() as broken:
        broken.setattr(handler, "cut", fault == "cut")
        if fault == "html":
            archive.write_bytes(b"<html>Please log in</html>")
        if fault == "refused":
            broken.setattr(CIFAR10, "url", "http://127.0.0.1:1/x.tar.gz")
        with pytest.raises(RunError, match="out: put cifar.*--dataset folder.*--dataset digits"):
            load_cifar(folder)
    assert not list(folder.iterdir())  # nor half an archive, hidden
    archive.write_bytes(good)
    assert len(load_cifar(folder).train_images) == 50
    assert [path.name for path in folder.iterdir()] == ["cifar-10-batches-py"]


def test_evaluation_images_that_are_trained_on_are_told(capsys):
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).repeat(1, 3, 4, 4)
    labels = torch.arange(40) % 2
    data = common.Data("toy", ("ant", "bee"), images, labels, images, labels)
    common.split_data(data, 0.5, 0)
    assert capsys.readouterr().out == ""
    twice = data._replace(train_images=images % 20)
    split = common.split_data(twice, 0.5, 0)
    known = {image.tobytes() for image in split.train_images.numpy()}
    expected = sum(image.tobytes() in known for image in split.eval_images.numpy())
    assert expected > 0
    assert f"warning: {expected} of 20 evaluation images" in capsys.readouterr().out


# ---- CIFAR-10-C ---------------------------------------------------------------------------------


def write_cifar10c(folder, labels):
    folder.mkdir(exist_ok=True)
    random = np.random.RandomState(0)
    pixels = random.randint(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
    np.save(folder / "labels.npy", labels)
    np.save(folder / "fog.npy", pixels)
    return folder


@pytest.mark.parametrize(("labels", "found"), [
    (np.full(10, 10), "from 10 to 10"), (np.arange(10) - 1, "from -1 to 8"),
    (np.full(10, 0.9), "float64"), (np.full(10, np.nan), "float64"), (np.full(10, 1j), "complex"),
    (np.zeros((10, 1), int), r"\(10, 1\)"), (np.zeros((10, 10), int), r"\(10, 10\)"),
    (np.zeros(0, int), r"\(0,\)"), (np.zeros(7, int), r"\(7,\)"),
    (np.zeros(10, "datetime64[D]"), "datetime64"), (np.zeros(10, "i4,i4"), r"\(10,\)")])
def test_labels_of_cifar10c_that_are_none_are_refused(tmp_path, labels, found):
    write_cifar10c(tmp_path / "c", labels)
    with pytest.raises(UsageError, match=f"labels.npy: .*{found}.*; expected"):
        datasets.cifar10c(tmp_path / "c", datasets.CIFAR10_CLASSES)


def test_what_is_no_npy_file_of_cifar10c_is_named_or_hidden(tmp_path):
    folder = write_cifar10c(tmp_path / "c", np.arange(10))
    (folder / "._fog.npy").write_bytes(b"macOS")
    assert len(list(datasets.cifar10c(folder, datasets.CIFAR10_CLASSES))) == 5
    np.savez(folder / "snow", images=np.zeros(3))
    (folder / "snow.npz").rename(folder / "snow.npy")
    np.save(folder / "zoom.npy", np.array(5))
    (folder / "rain.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr':(((((((")
    for name, found in (("rain.npy", "not CIFAR-10-C's files .rain.npy: "),
                        ("snow.npy", "files .snow.npy: the magic string is not correct"),
                        ("zoom.npy", "zoom.npy: int")):
        with pytest.raises(UsageError, match=found):
            datasets.cifar10c(folder, datasets.CIFAR10_CLASSES)
        (folder / name).unlink()
    pixels = np.load(folder / "fog.npy")
    np.save(folder / "fog.npy", pixels / 255)  # would be all but black
    with pytest.raises(UsageError, match="fog.npy: float64"):
        datasets.cifar10c(folder, datasets.CIFAR10_CLASSES)
    (folder / "fog.npy").unlink()
    with pytest.raises(UsageError, match="no corruption is beside it"):
        datasets.cifar10c(folder, datasets.CIFAR10_CLASSES)
    np.save(folder / "labels.npy", np.array(5))
    with pytest.raises(UsageError, match=r"labels.npy: int64 \(\)"):
        datasets.cifar10c(folder, datasets.CIFAR10_CLASSES)


def test_severities_of_cifar10c_stand_one_after_another(tmp_path):
    labels = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3], np.uint8)
    folder = write_cifar10c(tmp_path / "c", labels)
    pixels = np.load(folder / "fog.npy")
    np.save(folder / "dust.npy", 255 - pixels)
    both = list(datasets.cifar10c(folder, datasets.CIFAR10_CLASSES))
    dust, found = both[:5], both[5:]
    assert [one.name for one in both] == 5 * ["cifar10c dust"] + 5 * ["cifar10c fog"]
    assert np.array_equal(dust[4].images, 255 - found[4].images)
    assert [one.severity for one in found] == ["1", "2", "3", "4", "5"]
    for i in range(5):
        assert found[i].labels.dtype == np.int64
        assert found[i].labels.tolist() == labels[2 * i : 2 * i + 2].tolist()
        for channel in range(3):
            expected = pixels[2 * i : 2 * i + 2, :, :, channel]
            assert np.array_equal(found[i].images[:, channel], expected)


def test_only_cifar_10_is_called_its_jpeg_copy(tmp_path, monkeypatch):
    for classes, of, name in ((datasets.CIFAR10_CLASSES, "cifar10-jpg", datasets.JPEG_COPY),
                              (datasets.CIFAR10_CLASSES, "cifar10-png", "folder cifar10-png"),
                              (("apple", "pear"), "cifar10-jpg", "folder cifar10-jpg")):
        top = tmp_path / str(len(classes)) / of
        for half in ("train", "test"):
            for label in classes:
                (top / half / label).mkdir(parents=True)
                Image.new("RGB", (32, 32)).save(top / half / label / "0.png")
        assert datasets.folder(top).name == name
        monkeypatch.chdir(top)
        assert datasets.folder(".").name == name
