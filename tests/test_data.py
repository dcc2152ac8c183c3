import dataclasses
import hashlib
import os
import pickle
import shutil
import struct
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import data
from benchmarks.errors import UserError

FILES = {"train": "train", "test": "t10k"}


def _made(part: str, shape: tuple[int, ...] = (28, 28)) -> data.Arrays:
    rng = np.random.default_rng(len(part))
    count = {"train": 12, "test": 6}[part]
    images = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    return images, rng.integers(0, 10, count, dtype=np.uint8)


def _write_idx(folder: Path, part: str) -> None:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    x, y = _made(part)
    stem = FILES[part]
    header = struct.pack(">IIII", 2051, *x.shape)
    (raw / f"{stem}-images-idx3-ubyte").write_bytes(header + x.tobytes())
    (raw / f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(y)) + y.tobytes())


def _no_network(_folder: Path) -> None:
    raise OSError("no network")


def _replace(monkeypatch: pytest.MonkeyPatch, name: str, shape: tuple[int, ...]) -> None:
    """Let the made images pass for the data set `name`, and let nothing be downloaded."""
    source = dataclasses.replace(
        data._SOURCES[name],
        fingerprints={part: data.fingerprint(*_made(part, shape)) for part in FILES},
        download=_no_network,
    )
    monkeypatch.setitem(data._SOURCES, name, source)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a made MNIST of 12 and 6 images in torchvision's files."""
    _replace(monkeypatch, "mnist", (28, 28))
    for part in FILES:
        _write_idx(tmp_path, part)
    return tmp_path


def test_fingerprint_is_the_sum_of_the_images_hashes_whatever_their_order():
    x, y = _made("train")
    expected = sum(
        int.from_bytes(hashlib.sha256(image.tobytes() + bytes([label])).digest(), "big")
        for image, label in zip(x, y.tolist(), strict=True)
    )
    assert data.fingerprint(x, y) == f"{expected % 2**256:064x}"
    order = np.random.default_rng(0).permutation(len(x))
    assert data.fingerprint(x[order], y[order]) == data.fingerprint(x, y)
    assert data.fingerprint(x, y[order]) != data.fingerprint(x, y)


def test_mnist_from_torchvisions_files_then_from_the_cache(folder: Path):
    first = data.load("mnist", folder)
    x, y = _made("train")
    assert first.train_x.dtype == torch.uint8
    assert first.train_y.dtype == torch.int64
    assert torch.equal(first.train_x, torch.from_numpy(x))
    assert first.train_y.tolist() == y.tolist()
    assert first.test_x is not None
    assert len(first.test_x) == 6

    for file in (folder / "MNIST" / "raw").iterdir():
        file.unlink()
    again = data.load("mnist", folder)
    assert torch.equal(again.train_x, first.train_x)
    assert again.fingerprint == first.fingerprint


def test_without_test_data_no_file_of_theirs_is_opened(folder: Path):
    known = data.load("mnist", folder)
    garbage = [*(folder / "MNIST" / "raw").glob("t10k-*"), folder / "tensors" / "mnist-test.npz"]
    assert len(garbage) == 3
    for file in garbage:
        file.write_bytes(b"garbage")
    images = data.load("mnist", folder, test=False)
    assert images.test_x is None
    assert images.test_y is None
    assert images.fingerprint == known.fingerprint
    with (
        pytest.warns(UserWarning, match="mnist-test"),
        pytest.raises(UserError, match="test data of mnist"),
    ):
        data.load("mnist", folder)


