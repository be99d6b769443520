"""The arena: regions never overlap, gaps grow together again, and the memory really goes back."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adc_worker.errors import WorkerFault
from adc_worker.ingest.arena import PAGE_BYTES, Arena, Region

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def _mapped_arenas() -> int:
    return Path("/proc/self/maps").read_text(encoding="utf-8").count("memfd:adc-arena")


def _open_arenas() -> int:
    links = Path("/proc/self/fd").iterdir()
    return sum(link.is_symlink() and "memfd:adc-arena" in str(link.readlink()) for link in links)


def _pages(size_bytes: int) -> int:
    return max(1, -(-size_bytes // PAGE_BYTES))


class ArenaMachine(RuleBasedStateMachine):
    """Allocate, free and resize at random against a model that keeps one owner per page."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(8 * PAGE_BYTES)
        self.owners: list[int] = [0] * 8
        self.regions: dict[int, Region] = {}
        self.count = 0

    def _first_fit(self, pages: int) -> int | None:
        for start in range(len(self.owners) - pages + 1):
            if not any(self.owners[start : start + pages]):
                return start
        return None

    @rule(size_bytes=st.integers(-1, 10 * PAGE_BYTES))
    def allocate(self, size_bytes: int) -> None:
        pages = _pages(size_bytes)
        start = self._first_fit(pages)
        region = self.arena.allocate(size_bytes)
        if start is None:
            assert region is None
            return
        assert region == Region(start * PAGE_BYTES, pages * PAGE_BYTES)
        self.count += 1
        self.owners[start : start + pages] = [self.count] * pages
        self.regions[self.count] = region
        self.arena.view(region, (region.size_bytes,))[:] = self.count % 251

    @precondition(lambda self: self.regions)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.regions)))
        region = self.regions.pop(owner)
        assert (self.arena.view(region, (region.size_bytes,)) == owner % 251).all()  # nobody else wrote there
        self.arena.free(region)
        self.owners = [0 if page == owner else page for page in self.owners]
        with pytest.raises(ValueError, match="not in use"):
            self.arena.free(region)

    @rule(pages=st.integers(1, 12))
    def resize(self, pages: int) -> None:
        if self.regions:
            if pages * PAGE_BYTES == self.arena.size_bytes:
                pages += 1  # the size it has is no change
            with pytest.raises(ValueError, match="in use"):
                self.arena.resize(pages * PAGE_BYTES)
            return
        self.arena.resize(pages * PAGE_BYTES)
        self.owners = [0] * pages

    @invariant()
    def regions_are_disjoint_inside_and_page_aligned(self) -> None:
        regions = sorted(self.regions.values())
        assert all(region.offset % PAGE_BYTES == 0 for region in regions)
        assert all(left.end <= right.offset for left, right in pairwise(regions))
        assert all(region.end <= self.arena.size_bytes for region in regions)
        assert self.arena.used_bytes == sum(region.size_bytes for region in regions)

    def teardown(self) -> None:
        if self.regions:
            with pytest.raises(ValueError, match="still in use"):
                self.arena.close()
        for region in self.regions.values():
            self.arena.free(region)
        whole = self.arena.allocate(self.arena.size_bytes)  # everything grew together into one gap
        assert whole == Region(0, self.arena.size_bytes)
        self.arena.free(whole)
        self.arena.close()
        assert _mapped_arenas() == 0
        assert _open_arenas() == 0


TestArenaMachine = ArenaMachine.TestCase
TestArenaMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@pytest.fixture
def new_arena() -> Iterator[Callable[[int], Arena]]:
    """Make arenas that are emptied and closed at the end."""
    arenas: list[Arena] = []

    def make(size_bytes: int) -> Arena:
        arenas.append(Arena(size_bytes))
        return arenas[-1]

    yield make
    for arena in arenas:
        for region in tuple(arena._used):
            arena.free(region)
        arena.close()


def test_a_size_is_rounded_up_to_whole_pages(new_arena: Callable[[int], Arena]) -> None:
    """A region starts and ends at page boundaries, whatever was asked for."""
    arena = new_arena(1)
    assert arena.size_bytes == PAGE_BYTES
    assert arena.allocate(1) == Region(0, PAGE_BYTES)


