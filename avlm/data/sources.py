"""Whatever rows can be read from, opened by what is there."""

from __future__ import annotations

from avlm.config.data import DataConfig
from avlm.data.readers.jsonlines import JsonLines
from avlm.data.rows import RowSource


def open_source(path: str, data: DataConfig | None = None) -> RowSource:
    return JsonLines(path, data)


__all__ = ["JsonLines", "open_source"]
