"""Reads the file that an offline run leaves for ``wandb sync``; wandb itself has no reader in Python.

The file is a LevelDB log: blocks of 32 KiB that hold chunks of records, each with a checksum.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32 * 1024
CHUNK = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


class WandbFile:
    """What an offline run would send, from its ``.wandb`` file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = [Record.FromString(body) for body in _bodies(path.read_bytes())]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What was logged, a dictionary a call, nested keys joined by dots."""
        return [_values(record.history.item) for record in self._of("history")]

    @property
    def config(self) -> dict[str, Any]:
        """The run's config, as it ended."""
        config: dict[str, Any] = {}
        for update in [record.run.config for record in self._of("run")] + [r.config for r in self._of("config")]:
            config |= _values(update.update)
        return config

    @property
    def summary(self) -> dict[str, Any]:
        """The last value of each key that was logged."""
        summary: dict[str, Any] = {}
        for record in self._of("summary"):
            summary |= _values(record.summary.update)
        return summary

    @property
    def run_id(self) -> str:
        """What joins the parts of a resumed run."""
        return self._of("run")[0].run.run_id

    @property
    def exit_code(self) -> int | None:
        """None if the run was killed."""
        return next((record.exit.exit_code for record in self._of("exit")), None)

    @property
    def artifacts(self) -> list[Any]:
        """Artifacts that the run logged: name, type, aliases and manifest."""
        requests = [record.request.log_artifact.artifact for record in self._of("request")]
        return [record.artifact for record in self._of("artifact")] + [
            artifact for artifact in requests if artifact.name
        ]

    def _of(self, kind: str) -> list[Any]:
        return [record for record in self.records if record.WhichOneof("record_type") == kind]


def _bodies(data: bytes) -> Iterator[bytes]:
    magic, version = struct.unpack("<4sH", data[:6])
    assert (magic, version) == (b":W&B", 0xBEE1)
    position, body = 7, b""
    while position + CHUNK.size <= len(data):
        left = BLOCK - position % BLOCK
        if left < CHUNK.size:  # no chunk's head is split
            position += left
            continue
        checksum, length, kind = CHUNK.unpack_from(data, position)
        part = data[position + CHUNK.size : position + CHUNK.size + length]
        if len(part) < length:  # cut off by a kill
            return
        assert zlib.crc32(bytes([kind]) + part) == checksum
        body = part if kind in (FULL, FIRST) else body + part
        if kind in (FULL, LAST):
            yield body
        position += CHUNK.size + length


def _values(items: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
