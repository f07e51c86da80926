"""The images of the demo: Fashion-MNIST where it can be had, small digits elsewhere."""

from __future__ import annotations

import gzip
import hashlib
import os
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
HOME = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion"
MD5 = {  # as published in the data set's README
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
MEAN, DEVIATION = 0.286, 0.353  # of the training images' pixels, which lie in [0, 1]
CLASSES = (
    *("T-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)


@dataclass(frozen=True)
class Split:
    """pixels [samples, side * side] normalised, labels [samples] int64."""

    pixels: Tensor
    labels: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Split:
        return Split(self.pixels[rows], self.labels[rows])

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Images:
    name: str
    classes: tuple[str, ...]
    side: int
    batch_size: int
    train: Split
    validation: Split
    test: Split


def load() -> Images:
    """Fashion-MNIST, else the digits; a printed sentence says which."""
    try:
        folder = locate()
    except (OSError, HTTPException, ValueError) as error:
        print(f"Data: Fashion-MNIST could not be had ({error}): scikit-learn's digits instead.")
        return digits()
    print(f"Data: Fashion-MNIST from {folder}.")
    return fashion_mnist(folder)


def locate() -> Path:
    """The folder of Fashion-MNIST's files: Debian's, else one that keeps a checked download.

    Raises:
        OSError, HTTPException, ValueError: they could not be had.
    """
    if all((DEBIAN / name).is_file() for name in MD5):
        return DEBIAN
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fashion-mnist"
    for name in MD5:
        download(name, cache)
    return cache


def download(name: str, cache: Path) -> None:
    target = cache / name
    if target.is_file() and md5(target.read_bytes()) == MD5[name]:
        return
    with urllib.request.urlopen(f"{HOME}/{name}", timeout=60) as response:
        content = response.read()
    if md5(content) != MD5[name]:
        raise ValueError(f"{name}: expected MD5 {MD5[name]}, got {md5(content)}")
    cache.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def fashion_mnist(folder: Path) -> Images:
    """The fixed 54000 / 6000 split of the 60000 training images, and the 10000 test images."""
    train = read_split(folder, "train")
    order = torch.randperm(60000, generator=torch.Generator().manual_seed(1234))
    validation, test = train[order[54000:]], read_split(folder, "t10k")
    return Images("Fashion-MNIST", CLASSES, 28, 256, train[order[:54000]], validation, test)


def read_split(folder: Path, split: str) -> Split:
    pixels = read_idx(folder / f"{split}-images-idx3-ubyte.gz", header=16).view(-1, 784)
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz", header=8)
    return Split((pixels.float() / 255 - MEAN) / DEVIATION, labels.long())


def read_idx(path: Path, header: int) -> Tensor:
    content = bytearray(gzip.decompress(path.read_bytes()))
    return torch.frombuffer(content, dtype=torch.uint8, offset=header)


def digits() -> Images:
    """1797 images of 8 x 8 pixels, embedded in scikit-learn: 1197 / 300 / 300."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1234))
    pixels = torch.from_numpy(pixels).float()[order]
    samples = Split((pixels / 16 - 0.305) / 0.376, torch.from_numpy(labels).long()[order])
    train, validation, test = samples[:1197], samples[1197:1497], samples[1497:]
    return Images("digits", tuple("0123456789"), 8, 16, train, validation, test)
