"""Text of data sets that the package `datasets` reads: from its hub, its cache, or a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.errors import SecateurError, choose, require
from secateur.utils.files import check_path

PREFIX = "hf:"
MOST = 20_000_000
"""Characters that are read at most, from the first row on: windows are drawn from them."""
FORM = "write hf:NAME:SPLIT:FIELD, or hf:NAME:CONFIG:SPLIT:FIELD, such as hf:wikitext:wikitext-2-raw-v1:train:text"


def load_rows(source: str, most: int = MOST) -> str:
    """The texts of one field of a data set, in the order of its rows, with an empty line between them.

    >>> load_rows("hf:wikitext:wikitext-2-raw-v1:train:text")[:20]  # doctest: +SKIP

    source: `hf:NAME:SPLIT:FIELD` or `hf:NAME:CONFIG:SPLIT:FIELD`; NAME is one of the hub, which is read from the cache where it
    lies there (no network is needed then), or a folder that `save_to_disk` wrote or that holds parquet, CSV or JSON files. No
    code of a data set is run. most: rows after so many characters are left.

    Raises SecateurError: a source of another form, `datasets` isn't installed, no such data set, split or field, or a field
    without text.
    """
    name, config, split, field = _parts(source)
    try:
        import datasets
    except ImportError as error:
        raise SecateurError(
            "datasets isn't installed", where=source, fix="pip install 'secateur[datasets]'"
        ) from error
    rows = _rows(datasets, source, name, config, split)
    choose(field, rows.column_names, what="field", where=source, near=1)
    texts: list[str] = []
    count = 0
    for row in rows.select_columns([field]):
        text = row[field]
        require(
            isinstance(text, str),
            f"row {len(texts)} of {field} is a {type(text).__name__}, no text",
            where=source,
            fix=f"one of {', '.join(rows.column_names)}",
        )
        texts.append(text)
        count += len(text)
        if count > most:
            break
    return "\n\n".join(text for text in texts if text.strip())


def _parts(source: str) -> tuple[str, str | None, str, str]:
    parts = [part.strip() for part in source.removeprefix(PREFIX).split(":")]
    require(len(parts) in (3, 4) and all(parts), f"{source!r} has another form", where="data", fix=FORM)
    name, *config, split, field = parts
    return name, config[0] if config else None, split, field


def _rows(datasets: Any, source: str, name: str, config: str | None, split: str) -> Any:
    folder = Path(name).expanduser()
    if name.startswith((".", "/", "~")):
        require(folder.is_dir(), "no such folder", where=source, fix=check_path(folder))
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found = datasets.load_from_disk(str(folder))
            if isinstance(found, datasets.DatasetDict):
                choose(split, found, what="split", where=source, near=1)
                found = found[split]
            return found
        return datasets.load_dataset(str(folder) if folder.is_dir() else name, config, split=split)
    except SecateurError:
        raise
    except Exception as error:  # of the hub, of HTTP, of readers of files: one family of none
        reason = " ".join(str(error).split())
        raise SecateurError(
            f"can't be read ({type(error).__name__}: {reason[:300]})", where=source, fix=FORM
        ) from error
