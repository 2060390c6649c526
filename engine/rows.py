"""Rows: the named columns of a file, a folder, a published dataset or a list, each with its number."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]
Source: TypeAlias = str | os.PathLike[str] | Iterable[Mapping[str, Any]]


class Unusable(Exception):
    """A row that is well formed but teaches nothing: whoever reads it drops and counts it."""


def rows(source: Source) -> list[Row]:
    """All rows of a source, as stream() gives them one by one."""
    return list(stream(source))


def stream(source: Source) -> Iterator[Row]:
    """The rows of a source, one at a time: row n is line n of a .jsonl file, entry n of anything else (n from 1).

    source: a .jsonl, .json (a list, or one object per line), .parquet or .txt file (one row, column `text`); a folder
    or name that `datasets.load_dataset` knows (its split `train`, or `name:split`, where a split may be a slice such
    as `train[:1000]`); or rows in memory, such as a list of dicts or a `datasets.Dataset`. Lines, parquet batches and
    published rows are read as they are asked for; a JSON list and a .txt file are read whole.

    Raises ValueError with one sentence for what is missing, empty or broken.
    """
    name = source_name(source)
    if isinstance(source, Mapping):
        raise ValueError(f"expected rows, got a mapping with the keys {', '.join(source)}: pick one of them")
    table = _read(Path(source), name) if isinstance(source, (str, os.PathLike)) else iter(source)
    number = 0
    for number, row in enumerate(table, 1):
        if not isinstance(row, Mapping):
            raise ValueError(f"{name} row {number}: expected an object with named columns, got {kind(row)}")
        yield dict(row)
    if not number:
        raise ValueError(f"{name}: expected at least one row, found none")


def column(row: Row, *names: str, wanted: str) -> Any:
    """The first of these columns that the row has. `wanted` says what the row should have had."""
    for name in names:
        if name in row:
            return row[name]
    raise ValueError(f"expected {wanted}, got {'the columns ' + ', '.join(row) if row else 'no columns'}")


def source_name(source: Source) -> str:
    """What errors call a source: its path or name."""
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else "data in memory"


def _read(path: Path, name: str) -> Iterator[Any]:
    readers = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet, ".txt": _plain}
    endings = ", ".join(readers)
    reader = readers.get(path.suffix)
    if path.is_file():
        if reader is None:
            raise ValueError(f"{name}: expected a file that ends in {endings}, got {path.suffix or 'no ending'}")
        return reader(path)
    published, _, split = name.partition(":")
    path = Path(published)
    # A name on the hub has at most one slash: anything else is a path, and asking the network would take a minute.
    if not path.exists() and (reader is not None or path.is_absolute() or name.startswith(".") or len(path.parts) > 2):
        raise ValueError(f"{name}: no such file or folder")
    return _published(published, split or "train")


def _json_lines(path: Path) -> Iterator[Any]:
    blank: tuple[bytes, int] | None = None  # blank lines may end a file, but not interrupt it
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                blank = blank or (line, number)
                continue
            content, at = blank or (line, number)
            yield _parse(content.rstrip(b"\n"), f"{path} line {at}")


def _json(path: Path) -> Iterator[Any]:
    content = path.read_bytes()
    return iter(_parse(content, str(path))) if content.lstrip().startswith(b"[") else _json_lines(path)


def _plain(path: Path) -> Iterator[Any]:
    document = _decode(path.read_bytes(), str(path))
    return iter([{"text": document}] if document else [])


def _parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(_decode(content, where))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f"{where}: not valid JSON ({error.msg.removesuffix(' at')} at {place})") from error


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not valid UTF-8 ({error.reason} at byte {error.start + 1})") from error


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow  # comes with datasets; slow to import
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error


def _published(name: str, split: str) -> Iterator[Any]:
    import datasets  # slow to import

    try:
        return iter(datasets.load_dataset(name, split=split))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{name}: expected a .jsonl, .json, .parquet or .txt file, or a folder or name that "
            f"datasets.load_dataset finds with a {split} split, found none ({reason})"
        ) from error


def kind(value: object) -> str:
    """The name of a value's type as a data file would call it."""
    return "null" if value is None else type(value).__name__
