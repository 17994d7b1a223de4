"""Picture files of a user, read by Pillow's own decoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.utils.files import check_path

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Formats that Pillow reads by itself; PostScript, for one, it hands to another program."""


def open_picture(path: str | Path) -> Any:
    """A picture file as a Pillow image in RGB.

    >>> open_picture("cat.jpg").size  # doctest: +SKIP
    (640, 480)

    Raises `SecateurError` where there is no picture, it is damaged or too large, or Pillow isn't installed.
    """
    return _opened(path, lambda image: image.convert("RGB"))


def open_frames(path: str | Path) -> list[Any]:
    """The frames of an animated picture (GIF, WebP) as Pillow images in RGB; one of a still.

    >>> len(open_frames("dance.gif"))  # doctest: +SKIP
    24

    Raises `SecateurError` as `open_picture` does.
    """

    def every(image: Any) -> list[Any]:
        frames = []
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            frames.append(image.convert("RGB"))
        return frames

    return _opened(path, every)


def _opened(path: str | Path, read: Callable[[Any], Any]) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise SecateurError("Pillow isn't installed", where=str(path), fix="pip install pillow") from error
    file = Path(path).expanduser()
    if not file.is_file():
        raise SecateurError("no such picture", where=str(path), fix=check_path(file))
    try:
        with Image.open(file, formats=FORMATS) as opened:
            return read(opened)
    # decoders raise what they like: struct.error, IndexError, DecompressionBombError
    except Exception as error:
        raise SecateurError(
            f"it can't be read as a picture ({error})",
            where=str(path),
            fix="give a PNG or JPEG",
        ) from error
