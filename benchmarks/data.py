"""Data sets as uint8 tensors: where they come from, how they are checked and cached.

Sources, in this order: the cache of tensors in the data folder, torchvision's files there,
torchvision's download. What enters the cache has been compared once with the known fingerprint of
the data set; the cache itself carries a checksum. Training and test data are cached in files of
their own, so that a run without test data never opens them.

CIFAR may also lie in the data folder as cifar10.npz or cifar100.npz, with the uint8 arrays
train_images (N, 32, 32, 3), train_labels (N,), test_images and test_labels, images in any order.
"""

import hashlib
import os
import socket
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.errors import UserError

Part = Literal["train", "test"]
Arrays = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""Images (N, H, W) or (N, H, W, C) and labels (N,)."""

DOWNLOAD_TIMEOUT = 20.0
"""Seconds without an answer after which a download is given up."""


@dataclass(frozen=True)
class Images:
    """A data set in memory.

    Attributes
    ----------
    name
        As given to `load`.
    train_x, train_y
        (N, H, W), or (N, C, H, W) in channels-last memory, uint8, and (N,) int64.
    test_x, test_y
        Likewise; None if loaded with test=False.
    fingerprint
        64 hex digits that name the content, training and test data, whatever the order of the
        images and whether or not the test data were loaded.
    classes
        Number of classes.
    scale
        The pixel value that means 1.0.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor | None
    test_y: Tensor | None
    fingerprint: str
    classes: int
    scale: float = 255.0


def fingerprint(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> str:
    """Hash of a set of labelled images, whatever their order.

    Parameters
    ----------
    images
        (N, ...) uint8.
    labels
        (N,) uint8.

    Returns
    -------
    str
        64 hex digits: the sum modulo 2**256 of the SHA-256 of each image's bytes, then its label.
    """
    digests = (
        hashlib.sha256(image.tobytes() + label.tobytes()).digest()
        for image, label in zip(images, labels.astype(np.uint8), strict=True)
    )
    return f"{sum(int.from_bytes(d, 'big') for d in digests) % 2**256:064x}"


class MissingData(UserError):
    """A data set is not there."""


def resolve_data_dir(data_dir: Path | None = None) -> Path:
    """Return the data folder: the one given, else the environment's CLNP_DATA, else ./data.

    Raises
    ------
    UserError
        The path is a file.
    """
    folder = Path(data_dir or os.environ.get("CLNP_DATA") or "data").expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"the data folder {folder} is a file: name a folder with --data-dir")
    return folder


def load(
    name: str,
    data_dir: Path | None = None,
    device: str | torch.device = "cpu",
    test: bool = True,
) -> Images:
    """Load a data set, downloading it if the data folder has none of its files.

    Parameters
    ----------
    name
        "mnist", "cifar10", "cifar100", or "digits" (ships inside scikit-learn; needs no folder).
        Several, as "cifar10+cifar100": one after another, labels counted on.
    data_dir
        See `resolve_data_dir`.
    device
        Where the tensors go.
    test
        False: no file with test data is opened.

    Raises
    ------
    UserError
        Unknown name; data neither there nor to be downloaded, or damaged: the message names the
        folder, the files and the remedy.
    """
    if "+" in name:
        return join([load(part, data_dir, device, test) for part in name.split("+")])
    if name == "digits":
        return _digits(device, test)
    source = _source(name)
    folder = resolve_data_dir(data_dir)
    train_x, train_y = _tensors(_part(source, folder, "train", download=True), device)
    test_x, test_y = (
        _tensors(_part(source, folder, "test", download=True), device) if test else (None, None)
    )
    content = _joint(source.fingerprints.values())
    return Images(name, train_x, train_y, test_x, test_y, content, source.classes)


def join(parts: Sequence[Images]) -> Images:
    """Put data sets one after another.

    Parameters
    ----------
    parts
        With images of one size and scale; all with test data or none.

    Returns
    -------
    Images
        The labels of each part follow those of the parts before it.
    """
    starts = [sum(part.classes for part in parts[:i]) for i in range(len(parts))]

    def labels(values: Iterable[Tensor]) -> Tensor:
        return torch.cat([y + start for y, start in zip(values, starts, strict=True)])

    test = [(p.test_x, p.test_y) for p in parts if p.test_x is not None and p.test_y is not None]
    return Images(
        "+".join(part.name for part in parts),
        torch.cat([part.train_x for part in parts]),
        labels(part.train_y for part in parts),
        torch.cat([x for x, _ in test]) if test else None,
        labels(y for _, y in test) if test else None,
        _joint(part.fingerprint for part in parts),
        sum(part.classes for part in parts),
        parts[0].scale,
    )


