"""Models are shared, and leave when others need the memory; the ones that are worked with stay."""

from __future__ import annotations

import weakref

import torch

from adc_worker.models.cache import SHARE_OF_FREE, ModelCache, Wanted

CPU = torch.device("cpu")


class Model:
    pass


class Bench:
    """A cache on a device of so many model sizes, and what it loaded."""

    def __init__(self, room: float) -> None:
        self.loaded: list[str] = []
        self.settled = 0
        self.cache = ModelCache(lambda _device: int(room / SHARE_OF_FREE) - self.cache.size_bytes, self._settle)

    def job(self, names: str) -> list[Model]:
        return self.cache.hold([Wanted(name, 1, lambda name=name: self._load(name)) for name in names], CPU)  # type: ignore[misc]

    def _settle(self) -> None:
        self.settled += 1

    def _load(self, name: str) -> Model:
        self.loaded.append(name)
        return Model()


def test_pipelines_share_models_and_a_repeated_job_loads_nothing() -> None:
    bench = Bench(room=9)
    first, second = bench.job("dfa"), bench.job("dfb")
    assert first[:2] == second[:2]
    bench.job("dfa")
    assert bench.loaded == ["d", "f", "a", "b"]
    assert bench.settled == 2, "what a load takes afterwards is not paid at every job's turn"


def test_the_least_recently_used_leave_when_memory_is_short_and_nothing_keeps_them() -> None:
    """Without waiting for the garbage collector: the room is needed now."""
    bench = Bench(room=4)
    gone = weakref.ref(bench.job("dfa")[2])
    bench.job("dfb")
    assert gone() is not None
    bench.job("dfc")
    assert gone() is None
    bench.job("dfb")
    assert bench.loaded == ["d", "f", "a", "b", "c"]


def test_what_a_pipeline_needs_is_loaded_however_short_memory_is() -> None:
    """And all else has left."""
    bench = Bench(room=1)
    bench.job("dfa")
    assert len(bench.job("dfb")) == 3
    assert bench.cache.size_bytes == 3


def test_idle_models_can_be_let_go_of_at_once() -> None:
    bench = Bench(room=9)
    bench.job("dfa")
    bench.job("dfb")
    assert bench.cache.release_idle()
    assert bench.cache.size_bytes == 3
    assert not bench.cache.release_idle()
