"""CelebA from a folder of aligned faces and the official attribute list, both whole and in part.

torchvision's reader insists on the md5 sums of five lists; this reader needs a single list, and also reads
torchvision's layout.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpc_c2g.data.choose import Indices, relabel, split_files
from hpc_c2g.data.config import DataConfig
from hpc_c2g.data.dataset import Split
from hpc_c2g.data.images import to_dataset
from hpc_c2g.errors import UserError

ATTRIBUTES = "list_attr_celeba.txt"
IMAGES = "img_align_celeba"
MOST_HELD_OUT = 1000


def load_celeba(config: DataConfig) -> Split:
    """Faces ``[3, image_size, image_size]``, pixels in 0..1; class 1 has ``config.attribute``, class 0 has not.

    The train part comes from the first four fifths of the list, the held-out part (at most 1000 images unless
    ``held_out_size`` is set) from the last fifth. Only the chosen images are decoded: cropped to the square in
    their middle, then resized.

    Raises:
        UserError: a file is missing or damaged, the attribute is unknown, or sizes that the data set does not have.
    """
    folder = _find(config)
    files, has = _read_attribute(folder / ATTRIBUTES, config.attribute)
    labels, names = relabel(has, [f"not {config.attribute}", config.attribute], config)
    border = len(labels) - len(labels) // 5
    train, held = split_files(labels[:border], labels[border:], names, config, MOST_HELD_OUT)
    parts = []
    for indices in (train, held + border):
        pixels = np.stack([_read_face(folder / IMAGES / files[i], config.image_size) for i in indices])
        parts.append(to_dataset(pixels.transpose(0, 3, 1, 2), labels[indices], names))
    return Split(*parts)


def _find(config: DataConfig) -> Path:
    root = Path(config.root).expanduser()
    for folder in (root / "celeba", root):
        if (folder / ATTRIBUTES).is_file() and (folder / IMAGES).is_dir():
            return folder
    raise UserError(
        f"data.root={config.root!r} has no CelebA",
        f"set data.root to the folder that has {IMAGES}/*.jpg and {ATTRIBUTES}, itself or in its folder celeba",
    )


def _read_attribute(path: Path, attribute: str) -> tuple[list[str], Indices]:
    """File names and 0 or 1 for each; official format: count, names, then ``000001.jpg -1 1 ...`` per image."""
    count, header, *lines = [*path.read_text(encoding="utf-8", errors="replace").splitlines(), "", ""]
    names = header.split()
    if attribute not in names:
        raise UserError(f"data.attribute={attribute!r} is not in {path}", f"choose one of {', '.join(names)}")
    column = 1 + names.index(attribute)
    files, has = [], []
    for number, line in enumerate(lines, start=3):
        if not line.strip():
            continue
        entries = line.split()
        if len(entries) != 1 + len(names) or entries[column] not in ("1", "-1"):
            raise UserError(
                f"data.root: {path}, line {number} is not a file name and {len(names)} entries of 1 or -1",
                f"restore the official {ATTRIBUTES}, or cut whole lines from it",
            )
        files.append(entries[0])
        has.append(int(entries[column] == "1"))
    if count.strip() != str(len(files)):
        raise UserError(
            f"data.root: {path} promises {count.strip()!r} images in line 1 and lists {len(files)}",
            "restore the file, or correct line 1",
        )
    return files, np.asarray(has, dtype=np.int64)


def _read_face(path: Path, size: int) -> NDArray[np.uint8]:
    """Bytes ``[size, size, 3]``."""
    try:
        with Image.open(path) as image:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.convert("RGB").crop((left, top, left + side, top + side))
    except OSError as error:
        raise UserError(
            f"data.root: the image {path} cannot be read: {error}",
            f"restore it, or cut its line from {ATTRIBUTES} (and correct the count in line 1)",
        ) from error
    return np.asarray(square.resize((size, size), Image.Resampling.BILINEAR))
