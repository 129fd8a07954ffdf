"""The file of a trace: one row for each (step, layer, KV head) with the tokens that were selected.

Parquet with the columns step int32, layer int16, kv_head int16, length int32 (tokens in the cache at that step, the
new one included) and tokens list<int32> (ascending), in the order of step, layer and head, complete. The file's
metadata has the key "heddle.trace": JSON with the version, the shape and what the recorder was told; and
"heddle.trace.rows", written when it is closed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from heddle._errors import HeddleError, HeddleTypeError, HeddleValueError, refuse

VERSION = 1
_KEY, _ROWS = "heddle.trace", "heddle.trace.rows"
_COLUMNS = [
    ("step", pa.int32()),
    ("layer", pa.int16()),
    ("kv_head", pa.int16()),
    ("length", pa.int32()),
    ("tokens", pa.list_(pa.field("element", pa.int32(), nullable=False))),
]
_SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in _COLUMNS])


class Recorder:
    """Writes a trace while a model decodes, in bounded memory: what came since the last row group was written.

    Use it as a context manager. The file gets its name when the recorder is closed; one that an exception ends leaves
    nothing behind.

    Args:
        path: the file.
        layers: numbers of the layers whose selections will be recorded, ascending.
        kv_heads: KV heads of a layer.
        budget: k, the tokens that are selected of each KV head where there are as many: distributions are told as
            fractions of it.
        entry_bytes: what one token takes in the cache of one KV head: K, V and scales.
        description: what else to keep: anything that JSON can say. The simulator's roofline takes "operations" from it,
            if there: twice the multiply-adds for one selected token of a KV head, all its query heads.
        buffered: selected tokens that are held before they are written.

    Raises HeddleValueError and HeddleTypeError for arguments out of range.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        layers: Sequence[int],
        kv_heads: int,
        budget: int,
        entry_bytes: float,
        description: Mapping[str, Any] | None = None,
        buffered: int = 1 << 20,
    ) -> None:
        self.path = Path(path)
        self.layers = [int(layer) for layer in layers]
        if not self.layers or self.layers[0] < 0 or self.layers != sorted(set(self.layers)):
            raise _refuse("layers", f"{self.layers}; allowed are ascending numbers of 0 and above, one at least")
        for name, number in (("kv_heads", kv_heads), ("budget", budget), ("buffered", buffered)):
            if number < 1:
                raise _refuse(name, f"{number}; allowed are 1 and above")
        if not entry_bytes > 0:
            raise _refuse("entry_bytes", f"{entry_bytes}; allowed are numbers above 0")
        if not self.path.absolute().parent.is_dir():
            raise _refuse("path", f"{path}: the directory does not exist")
        self.kv_heads = kv_heads
        self.buffered = buffered
        self.rows = 0
        header = {
            "version": VERSION,
            "layers": self.layers,
            "kv_heads": kv_heads,
            "budget": budget,
            "entry_bytes": entry_bytes,
            "description": dict(description or {}),
        }
        try:
            schema = _SCHEMA.with_metadata({_KEY: json.dumps(header, allow_nan=False)})
        except (TypeError, ValueError) as error:
            raise refuse(HeddleTypeError, "dtype", "description", f"not JSON: {error}") from None
        self._part = self.path.with_name(self.path.name + ".part")
        self._writer = pq.ParquetWriter(
            self._part,
            schema,
            compression="zstd",
            use_dictionary=False,
            column_encoding={"tokens.list.element": "DELTA_BINARY_PACKED"},
        )
        self._pending: list[tuple[int, int, int, np.ndarray]] = []
        self._held = 0

    def record(self, step: int, layer: int, indices: Any, length: int) -> None:
        """The tokens that one layer selected in one step.

        Args:
            step: counts up from 0; each step records every layer, in order.
            layer: its number.
            indices: int [Hkv, n], one list a KV head as heddle.select.tokens takes them: ascending, -1 pads at the end.
            length: tokens in the cache, this step's included.

        Raises:
            HeddleValueError: an order other than that, or tokens that are not ascending in [0, length).
        """
        expected = divmod(self.rows // self.kv_heads, len(self.layers))
        if (step, layer) != (expected[0], self.layers[expected[1]]):
            raise _refuse("step", f"{step} of layer {layer}; next is {expected[0]} of layer {self.layers[expected[1]]}")
        lists = np.asarray(indices)
        if not np.issubdtype(lists.dtype, np.integer):
            raise refuse(HeddleTypeError, "dtype", "indices", f"got {lists.dtype}; allowed are integers")
        if lists.ndim != 2 or lists.shape[0] != self.kv_heads:
            allowed = f"allowed is [{self.kv_heads}, n]"
            raise refuse(HeddleValueError, "shape", "indices", f"has the shape {list(lists.shape)}; {allowed}")
        heads = []
        for head, padded in enumerate(lists):
            padding = np.flatnonzero(padded == -1)
            tokens = padded[: padding[0]] if len(padding) else padded
            wrong = (padded[len(tokens) :] != -1).any() or (np.diff(tokens) <= 0).any()
            if wrong or (len(tokens) and (tokens[0] < 0 or tokens[-1] >= length)):
                raise _refuse("indices", f"of KV head {head}: allowed are ascending tokens in [0, {length}), then -1")
            heads.append(tokens.astype(np.int32))
        self._pending += [(step, layer, length, tokens) for tokens in heads]
        self._held += sum(map(len, heads))
        self.rows += len(heads)
        if self._held >= self.buffered:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        steps, layers, lengths, tokens = zip(*self._pending, strict=True)
        offsets = np.concatenate([[0], np.cumsum([len(t) for t in tokens])]).astype(np.int32)
        values = pa.array(np.concatenate(tokens), pa.int32())
        first = (self.rows - len(self._pending)) % self.kv_heads
        columns = [
            pa.array(steps, pa.int32()),
            pa.array(layers, pa.int16()),
            pa.array((np.arange(len(steps)) + first) % self.kv_heads, pa.int16()),
            pa.array(lengths, pa.int32()),
            pa.ListArray.from_arrays(pa.array(offsets), values, type=_SCHEMA.field("tokens").type),
        ]
        self._writer.write_table(pa.table(columns, schema=_SCHEMA.with_metadata(self._writer.schema.metadata)))
        self._pending, self._held = [], 0

    def close(self) -> None:
        """Writes what is left and gives the file its name.

        Raises HeddleValueError if the last step lacks layers; the file is then not kept.
        """
        if self._writer is None:
            return
        if self.rows % (self.kv_heads * len(self.layers)):
            self._abandon()
            raise _refuse("step", "the last one lacks layers: the trace is not kept")
        self._flush()
        self._writer.add_key_value_metadata({_ROWS: str(self.rows)})
        self._writer.close()
        self._writer = None
        self._part.replace(self.path)

    def _abandon(self) -> None:
        self._writer.close()
        self._writer = None
        self._part.unlink(missing_ok=True)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is None:
            self.close()
        elif self._writer is not None:
            self._abandon()


@dataclass(frozen=True)
class Stream:
    """What one KV head of one layer selected: step s has tokens[offsets[s] : offsets[s + 1]], ascending."""

    layer: int
    kv_head: int
    offsets: np.ndarray
    tokens: np.ndarray

    @property
    def steps(self) -> np.ndarray:
        """The step of each selected token, int64 [len(tokens)]."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


@dataclass(frozen=True)
class Trace:
    """A trace in memory: 4 bytes a selected token.

    Attributes:
        layers, kv_heads, budget, entry_bytes, description: as they were given to the Recorder.
        lengths: int64 [steps]: tokens in the cache.
        offsets: int64 [rows + 1] and tokens: int32: row (step * len(layers) + i) * kv_heads + head has the tokens
            [offsets[row] : offsets[row + 1]].
    """

    layers: list[int]
    kv_heads: int
    budget: int
    entry_bytes: float
    description: dict[str, Any]
    lengths: np.ndarray
    offsets: np.ndarray
    tokens: np.ndarray

    @property
    def steps(self) -> int:
        return len(self.lengths)

    @property
    def num_streams(self) -> int:
        return len(self.layers) * self.kv_heads

    def stream(self, layer: int, kv_head: int) -> Stream:
        """The selections of one KV head of the i-th recorded layer, step by step."""
        rows = np.arange(self.steps) * self.num_streams + layer * self.kv_heads + kv_head
        counts = self.offsets[rows + 1] - self.offsets[rows]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        at = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], counts)
        return Stream(self.layers[layer], kv_head, offsets, self.tokens[at])

    def streams(self) -> Iterator[Stream]:
        """All of them, layer by layer."""
        for layer in range(len(self.layers)):
            for head in range(self.kv_heads):
                yield self.stream(layer, head)

    def footprint(self) -> int:
        """Different entries that were selected: a token counts once for each layer and KV head."""
        return sum(len(np.unique(stream.tokens)) for stream in self.streams())


def load(path: str | Path) -> Trace:
    """Reads a trace.

    Raises HeddleValueError, argument "path", for a file that is not there, is no trace, has another version, is
    truncated, holds what no recorder writes, or is empty.
    """
    try:
        with pq.ParquetFile(path) as file:
            header, rows = _header(path, file)
            table = file.read()
    except HeddleError:
        raise
    except FileNotFoundError:
        raise _refuse("path", f"{path} does not exist") from None
    except (pa.ArrowException, OSError) as error:
        raise _refuse("path", f"{path} is truncated or no trace: {str(error).splitlines()[0]}") from None
    if table.num_rows != rows:
        raise _refuse("path", f"{path} is truncated: {table.num_rows} of {rows} rows")
    if rows == 0:
        raise _refuse("path", f"{path} is empty: no step was recorded")
    step, layer, head, length = (
        table.column(name).to_numpy().astype(np.int64) for name in ("step", "layer", "kv_head", "length")
    )
    lists = table.column("tokens").combine_chunks()
    offsets = lists.offsets.to_numpy().astype(np.int64)
    tokens = lists.values.to_numpy()[offsets[0] : offsets[-1]]
    offsets -= offsets[0]
    layers, kv_heads = header["layers"], header["kv_heads"]
    row = np.arange(rows)
    streams = len(layers) * kv_heads
    ordered = (
        (step == row // streams)
        & (layer == np.asarray(layers)[row // kv_heads % len(layers)])
        & (head == row % kv_heads)
        & (length == length[row // streams * streams])
    )
    if rows % streams or not ordered.all():
        raise _refuse("path", f"{path} is damaged: rows are not in the order of steps, layers and heads")
    first = np.zeros(len(tokens), bool)
    first[offsets[:-1][np.diff(offsets) > 0]] = True
    inside = (tokens >= 0) & (tokens < np.repeat(length, np.diff(offsets)))
    if not (inside.all() and (first[1:] | (np.diff(tokens) > 0)).all()):
        raise _refuse("path", f"{path} is damaged: tokens are not ascending below the length of their step")
    shape = {key: header[key] for key in ("layers", "kv_heads", "budget", "entry_bytes", "description")}
    return Trace(**shape, lengths=length[::streams], offsets=offsets, tokens=tokens)


def _header(path: str | Path, file: pq.ParquetFile) -> tuple[dict[str, Any], int]:
    """The metadata and the number of rows that were written."""
    metadata = {key.decode(): value for key, value in (file.metadata.metadata or {}).items()}
    if _KEY not in metadata:
        raise _refuse("path", f"{path} is no trace: a Parquet file without {_KEY!r}")
    try:
        header = json.loads(metadata[_KEY])
        version = header["version"]
    except (ValueError, KeyError, TypeError):
        raise _refuse("path", f"{path} is damaged: {_KEY!r} cannot be read") from None
    if version != VERSION:
        raise _refuse("path", f"{path} is a trace of version {version}; allowed is {VERSION}")
    if _ROWS not in metadata or not file.schema_arrow.equals(_SCHEMA):
        raise _refuse("path", f"{path} is damaged: it lacks columns or {_ROWS!r}")
    return header, int(metadata[_ROWS])


def _refuse(argument: str, message: str) -> HeddleError:
    return refuse(HeddleValueError, "value", argument, message)
