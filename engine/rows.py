"""Rows: the named columns of a file, a folder, a published dataset or a list, each with its number."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]
Source: TypeAlias = str | os.PathLike[str] | Iterable[Mapping[str, Any]]


def rows(source: Source) -> list[Row]:
    """All rows of a source: row n is line n of a .jsonl file, entry n of anything else (n counts from 1).

    source: a .jsonl, .json (a list, or one object per line), .parquet or .txt file (one row, column `text`); a folder
    or name that `datasets.load_dataset` knows (its split `train`); or rows in memory, such as a list of dicts or a
    `datasets.Dataset`. Raises ValueError with one sentence for what is missing, empty or broken.
    """
    name = source_name(source)
    if isinstance(source, Mapping):
        raise ValueError(f"expected rows, got a mapping with the keys {', '.join(source)}: pick one of them")
    table = _read(Path(source), name) if isinstance(source, (str, os.PathLike)) else list(source)
    if not table:
        raise ValueError(f"{name}: expected at least one row, found none")
    for number, row in enumerate(table, 1):
        if not isinstance(row, Mapping):
            raise ValueError(f"{name} row {number}: expected an object with named columns, got {kind(row)}")
    return [dict(row) for row in table]


def source_name(source: Source) -> str:
    """What errors call a source: its path or name."""
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else "data in memory"


def _read(path: Path, name: str) -> list[Any]:
    readers = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet, ".txt": _plain}
    endings = ", ".join(readers)
    reader = readers.get(path.suffix)
    if path.is_file():
        if reader is None:
            raise ValueError(f"{name}: expected a file that ends in {endings}, got {path.suffix or 'no ending'}")
        return reader(path)
    # A name on the hub has at most one slash: anything else is a path, and asking the network would take a minute.
    if not path.exists() and (reader is not None or path.is_absolute() or name.startswith(".") or len(path.parts) > 2):
        raise ValueError(f"{name}: no such file or folder")
    return _published(name)


def _json_lines(path: Path) -> list[Any]:
    content = path.read_bytes().rstrip()
    lines = content.split(b"\n") if content else []
    return [_parse(line, f"{path} line {number}") for number, line in enumerate(lines, 1)]


def _json(path: Path) -> list[Any]:
    content = path.read_bytes()
    return _parse(content, str(path)) if content.lstrip().startswith(b"[") else _json_lines(path)


def _plain(path: Path) -> list[Any]:
    document = _decode(path.read_bytes(), str(path))
    return [{"text": document}] if document else []


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


def _parquet(path: Path) -> list[Any]:
    import pyarrow  # comes with datasets; slow to import
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error


def _published(name: str) -> list[Any]:
    import datasets  # slow to import

    try:
        return list(datasets.load_dataset(name, split="train"))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{name}: expected a .jsonl, .json, .parquet or .txt file, or a folder or name that "
            f"datasets.load_dataset finds with a train split, found none ({reason})"
        ) from error


def kind(value: object) -> str:
    """The name of a value's type as a data file would call it."""
    return "null" if value is None else type(value).__name__
