"""Files that are written whole or not at all, and the two folders that secateur knows: cache and data."""

import contextlib
import errno
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError, nearest

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}


def cache_dir() -> Path:
    """Where converted models are kept: `$SECATEUR_CACHE`, else `~/.cache/secateur`. Not created here."""
    return Path(os.environ.get("SECATEUR_CACHE") or Path.home() / ".cache" / "secateur").expanduser()


def data_dir() -> Path | None:
    """Where the real data sets are: `$SECATEUR_DATA`, else `../shared/data` beside the repository, else None."""
    named = os.environ.get("SECATEUR_DATA")
    path = Path(named).expanduser() if named else Path(__file__).resolve().parents[3] / "shared" / "data"
    return path if path.is_dir() else None


def require_data(name: str) -> Path:
    """The file or folder `name` of the data folder.

    >>> require_data("text/ptb_valid.txt").read_text()[:20]  # doctest: +SKIP
    ' consumers may want '

    Raises SecateurError that names SECATEUR_DATA where the folder or the file is missing.
    """
    root = data_dir()
    if root is None:
        named = os.environ.get("SECATEUR_DATA")
        raise SecateurError(
            f"needs the data set {name!r}, and "
            + (f"SECATEUR_DATA={named} is not a folder" if named else "SECATEUR_DATA is not set"),
            where="data",
            fix="set SECATEUR_DATA to the folder that holds it",
        )
    if not (root / name).exists():
        raise SecateurError(
            f"{name!r} is not in {root}", where="data", fix="set SECATEUR_DATA to the folder that holds it"
        )
    return root / name


def similar_path(path: str | Path) -> Path | None:
    """What lies where a path points, under a name much like the one that isn't there.

    >>> similar_path("READMEE.md")  # doctest: +SKIP
    PosixPath('README.md')
    """
    missing = Path(path).expanduser()
    while not missing.parent.exists() and missing.parent != missing:
        missing = missing.parent
    try:
        names = [entry.name for entry in missing.parent.iterdir()]
    except OSError:
        return None
    near = nearest(missing.name, names, cutoff=0.6)
    return missing.with_name(near[0]) if near else None


def check_path(path: str | Path, fix: str = "check the path") -> str:
    """What to do about a path that isn't there: the one that was meant, or `fix`."""
    near = similar_path(path)
    return f"did you mean {near}?" if near else fix


@contextlib.contextmanager
def explain_oserror(path: Path) -> Iterator[None]:
    """Turns a full disk and a forbidden place into SecateurError; lets every other error through."""
    try:
        yield
    except SecateurError:
        raise
    except Exception as error:  # safetensors tells of the system's errors in its own; others are raised again
        number = getattr(error, "errno", None)
        if number in FULL or any(f"(os error {code})" in str(error) for code in FULL):
            raise SecateurError(
                "the disk is full; nothing was written",
                where=str(path),
                fix="free some space, or write elsewhere",
            ) from error
        if number in CLOSED:
            raise SecateurError(
                f"cannot write here ({error.strerror})",  # type: ignore[attr-defined]
                where=str(path),
                fix="choose a place you may write to",
            ) from error
        raise


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")


def _open_to(mode: int, *files: Path) -> None:
    """Files as readable as any other that is made here: safetensors (0.8) makes them for their owner alone."""
    for file in files:
        now = file.lstat().st_mode
        if stat.S_ISREG(now) and mode & ~now:
            with contextlib.suppress(PermissionError):  # a file system without modes
                file.chmod(now | mode)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A name beside `path` to write a file to, which takes the name `path` only when the block ends well.

    >>> with atomic_file("out.gguf") as partial:  # doctest: +SKIP
    ...     writer.write(partial)

    It is removed at any failure. Raises SecateurError as `atomic_write_bytes` does.
    """
    path = Path(path)
    with explain_oserror(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise SecateurError("is a folder, not a file", where=str(path), fix="give the name of a file")
        partial = _beside(path)
        try:
            partial.touch()
            mode = partial.stat().st_mode & 0o666
            yield partial
            _open_to(mode, partial)
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Writes `data` beside `path` and renames it: a reader sees the old file or the new one, never half.

    Makes missing parent folders. Raises SecateurError where the disk is full or the place is forbidden.
    """
    with atomic_file(path) as partial:
        partial.write_bytes(data)


def atomic_write_text(path: str | Path, text: str) -> None:
    """`atomic_write_bytes` of UTF-8 text, line ends untouched."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | Path, value: Any) -> None:
    """`atomic_write_text` of indented JSON. NaN and infinity are refused (they are not JSON)."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SecateurError(f"cannot be written as JSON: {error}", where=str(path)) from error
    atomic_write_text(path, text + "\n")


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """A folder that appears at `path` only when the block ends well.

    >>> with atomic_directory("out") as partial:  # doctest: +SKIP
    ...     model.save_pretrained(partial)

    The block writes to a hidden sibling, which is renamed at the end and removed at any failure,
    KeyboardInterrupt too. Raises SecateurError where `path` is a file or a non-empty folder (also when
    someone else filled it meanwhile), where the disk is full, and where the place is forbidden.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_dir():
        raise SecateurError("is a file", where=str(path), fix="give a new folder")
    if path.is_dir() and any(path.iterdir()):
        raise SecateurError(
            "the folder is not empty", where=str(path), fix="give a new folder, or remove this one"
        )
    partial = _beside(path)
    with explain_oserror(path):
        try:
            partial.mkdir(parents=True)
            mode = partial.stat().st_mode & 0o666
            yield partial
            _open_to(mode, *partial.rglob("*"))
            if path.is_dir():
                with contextlib.suppress(OSError):  # someone filled it: the rename below says so
                    path.rmdir()
            try:
                os.rename(partial, path)
            except OSError as error:
                if not path.exists():
                    raise
                raise SecateurError(
                    "the folder was filled by someone else meanwhile",
                    where=str(path),
                    fix="give a new folder",
                ) from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
