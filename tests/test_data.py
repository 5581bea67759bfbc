"""Data and split: counts, purity, and what happens when the data is not there or not right."""

import hashlib
import http.server
import pickle
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import common


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


def test_balanced_batches_hold_every_class_equally_often():
    images, labels = torch.arange(60).view(60, 1, 1, 1), torch.arange(3).repeat(20)
    generator = torch.Generator().manual_seed(0)
    batches = list(common.balanced_batches(images, labels, 12, generator))
    assert len(batches) == common.balanced_steps(labels, 12) == 5
    for x, y in batches:
        assert y.bincount().tolist() == [4, 4, 4]
        assert torch.equal(x.flatten() % 3, y)
    places = torch.stack([y for _ in range(20) for _, y in common.balanced_batches(images, labels, 12, generator)])
    assert all(len(place.unique()) == 3 for place in places.T)  # what is done by place is done to every class
    assert len({int(i) for x, _ in batches for i in x.flatten()}) == 60  # the whole epoch, nothing twice


@pytest.mark.parametrize(("classes", "each", "batch_size", "size"), [
    (10, 100, 64, 60), (3, 20, 16, 15), (30, 10, 8, 60), (4, 3, 1000, 12)])
def test_balanced_batches_go_once_through_the_images_whatever_their_size(classes, each, batch_size, size):
    labels = torch.arange(classes).repeat(each)
    images = torch.arange(len(labels)).view(-1, 1, 1, 1)
    batches = list(common.balanced_batches(images, labels, batch_size, torch.Generator().manual_seed(0)))
    assert {len(y) for _, y in batches} == {size}
    assert len(batches) == common.balanced_steps(labels, batch_size)
    seen = torch.cat([x.flatten() for x, _ in batches]).tolist()
    assert len(set(seen)) == len(seen) > len(labels) - size


def write_tree(folder, classes=("ant", "bee"), n=3, size=(20, 24), mode="RGB"):
    for split in ("train", "test"):
        for k, c in enumerate(classes):
            (folder / split / c).mkdir(parents=True)
            for i in range(n):
                Image.new(mode, size, color=60 * k + i).save(folder / split / c / f"{i}.png")


def test_folder_reads_any_size_and_mode(tmp_path):
    write_tree(tmp_path, mode="L")
    data = common.load_data("folder", str(tmp_path), torch.device("cpu"))
    assert data.train_images.shape == (6, 3, 32, 32)
    assert data.train_images.dtype == torch.uint8
    assert data.classes == ("ant", "bee")
    assert data.test_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test_images[4].unique().tolist() == [61]


def test_folder_errors_name_the_file_or_folder(tmp_path):
    device = torch.device("cpu")
    with pytest.raises(common.RunError, match="train does not exist"):
        common.load_data("folder", str(tmp_path / "nowhere"), device)
    write_tree(tmp_path / "a")
    (tmp_path / "a/test/bee/1.png").write_bytes(b"")
    with pytest.raises(common.RunError, match="bee/1.png is not an image"):
        common.load_data("folder", str(tmp_path / "a"), device)
    write_tree(tmp_path / "b")
    (tmp_path / "b/test/wasp").mkdir()
    with pytest.raises(common.RunError, match="the same in train and test"):
        common.load_data("folder", str(tmp_path / "b"), device)
    write_tree(tmp_path / "c", n=1)
    (tmp_path / "c/train/ant/0.png").unlink()
    with pytest.raises(common.RunError, match="train/ant holds no image"):
        common.load_data("folder", str(tmp_path / "c"), device)


@pytest.fixture
def cifar_server(tmp_path, monkeypatch):
    """A local server with a small archive of CIFAR-10's form; torchvision's checksums are set to it."""
    from torchvision.datasets import CIFAR10

    tree = tmp_path / "made" / CIFAR10.base_folder
    tree.mkdir(parents=True)
    random = np.random.RandomState(0)

    def write(name, content):
        (tree / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((tree / name).read_bytes()).hexdigest()

    def batch(n):
        return {"data": random.randint(0, 256, (n, 3072), dtype=np.uint8), "labels": list(range(10)) * (n // 10)}

    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", write("data_batch_1", batch(50))]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", write("test_batch", batch(20))]])
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
    common.load_data.cache_clear()
    yield archive, Handler, server
    server.shutdown()
    common.load_data.cache_clear()


def load_cifar(folder):
    return common.load_data("cifar10", str(folder), torch.device("cpu"))


def test_cifar10_is_downloaded_then_found(tmp_path, cifar_server):
    data = load_cifar(tmp_path / "data")
    assert data.train_images.shape == (50, 3, 32, 32)
    assert data.test_labels.bincount().tolist() == [2] * 10
    cifar_server[2].shutdown()
    common.load_data.cache_clear()
    assert torch.equal(load_cifar(tmp_path / "data").test_images, data.test_images)  # no server needed


@pytest.mark.parametrize("fault", ["html", "cut", "refused"])
def test_cifar10_download_that_fails_leaves_nothing_in_the_way(tmp_path, cifar_server, fault, monkeypatch):
    from torchvision.datasets import CIFAR10

    archive, handler, _ = cifar_server
    good, url = archive.read_bytes(), CIFAR10.url
    if fault == "html":
        archive.write_bytes(b"<html>Please log in</html>")
    monkeypatch.setattr(handler, "cut", fault == "cut")
    if fault == "refused":
        monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:1/x.tar.gz")
    with pytest.raises(common.RunError, match="--dataset folder.*--dataset digits"):
        load_cifar(tmp_path / "data")
    assert not list((tmp_path / "data").glob("*.gz"))
    archive.write_bytes(good)
    monkeypatch.setattr(handler, "cut", False)
    monkeypatch.setattr(CIFAR10, "url", url)
    assert len(load_cifar(tmp_path / "data").train_images) == 50