def prepare(names: Iterable[str], data_dir: Path | None = None, download: bool = True) -> None:
    """Fetch, check and cache data sets, with a line of output for each.

    Raises
    ------
    UserError
        As `load`.
    """
    for name in names:
        if name == "digits":
            print("digits: ships inside scikit-learn, nothing to do")
            continue
        source, folder = _source(name), resolve_data_dir(data_dir)
        for part in source.fingerprints:
            _part(source, folder, part, download)
        print(f"{name}: ready in {folder}")


def check(name: str, data_dir: Path | None = None) -> None:
    """Make sure that a data set is in the data folder and is the original one.

    Raises
    ------
    MissingData
        It is not there.
    UserError
        Unknown name; damaged files.
    """
    if name != "digits":
        source, folder = _source(name), resolve_data_dir(data_dir)
        for part in source.fingerprints:
            _part(source, folder, part, download=False)


def content(name: str) -> str:
    """Return the fingerprint that `load` gives a data set, without looking at the data.

    Raises
    ------
    UserError
        Unknown name.
    """
    if "+" in name:
        return _joint(content(part) for part in name.split("+"))
    if name == "digits":
        return _digits("cpu", test=False).fingerprint
    return _joint(_source(name).fingerprints.values())


# --- one part of one data set: cache, files, download ---------------------------------------------


@dataclass(frozen=True)
class _Source:
    """How to find a data set outside the cache."""

    name: str
    classes: int
    files: str
    fingerprints: dict[Part, str]
    read: Callable[[Path, Part], Arrays | None]
    """The part from files in the folder; None if they are not there."""
    download: Callable[[Path], None]


def _source(name: str) -> _Source:
    if name not in _SOURCES:
        raise UserError(
            f"unknown data set {name!r}: choose one of {', '.join([*_SOURCES, 'digits'])}"
        )
    return _SOURCES[name]


def _part(source: _Source, folder: Path, part: Part, download: bool) -> Arrays:
    cache = folder / "tensors" / f"{source.name}-{part}.npz"
    cached = _read_cache(cache, source.fingerprints[part])
    if cached is not None:
        return cached
    arrays = _read(source, folder, part)
    if arrays is None and download:
        _download(source, folder)
        arrays = _read(source, folder, part)
    if arrays is None:
        raise _missing(source, folder, "")
    found, expected = fingerprint(*arrays), source.fingerprints[part]
    if found != expected:
        raise UserError(
            f"the {part} images of {source.name} in {folder} are not the original ones: their "
            f"fingerprint is {found}, it should be {expected}. Delete {source.files} there and run "
            f"`nox -s prepare`."
        )
    _write_cache(cache, arrays, found)
    return arrays


def _read(source: _Source, folder: Path, part: Part) -> Arrays | None:
    try:
        arrays = source.read(folder, part)
        if arrays is not None:
            _check_arrays(*arrays)
        return arrays
    except Exception as error:  # whatever a parser makes of a damaged file
        raise UserError(
            f"the {part} data of {source.name} in {folder} cannot be read ({error}). Delete "
            f"{source.files} there and run `nox -s prepare`."
        ) from error


def _check_arrays(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> None:
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(f"images are {images.dtype} of the shape {images.shape}, not pixels")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{len(images)} images have labels of the shape {labels.shape}")


def _missing(source: _Source, folder: Path, reason: str) -> MissingData:
    return MissingData(
        f"{source.name} is not in {folder} (looked for {source.files}){reason}. Run "
        f"`nox -s prepare` on a machine with network access, or name the folder that has these "
        f"files with --data-dir or CLNP_DATA."
    )


def _download(source: _Source, folder: Path) -> None:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        source.download(folder)
    except (OSError, RuntimeError, HTTPException) as error:
        raise _missing(source, folder, f" and the download failed: {error}") from error
    finally:
        socket.setdefaulttimeout(before)


# --- the cache ------------------------------------------------------------------------------------


def _checksum(images: NDArray[np.uint8], labels: NDArray[np.uint8], content: str) -> str:
    digest = hashlib.sha256(f"{images.shape} {labels.shape} {content}".encode())
    digest.update(images.data)
    digest.update(labels.data)
    return digest.hexdigest()


def _read_cache(path: Path, expected: str) -> Arrays | None:
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as cache:
            images, labels = cache["images"], cache["labels"]
            content, checksum = str(cache["fingerprint"]), str(cache["checksum"])
        if content == expected and checksum == _checksum(images, labels, content):
            return images, labels
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    warnings.warn(f"the cached data in {path} are damaged; building them anew", stacklevel=2)
    return None


def _write_cache(path: Path, arrays: Arrays, content: str) -> None:
    images, labels = arrays
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(
                file,
                images=images,
                labels=labels,
                fingerprint=np.array(content),
                checksum=np.array(_checksum(images, labels, content)),
            )
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        warnings.warn(
            f"no cache of the data: {path} cannot be written ({error}); loading goes on without it",
            stacklevel=2,
        )


# --- the sources ----------------------------------------------------------------------------------


def _tensors(arrays: Arrays, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """Images (N, H, W) or (N, C, H, W), labels (N,)."""
    x, y = torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1].astype(np.int64))
    if x.ndim == 4:
        # The channels stay next to each other in memory: that is what convolutions like best.
        x = x.permute(0, 3, 1, 2)
    return x.to(device), y.to(device)