@pytest.mark.parametrize("size_bytes", [0, -1])
def test_an_arena_of_nothing_is_refused(new_arena: Callable[[int], Arena], size_bytes: int) -> None:
    """Neither a new nor a resized arena may have no byte; the old one stays."""
    with pytest.raises(ValueError, match=f"not {size_bytes}"):
        Arena(size_bytes)
    arena = new_arena(1)
    with pytest.raises(ValueError, match=f"not {size_bytes}"):
        arena.resize(size_bytes)
    assert arena.allocate(1) is not None


def test_a_region_that_was_never_handed_out_cannot_be_freed(new_arena: Callable[[int], Arena]) -> None:
    """Freeing checks the exact region, not only its place."""
    arena = new_arena(2 * PAGE_BYTES)
    arena.allocate(2 * PAGE_BYTES)
    with pytest.raises(ValueError, match="not in use"):
        arena.free(Region(0, PAGE_BYTES))


def test_a_view_may_not_exceed_its_region(new_arena: Callable[[int], Arena]) -> None:
    """The bound is the region's, not the arena's."""
    arena = new_arena(2 * PAGE_BYTES)
    region = arena.allocate(PAGE_BYTES)
    assert region is not None
    assert arena.view(region, (PAGE_BYTES // 4, 4)).nbytes == PAGE_BYTES
    with pytest.raises(ValueError, match="needs"):
        arena.view(region, (PAGE_BYTES + 1,))


def test_views_of_neighbours_share_no_byte(new_arena: Callable[[int], Arena]) -> None:
    """Writing all of one region leaves the other as it was."""
    arena = new_arena(2 * PAGE_BYTES)
    left, right = arena.allocate(PAGE_BYTES), arena.allocate(PAGE_BYTES)
    assert left is not None
    assert right is not None
    arena.view(left, (PAGE_BYTES,))[:] = 7
    assert not arena.view(right, (PAGE_BYTES,)).any()


def test_a_closed_arena_hands_out_nothing() -> None:
    """Neither regions nor views; closing twice is no fault."""
    arena = Arena(PAGE_BYTES)
    arena.close()
    arena.close()
    with pytest.raises(ValueError, match="closed"):
        arena.allocate(1)
    with pytest.raises(ValueError, match="closed"):
        arena.view(Region(0, PAGE_BYTES), (1,))


def test_memory_goes_back_when_the_arena_shrinks_and_when_it_closes() -> None:
    """Resizing maps the new block and unmaps the old one; closing unmaps the last."""
    arena = Arena(16 * PAGE_BYTES)
    arena.resize(PAGE_BYTES)
    assert (_mapped_arenas(), _open_arenas()) == (1, 2)  # the block's own, and its mapping's
    arena.close()
    assert (_mapped_arenas(), _open_arenas()) == (0, 0)


def test_a_view_outlives_its_arena_without_harm() -> None:
    """A view that somebody kept stays readable; its mapping goes with it."""
    arena = Arena(PAGE_BYTES)
    region = arena.allocate(1)
    assert region is not None
    view = arena.view(region, (PAGE_BYTES,))
    arena.free(region)
    arena.close()
    assert np.count_nonzero(view) == 0
    del view
    assert _mapped_arenas() == 0


class _Cuda:
    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size_bytes: int, _flags: int) -> int:  # noqa: N802 (CUDA's name)
        self.locked[address] = size_bytes
        return self.code

    def cudaHostUnregister(self, address: int) -> None:  # noqa: N802
        del self.locked[address]


def test_the_whole_block_is_page_locked_as_long_as_it_lives() -> None:
    """One registration per block, taken back before the block goes."""
    cuda = _Cuda()
    arena = Arena(3 * PAGE_BYTES, cuda)
    assert list(cuda.locked.values()) == [3 * PAGE_BYTES]
    arena.resize(PAGE_BYTES)
    assert list(cuda.locked.values()) == [PAGE_BYTES]
    arena.close()
    assert not cuda.locked


def test_a_refused_page_lock_leaves_no_memory_behind() -> None:
    """The operator reads which setting forbids it; descriptor and mapping are gone."""
    with pytest.raises(WorkerFault, match=r"error 2\): set .*PIN_MEMORY=false"):
        Arena(PAGE_BYTES, _Cuda(code=2))
    assert (_mapped_arenas(), _open_arenas()) == (0, 0)
