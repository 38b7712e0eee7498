"""Addresses at which a file shows, or nothing. Owns the addresses; the file is somebody else's, and never written to."""

from __future__ import annotations

import mmap

from chimera.vmm.host import FIXED, NORESERVE, PROT_NONE, VACANT, check, map_at, munmap


class Window:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.address = map_at(None, nbytes, PROT_NONE, VACANT)

    def show(self, file: int) -> None:
        """The file's first bytes, read from it as they are touched; what is written there is this process's alone."""
        flags = mmap.MAP_PRIVATE | FIXED | NORESERVE
        map_at(self.address, self.nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, file)

    def hide(self) -> None:
        """Touching the addresses faults from now on."""
        map_at(self.address, self.nbytes, PROT_NONE, VACANT | FIXED)

    def close(self) -> None:
        check("munmap", munmap(self.address, self.nbytes), self.nbytes)