@pytest.mark.parametrize("damage", ["cut", "flip", "garbage"])
def test_a_damaged_cache_is_named_and_rebuilt(folder: Path, damage: str):
    whole = data.load("mnist", folder)
    cache = folder / "tensors" / "mnist-train.npz"
    content = bytearray(cache.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flip":
        content[len(content) // 2] ^= 1
    else:
        content = bytearray(b"garbage")
    cache.write_bytes(content)
    with pytest.warns(UserWarning, match="mnist-train.npz"):
        rebuilt = data.load("mnist", folder)
    assert torch.equal(rebuilt.train_x, whole.train_x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.load("mnist", folder)


def test_a_well_formed_cache_with_other_numbers_is_not_used(folder: Path):
    whole = data.load("mnist", folder)
    cache = folder / "tensors" / "mnist-train.npz"
    with np.load(cache) as file:
        arrays = dict(file)
    arrays["images"][0, 0, 0] ^= 1
    np.savez(cache, **arrays)
    with pytest.warns(UserWarning, match="damaged"):
        assert torch.equal(data.load("mnist", folder).train_x, whole.train_x)


def test_a_cache_of_another_data_set_is_not_used(folder: Path):
    whole = data.load("mnist", folder)
    (folder / "tensors" / "mnist-test.npz").replace(folder / "tensors" / "mnist-train.npz")
    with pytest.warns(UserWarning, match="damaged"):
        assert torch.equal(data.load("mnist", folder).train_x, whole.train_x)


def test_files_with_other_images_are_refused(folder: Path):
    images = folder / "MNIST" / "raw" / "train-images-idx3-ubyte"
    content = bytearray(images.read_bytes())
    content[-1] ^= 1
    images.write_bytes(content)
    with pytest.raises(UserError, match="fingerprint") as error:
        data.load("mnist", folder)
    assert str(folder) in str(error.value)
    assert not (folder / "tensors" / "mnist-train.npz").exists()


def test_a_damaged_source_file_is_named(folder: Path):
    (folder / "MNIST" / "raw" / "train-labels-idx1-ubyte").write_bytes(b"\0\0")
    with pytest.raises(UserError, match="cannot be read") as error:
        data.load("mnist", folder)
    assert "MNIST/raw" in str(error.value)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_a_missing_data_set_ends_in_one_message(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _replace(monkeypatch, name, (28, 28))
    with pytest.raises(UserError) as error:
        data.load(name, tmp_path)
    message = str(error.value)
    for part in (name, str(tmp_path), "nox -s prepare", "--data-dir", "CLNP_DATA", "no network"):
        assert part in message
    assert "\n" not in message


def test_prepare_without_download_does_not_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _replace(monkeypatch, "mnist", (28, 28))
    with pytest.raises(UserError, match="nox -s prepare") as error:
        data.prepare(["mnist"], tmp_path, download=False)
    assert "no network" not in str(error.value)


def test_prepare_downloads_and_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    _replace(monkeypatch, "mnist", (28, 28))

    def download(folder: Path) -> None:
        for part in FILES:
            _write_idx(folder, part)

    source = dataclasses.replace(data._SOURCES["mnist"], download=download)
    monkeypatch.setitem(data._SOURCES, "mnist", source)
    data.prepare(["mnist", "digits"], tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new" / "tensors").iterdir()) == [
        "mnist-test.npz",
        "mnist-train.npz",
    ]
    assert "mnist: ready" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_still_works(folder: Path, monkeypatch: pytest.MonkeyPatch):
    # Not by permissions: root, as in many containers, may write everywhere.
    (folder / "tensors").write_text("a file where the cache would go")
    with pytest.warns(UserWarning, match="cannot be written") as caught:
        images = data.load("mnist", folder)
    assert len(caught) == 2
    assert len(images.train_x) == 12

    (folder / "tensors").unlink()

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(UserWarning, match="disk full"):
        data.load("mnist", folder)
    assert list((folder / "tensors").iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows knows no folder that is read-only")
def test_a_folder_without_write_permission_still_works(folder: Path):
    with tempfile.TemporaryDirectory() as name:
        closed = Path(name) / "data"
        shutil.copytree(folder, closed)
        data.load("mnist", folder)  # imports what it needs, while that can still be read
        Path(name).chmod(0o755)
        closed.chmod(0o555)
        root = os.geteuid() == 0
        if root:  # who may write anywhere: be nobody for a while
            os.seteuid(65534)
        try:
            with pytest.warns(UserWarning, match="cannot be written"):
                assert len(data.load("mnist", closed).train_x) == 12
        finally:
            if root:
                os.seteuid(0)
            closed.chmod(0o755)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_from_npz(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _replace(monkeypatch, name, (32, 32, 3))
    (x, y), (test_x, test_y) = _made("train", (32, 32, 3)), _made("test", (32, 32, 3))
    np.savez(
        tmp_path / f"{name}.npz",
        train_images=x,
        train_labels=y,
        test_images=test_x,
        test_labels=test_y,
    )
    images = data.load(name, tmp_path)
    assert images.train_x.shape == (12, 3, 32, 32)
    assert torch.equal(images.train_x[3, 2], torch.from_numpy(x[3, :, :, 2].copy()))
    assert images.train_y.tolist() == y.tolist()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_from_torchvisions_folder_opens_only_the_part_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import torchvision

    _replace(monkeypatch, name, (32, 32, 3))
    base = getattr(torchvision.datasets, name.upper())
    (tmp_path / base.base_folder).mkdir()

    def write(file: str, content: dict[str, object]) -> tuple[str, str]:
        path = tmp_path / base.base_folder / file
        path.write_bytes(pickle.dumps(content))
        return file, hashlib.md5(path.read_bytes()).hexdigest()

    x, y = _made("train", (32, 32, 3))
    batch = {
        "data": x.transpose(0, 3, 1, 2).reshape(len(x), -1),
        "labels" if name == "cifar10" else "fine_labels": y.tolist(),
    }
    classes, md5 = write(base.meta["filename"], {base.meta["key"]: [str(i) for i in range(10)]})
    monkeypatch.setattr(base, "meta", {**base.meta, "filename": classes, "md5": md5})
    monkeypatch.setattr(base, "train_list", [write("train", batch)])
    (tmp_path / base.base_folder / base.test_list[0][0]).write_bytes(b"garbage")

    images = data.load(name, tmp_path, test=False)
    assert images.train_x.shape == (12, 3, 32, 32)
    assert torch.equal(images.train_x[3, 2], torch.from_numpy(x[3, :, :, 2].copy()))
    with pytest.raises(UserError, match=f"test data of {name}"):
        data.load(name, tmp_path)


def test_digits_are_split_by_class_and_always_alike():
    images = data.load("digits")
    assert images.test_x is not None
    assert images.test_y is not None
    assert (len(images.train_x), len(images.test_x)) == (1437, 360)
    assert images.train_x.max() == images.scale == 16
    shares = torch.bincount(images.test_y) / torch.bincount(images.train_y)
    assert (shares - 360 / 1437).abs().max() < 0.01
    again = data.load("digits", test=False)
    assert torch.equal(again.train_x, images.train_x)
    assert again.test_x is None
    assert again.fingerprint == images.fingerprint


def test_unknown_data_set_lists_the_known_ones():
    with pytest.raises(UserError, match="mnist, cifar10, cifar100, digits"):
        data.load("mnits")
    with pytest.raises(UserError, match="mnits"):
        data.prepare(["mnits"])


def test_the_data_folder_is_the_option_else_the_environment_else_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CLNP_DATA", str(tmp_path / "env"))
    assert data.resolve_data_dir(tmp_path / "option") == tmp_path / "option"
    assert data.resolve_data_dir(None) == tmp_path / "env"
    monkeypatch.delenv("CLNP_DATA")
    assert data.resolve_data_dir(None) == Path("data")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        data.resolve_data_dir(tmp_path / "file")
