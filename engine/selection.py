"""Selection: which rows of a source ask the same as others, and which are held out, user by user.

InstructGPT did both before it trained (Ouyang et al. 2022, appendix A.3). It also removed personal data, which nothing
here can do: that takes a person, or a program made for it, before the rows come here.
"""

from __future__ import annotations

import zlib

from twinhead.engine import data, formats
from twinhead.engine.rows import Row, Source, Unusable, column, source_name, stream
from twinhead.engine.text import spoken


def distinct(source: Source, prefix: int) -> list[Row]:
    """The rows whose prompts do not begin like an earlier one: the first `prefix` characters are the same.

    A prompt that is shorter is another's double only if it is the same. Rows in a known format come as native ones, and
    those that teach nothing are left out. Raises ValueError naming the row for one that asks nothing.
    """
    if prefix < 1:
        raise ValueError(f"expected prefix >= 1 character, got {prefix}")
    kept: dict[str, Row] = {}
    for number, row in formats.threads(enumerate(stream(source), 1)):
        known = formats.recognised(row)
        try:
            native = known.convert(row) if known else row
            kept.setdefault(spoken(data.prompt_of(native))[:prefix], native)
        except Unusable:
            continue
        except ValueError as error:
            raise ValueError(f"{source_name(source)} row {number}: {error}{formats.hint(row)}") from error
    return list(kept.values())


def split(source: Source, user: str, share: float) -> tuple[list[Row], list[Row]]:
    """(to train on, held out): all rows of one user, by the column `user`, are on the same side.

    A checksum of the user decides, so that other rows, another order or a longer file move nobody. `share` is what the
    held-out side gets of many users. Raises ValueError naming the row for one without that column.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"expected share to be between 0 and 1, got {share}")
    sides: tuple[list[Row], list[Row]] = ([], [])
    for number, row in enumerate(stream(source), 1):
        try:
            name = str(column(row, user, wanted=f"the column {user}"))
        except ValueError as error:
            raise ValueError(f"{source_name(source)} row {number}: {error}") from error
        sides[zlib.crc32(name.encode()) < share * 2**32].append(row)
    return sides
