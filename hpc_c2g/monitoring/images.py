"""Image grids as PNG files and arrays."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from hpc_c2g.files import write_atomically

SIDE = 2048
"""Largest side, in pixels, of a picture that is logged or kept, so that a browser can show a page of them."""


def drawable(shape: tuple[int, ...]) -> bool:
    """Return True if samples of ``shape`` are gray or color images."""
    return len(shape) == 3 and shape[0] in (1, 3)


def bounded(images: Tensor, columns: int) -> tuple[Tensor, int]:
    """Return as many rows and columns of a grid, from its first on, as a picture of ``SIDE`` pixels holds; larger images are thinned."""
    h, w = images.shape[-2:]
    coarse = max(1, -(-max(h, w) // SIDE))
    images = images[..., ::coarse, ::coarse]
    h, w = images.shape[-2:]
    rows, kept = min(-(-len(images) // columns), max(1, SIDE // (h + 1))), min(columns, max(1, SIDE // (w + 1)))
    return torch.cat([images[r * columns : r * columns + kept] for r in range(rows)]), kept


def grid(images: Tensor, columns: int, padding: int = 1) -> Tensor:
    """Return one picture ``[channels, H, W]`` of ``images`` ``[n, channels, h, w]`` in 0..1, row by row, on gray."""
    n, channels, h, w = images.shape
    rows = -(-n // columns)
    cells = torch.full((rows * columns, channels, h + padding, w + padding), 0.5)
    cells[:n, :, padding:, padding:] = images.detach().float().cpu().clamp(0, 1)
    table = cells.reshape(rows, columns, channels, h + padding, w + padding).permute(2, 0, 3, 1, 4)
    picture = table.reshape(channels, rows * (h + padding), columns * (w + padding))
    return torch.nn.functional.pad(picture, (0, padding, 0, padding), value=0.5)


def save_png(picture: Tensor, path: Path, zoom: int = 1) -> None:
    """Write ``[channels, H, W]`` in 0..1 as PNG, each pixel ``zoom`` pixels wide."""
    levels = (picture.mul(255).round().to(torch.uint8)).permute(1, 2, 0).numpy()
    image = Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels)
    image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def zoom_for(side: int) -> int:
    """Return the integer zoom that shows an image of ``side`` pixels at about 40 pixels."""
    return max(1, 40 // side)
