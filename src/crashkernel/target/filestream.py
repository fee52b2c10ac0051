"""A file on a mounted file system that takes a stream: an encrypted dump."""

from __future__ import annotations

import os

from crashkernel.target.aside import Kind
from crashkernel.target.base import DUMP, Heartbeat, Saved
from crashkernel.target.encryption import SUFFIX, Encryption
from crashkernel.target.files import flush, write_all
from crashkernel.target.local import Place
from crashkernel.target.manifest import Contents, Manifest
from crashkernel.target.stream import StreamTarget


class FileStreamTarget(StreamTarget):
    """A file that takes a stream from its first byte to its last: what is encrypted cannot be written at offsets."""

    def __init__(self, path: str, encryption: Encryption, kind: Kind | None = None) -> None:
        self._place = Place(path, kind)
        super().__init__(self._place.name, encryption)
        self._descriptor: int | None = None

    def warnings(self) -> list[str]:
        """Nothing that outlives a reboot."""
        return self._place.warnings()

    def begin(self, crash: str, alive: Heartbeat) -> None:
        """Make the crash's directory."""
        super().begin(crash, alive)
        self._place.begin(crash)

    def _put(self, name: str, data: bytes) -> None:
        self._place.put(name, data)

    def _dump_name(self, contents: Contents) -> str:
        return self._place.dump_name(super()._dump_name(contents))

    def _start(self) -> None:
        self._descriptor, self.leftover = self._place.create(self._place.dump_name(DUMP + SUFFIX))

    def _send(self, data: memoryview) -> None:
        assert self._descriptor is not None
        write_all(self._descriptor, data)

    def _finish(self, manifest: Manifest) -> Saved:
        assert self._descriptor is not None
        assert self.leftover is not None
        flush(self._descriptor, self._alive)
        saved = self._place.finish(self.leftover, manifest)
        self._stop()
        self.leftover = None
        return saved

    def _stop(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