def _joint(parts: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _digits(device: str | torch.device, test: bool) -> Images:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    x, x_test, y, y_test = train_test_split(
        bunch.images.astype(np.uint8),
        bunch.target.astype(np.uint8),
        test_size=360,
        random_state=0,
        stratify=bunch.target,
    )
    train_x, train_y = _tensors((x, y), device)
    test_x, test_y = _tensors((x_test, y_test), device) if test else (None, None)
    content = _joint([fingerprint(x, y), fingerprint(x_test, y_test)])
    return Images("digits", train_x, train_y, test_x, test_y, content, classes=10, scale=16.0)


def _read_mnist(folder: Path, part: Part) -> Arrays | None:
    from torchvision.datasets.mnist import read_image_file, read_label_file

    stem = {"train": "train", "test": "t10k"}[part]
    images = folder / "MNIST" / "raw" / f"{stem}-images-idx3-ubyte"
    labels = folder / "MNIST" / "raw" / f"{stem}-labels-idx1-ubyte"
    if not (images.exists() and labels.exists()):
        return None
    return read_image_file(str(images)).numpy(), read_label_file(str(labels)).numpy().astype(
        np.uint8
    )


def _download_mnist(folder: Path) -> None:
    from torchvision.datasets import MNIST

    MNIST(str(folder), download=True)


def _cifar_reader(name: str) -> Callable[[Path, Part], Arrays | None]:
    def read(folder: Path, part: Part) -> Arrays | None:
        from torchvision.datasets import CIFAR10, CIFAR100

        packed = folder / f"{name}.npz"
        if packed.exists():
            with np.load(packed, allow_pickle=False) as file:
                images, labels = file[f"{part}_images"], file[f"{part}_labels"]
        else:
            base = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
            if not (folder / base.base_folder).is_dir():
                return None
            # torchvision checks the MD5 of the files in both lists: leave the other part closed.
            other = "test_list" if part == "train" else "train_list"
            alone = type(base.__name__, (base,), {other: []})
            data = alone(str(folder), train=part == "train")
            images, labels = data.data, np.array(data.targets, dtype=np.uint8)
        return np.ascontiguousarray(images), labels

    return read


def _cifar_downloader(name: str) -> Callable[[Path], None]:
    def download(folder: Path) -> None:
        from torchvision.datasets import CIFAR10, CIFAR100

        {"cifar10": CIFAR10, "cifar100": CIFAR100}[name](str(folder), download=True)

    return download


# Of images (N, H, W) or (N, H, W, C), as computed from the original files.
_SOURCES = {
    "mnist": _Source(
        "mnist",
        10,
        "MNIST/raw/*-ubyte",
        {
            "train": "3bafe639115ada3a4f6ea1b0e57c9dbb1f0c9a3254eec392fcafb4623efa5f5c",
            "test": "09035d9cd0383aa0d10d2029dce798b0baeb785bdcc429c7b578d760f7b08da1",
        },
        _read_mnist,
        _download_mnist,
    ),
    "cifar10": _Source(
        "cifar10",
        10,
        "cifar10.npz or cifar-10-batches-py",
        {
            "train": "55c8a3bce23874fd5871719a30be30ce1b1f86e2f74afbc9cc19d1252b74adde",
            "test": "7d79e752791e1a3f8555c99847bcbd1210edb70997e4519cd59bb1741e4f6ee7",
        },
        _cifar_reader("cifar10"),
        _cifar_downloader("cifar10"),
    ),
    "cifar100": _Source(
        "cifar100",
        100,
        "cifar100.npz or cifar-100-python",
        {
            "train": "efa2ffd1e492bc12b53c1302221f5aaf15fb60ad7bb8d66ee7c5dac516f16ea6",
            "test": "9ff320adba2eff784a925ee14cedcb3c9e794b65fe14bfc161f01ed591fea59e",
        },
        _cifar_reader("cifar100"),
        _cifar_downloader("cifar100"),
    ),
}
