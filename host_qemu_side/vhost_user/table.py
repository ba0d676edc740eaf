"""The memory table of a vhost-user front end: which RAM it shares, and where it has that RAM itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vring.memory import GuestMemory, Region
from vring.vhost_user import MemoryRegion, VhostUserError

__all__ = ["MemoryTable"]


@dataclass(frozen=True, slots=True)
class MemoryTable:
    """One table. A change makes another, with another mapping; whoever made it closes the memory of the one before."""

    regions: tuple[MemoryRegion, ...] = ()
    memory: GuestMemory | None = None
    """The same regions, mapped; None if there are none."""

    @classmethod
    def of(cls, regions: Sequence[MemoryRegion], fds: Sequence[int]) -> MemoryTable:
        """Map what SET_MEM_TABLE brings.

        Raises
        ------
        UsageError, OSError
            If the regions cannot be guest memory.
        VhostUserError
            If each has not its descriptor, or one lies where the front end can have no memory.
        """
        if len(regions) != len(fds):
            raise VhostUserError(
                f"vhost-user: a memory table names {len(regions)} regions and brings {len(fds)} descriptors"
            )
        for region in regions:
            if region.user_address + region.size > 1 << 64:
                raise VhostUserError(
                    f"vhost-user: region of {region.size} bytes at the front end's own address "
                    f"{region.user_address:#x} does not end below 2^64"
                )
        mapped = GuestMemory.from_fds(
            Region(r.gpa, r.size, fd, r.mmap_offset) for r, fd in zip(regions, fds, strict=True)
        )
        return cls(tuple(regions), mapped)

    def adding(self, region: MemoryRegion, fds: Sequence[int]) -> MemoryTable:
        """Return the table with one region more (ADD_MEM_REG); errors as `of`."""
        if len(fds) != 1:
            raise VhostUserError(f"vhost-user: ADD_MEM_REG brings {len(fds)} descriptors")
        return self.of([*self.regions, region], [*self._fds(self.regions), *fds])

    def removing(self, region: MemoryRegion) -> MemoryTable:
        """Return the table without a region (REM_MEM_REG), which is named by its place and size alone.

        Raises
        ------
        VhostUserError
            If it is not in the table.
        """
        named = region.gpa, region.size, region.user_address
        left = tuple(r for r in self.regions if (r.gpa, r.size, r.user_address) != named)
        if len(left) == len(self.regions):
            raise VhostUserError(
                f"vhost-user: REM_MEM_REG of {region.size} bytes at {region.gpa:#x}, which is no region of the table"
            )
        return self.of(left, self._fds(left)) if left else MemoryTable()

    def _fds(self, regions: Sequence[MemoryRegion]) -> list[int]:
        by_gpa = {r.gpa: r.fd for r in self.memory.regions} if self.memory is not None else {}
        return [by_gpa[region.gpa] for region in regions]

    def guest_address(self, user: int, length: int) -> int | None:
        """Return the guest address of bytes at an address of the front end's own, None if no region has them all."""
        for region in self.regions:
            if region.user_address <= user and user + length <= region.user_address + region.size:
                return user - region.user_address + region.gpa
        return None
