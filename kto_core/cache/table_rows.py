"""Read the rows of a shard's table as mappings."""

from collections.abc import Sequence
from typing import cast, overload

import pyarrow as pa

from offline_kto.kto_core.cache.arrow_lists import Lists
from offline_kto.kto_core.cache.places import PLACE
from offline_kto.kto_core.cache.row_schema import SCHEMA, CacheRow, has_places, optional_columns


class Rows(Sequence[CacheRow]):
    """Rows of a table as mappings, built on access; token ids and scores are numpy views of the table's buffers."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table.combine_chunks()
        optional = optional_columns(self._table.schema, "this table").columns
        optional += [PLACE] if has_places(self._table.schema, "this table") else []
        self._plain = {name: self._table.column(name) for name in (*_PLAIN_COLUMNS, *optional)}
        self._lists = {name: Lists(self._table, name) for name in SCHEMA.names if name not in _PLAIN_COLUMNS}
        self._inner = {name: self._lists[name].inner() for name in _TWICE_NESTED}

    @property
    def nbytes(self) -> int:
        """Size of the table's buffers in bytes."""
        return int(self._table.nbytes)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, index: int) -> CacheRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[CacheRow]: ...
    def __getitem__(self, index: int | slice) -> CacheRow | list[CacheRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row: dict[str, object] = {name: column[index].as_py() for name, column in self._plain.items()}
        for name, lists in self._lists.items():
            if name in _TWICE_NESTED:
                row[name] = [self._inner[name].one(i) for i in lists.span(index)]
            else:
                row[name] = lists.one(index)
        return cast("CacheRow", row)


_PLAIN_COLUMNS = ("row_id", "prompt_id", "pair_id", "source", "label", "ref_logps")
_TWICE_NESTED = ("kl_completion_ids", "ref_kl_token_logps")
