"""MNIST and CIFAR-10 from a folder, which may be read-only; pixels in 0..1.

Pixels stay bytes until the images are chosen.
"""

from __future__ import annotations

import gzip
import zipfile
import zlib
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_c2g.data.choose import Indices, relabel, split_files
from hpc_c2g.data.config import DataConfig
from hpc_c2g.data.dataset import Dataset, Split
from hpc_c2g.errors import UserError

Bytes = NDArray[np.uint8]

CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR_KEYS = ("train_images", "train_labels", "test_images", "test_labels")


def load_mnist(config: DataConfig) -> Split:
    """MNIST ``[1, 28, 28]`` from the four idx files in ``root/MNIST/raw``, each as it is or as ``.gz``.

    The train part comes from the train files, the held-out part from the test files.

    Raises:
        UserError: a file is missing or damaged, or sizes or classes that the data set does not have.
    """
    raw = Path(config.root).expanduser() / "MNIST" / "raw"
    parts = []
    for prefix in ("train", "t10k"):
        pixels = _read_idx(raw, f"{prefix}-images-idx3-ubyte", 3)
        labels = _read_idx(raw, f"{prefix}-labels-idx1-ubyte", 1)
        if len(pixels) != len(labels) or labels.max(initial=0) > 9:
            raise _damaged(
                raw / f"{prefix}-labels-idx1-ubyte",
                f"it has {len(labels)} labels up to {labels.max(initial=0)} for {len(pixels)} images of 10 classes",
            )
        parts.append((pixels[:, None], labels))
    return _image_split(parts[0], parts[1], [str(c) for c in range(10)], config)


def load_cifar10(config: DataConfig) -> Split:
    """CIFAR-10 ``[3, 32, 32]``, whole (as torchvision lays it out) or any subset of it in npz files.

    Looked for in this order: ``root/cifar-10-batches-py``, ``root/cifar10_subset.npz``, ``root/cifar10_subset/*.npz``
    (several files are joined in the order of their names). An npz holds ``train_images`` and ``test_images``
    (uint8 ``[n, 32, 32, 3]``), ``train_labels`` and ``test_labels`` (``[n]`` in 0..9).

    Raises:
        UserError: no such files, a damaged file, or sizes or classes that the data set does not have.
    """
    root = Path(config.root).expanduser()
    if (root / "cifar-10-batches-py").is_dir():
        train, test = _read_torchvision_cifar(root, train=True), _read_torchvision_cifar(root, train=False)
    else:
        single = root / "cifar10_subset.npz"
        files = [single] if single.is_file() else sorted((root / "cifar10_subset").glob("*.npz"))
        if not files:
            raise UserError(
                f"data.root={config.root!r} has neither cifar-10-batches-py nor cifar10_subset.npz nor "
                "cifar10_subset/*.npz",
                "unpack cifar-10-python.tar.gz in data.root, or set data.root to the folder that has one of these",
            )
        arrays = [_read_npz(file) for file in files]
        joined = {key: np.concatenate([part[key] for part in arrays]) for key in CIFAR_KEYS}
        train = joined["train_images"], joined["train_labels"]
        test = joined["test_images"], joined["test_labels"]
    channels_first = [(pixels.transpose(0, 3, 1, 2), labels) for pixels, labels in (train, test)]
    return _image_split(channels_first[0], channels_first[1], CIFAR_CLASSES, config)


def to_dataset(pixels: Bytes, labels: Indices, names: list[str]) -> Dataset:
    """Convert bytes ``[n, C, H, W]`` to pixels in 0..1."""
    samples = torch.from_numpy(np.ascontiguousarray(pixels)).float() / 255
    return Dataset(samples, torch.from_numpy(labels.astype(np.int64)), names, (0.0, 1.0))


def _image_split(
    train: tuple[Bytes, NDArray[np.integer]],
    test: tuple[Bytes, NDArray[np.integer]],
    names: list[str],
    config: DataConfig,
) -> Split:
    """Choose the parts from bytes ``[n, C, H, W]`` and labels ``[n]`` of both files."""
    train_labels, kept = relabel(train[1].astype(np.int64), names, config)
    test_labels, _ = relabel(test[1].astype(np.int64), names, config)
    chosen, held = split_files(train_labels, test_labels, kept, config)
    return Split(
        to_dataset(train[0][chosen], train_labels[chosen], kept), to_dataset(test[0][held], test_labels[held], kept)
    )


def _read_idx(folder: Path, name: str, dimensions: int) -> Bytes:
    """Read an idx file of bytes (4 bytes of magic number, the sizes as big-endian int32, the data), plain or gzipped."""
    plain, packed = folder / name, folder / f"{name}.gz"
    path = plain if plain.is_file() else packed
    if not path.is_file():
        raise UserError(
            f"data.root has no {name} and no {name}.gz in {folder}",
            "set data.root to the folder that has MNIST/raw with the four idx files of MNIST, plain or .gz",
        )
    try:
        content = gzip.decompress(path.read_bytes()) if path == packed else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, str(error)) from error
    header = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < header:
        raise _damaged(path, f"it does not start as an idx file of {dimensions}-dimensional bytes")
    shape = [int(size) for size in np.frombuffer(content, ">i4", dimensions, 4)]
    if min(shape) < 0 or len(content) != header + prod(shape):
        raise _damaged(path, f"its header promises {shape}, it has {len(content) - header} bytes of data")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_npz(path: Path) -> dict[str, NDArray[np.integer]]:
    try:
        # Pickled arrays could run any code, so they are refused.
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in CIFAR_KEYS if key in archive}
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise _damaged(path, str(error)) from error
    missing = [key for key in CIFAR_KEYS if key not in arrays]
    if missing:
        raise _damaged(path, f"it lacks {', '.join(missing)}")
    for part in ("train", "test"):
        pixels, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (32, 32, 3):
            raise _damaged(path, f"{part}_images is {pixels.dtype} {list(pixels.shape)}, not uint8 [n, 32, 32, 3]")
        if (
            labels.shape != pixels.shape[:1]
            or labels.dtype.kind not in "iu"
            or not ((labels >= 0) & (labels < 10)).all()
        ):
            raise _damaged(path, f"{part}_labels is not one class of 0..9 for each of the {len(pixels)} images")
    return arrays


def _read_torchvision_cifar(root: Path, train: bool) -> tuple[Bytes, NDArray[np.integer]]:
    """Read bytes ``[n, 32, 32, 3]`` and labels; torchvision checks the md5 sums before it unpickles."""
    # Imported here, so that every other data set loads without torchvision.
    from torchvision.datasets import CIFAR10

    try:
        part = CIFAR10(str(root), train=train, download=False)
    except RuntimeError as error:
        raise _damaged(root / "cifar-10-batches-py", str(error)) from error
    return part.data, np.asarray(part.targets)


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"data.root: {path} cannot be read: {why}", "replace it by an intact copy")
