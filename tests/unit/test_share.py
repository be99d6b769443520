"""How the workers of one host divide its memory, by locked slots."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from adc_worker.host.budget import HostBudget, measure
from adc_worker.host.memory import machine_oom_kills
from adc_worker.host.share import CAUTION_STEP, Claim, MemoryShare
from tests.support.fakes import GB, MB
from tests.support.waiting import wait_until

HOLDER = (
    "import sys, pathlib; from adc_worker.host.share import MemoryShare;"
    "share = MemoryShare(pathlib.Path(sys.argv[1]));"
    "share.claim(int(sys.argv[2]), busy=True); print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as closes:
        yield closes


def _budget(share: MemoryShare, used_bytes: int = 400 * MB) -> HostBudget:
    return measure(used_bytes, share, 3 * GB, 1, staging_in_memory=False, vram_free_bytes=None)


def test_a_worker_that_is_alone_has_the_whole_limit(tmp_path: Path, stack: ExitStack) -> None:
    """Less what it uses already."""
    share = stack.enter_context(closing(MemoryShare(tmp_path)))
    assert share.others() == []
    assert _budget(share).limit_bytes == 3 * GB
    assert _budget(share).available_bytes == 2600 * MB


def test_a_newcomer_starts_with_what_is_left(tmp_path: Path, stack: ExitStack) -> None:
    """Its part of the limit is a half; what the other still claims is not available yet."""
    first, second = (stack.enter_context(closing(MemoryShare(tmp_path))) for _ in range(2))
    first.claim(2100 * MB, busy=True)
    assert second.others() == [Claim(2100 * MB, True)]
    second.claim(400 * MB, busy=True)
    newcomer = _budget(second)
    assert newcomer.limit_bytes == 1500 * MB
    assert newcomer.available_bytes == 500 * MB
    assert _budget(first, 2100 * MB).limit_bytes == 1500 * MB
    first.claim(1000 * MB, busy=True)
    assert _budget(second).available_bytes == 1600 * MB


def test_idle_workers_take_no_part_in_the_division(tmp_path: Path, stack: ExitStack) -> None:
    """Only what they hold is taken off."""
    first, second = (stack.enter_context(closing(MemoryShare(tmp_path))) for _ in range(2))
    second.claim(400 * MB, busy=False)
    assert _budget(first).limit_bytes == 2600 * MB


def test_what_others_claim_takes_nothing_off_the_whole_limit(tmp_path: Path, stack: ExitStack) -> None:
    """An image is too large for good only where this worker alone could not hold it; and it is said who holds what."""
    first, second = (stack.enter_context(closing(MemoryShare(tmp_path))) for _ in range(2))
    first.claim(2900 * MB, busy=True)
    second.claim(400 * MB, busy=True)
    squeezed = _budget(second)
    assert squeezed.whole_limit_bytes == 3 * GB
    assert squeezed.alone_bytes == 0
    assert "of 3000 MB (AMI_MEMORY_LIMIT_BYTES) this worker uses 400 MB" in squeezed.who_holds_it()
    assert "may use 2900 MB" in squeezed.who_holds_it()


def test_a_dead_workers_part_comes_back(tmp_path: Path, stack: ExitStack) -> None:
    """A lock goes with its process, however that ended; its slot is used again."""
    share = stack.enter_context(closing(MemoryShare(tmp_path)))
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path), "1000000000"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert share.others() == [Claim(1_000_000_000, True)]
        other.send_signal(signal.SIGKILL)
        wait_until(lambda: share.others() == [])
    stack.enter_context(closing(MemoryShare(tmp_path)))
    assert len(list(next(tmp_path.iterdir()).iterdir())) == 2


def test_looking_at_others_takes_no_slot_from_them(tmp_path: Path, stack: ExitStack) -> None:
    """Whoever looks sees each worker, in any order and any number of times."""
    shares = [stack.enter_context(closing(MemoryShare(tmp_path))) for _ in range(4)]
    for number, share in enumerate(shares):
        share.claim(number * MB, busy=True)
    for number, share in enumerate(shares * 2):
        assert {claim.size_bytes for claim in share.others()} == {0, MB, 2 * MB, 3 * MB} - {number % 4 * MB}


def _kill_a_holder(folder: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), "1"], stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        holder.kill()


def test_who_follows_one_that_the_kernel_killed_plans_with_less(tmp_path: Path, stack: ExitStack) -> None:
    """Whatever became of its parent: the slot remembers. Each job that ends well gives some back, also to the next."""
    kills = machine_oom_kills()
    for kill in (1, 2):
        _kill_a_holder(tmp_path)
        with closing(MemoryShare(tmp_path, lambda kill=kill: kills + kill)) as share:  # type: ignore[misc]
            assert share.after_kill
            assert _budget(share).caution == pytest.approx(CAUTION_STEP)
            share.recover()
            share.recover()
            assert share.caution == 1.0
    _kill_a_holder(tmp_path)
    with closing(MemoryShare(tmp_path, lambda: kills + 1)):
        pass
    share = stack.enter_context(closing(MemoryShare(tmp_path, lambda: kills + 2)))
    assert not share.after_kill
    assert share.caution == pytest.approx(CAUTION_STEP)


def test_a_worker_that_ended_otherwise_leaves_no_caution(tmp_path: Path, stack: ExitStack) -> None:
    """Killed while the kernel killed nobody, or ended well while it killed others."""
    _kill_a_holder(tmp_path)
    with closing(MemoryShare(tmp_path)) as share:
        assert not share.after_kill
    share = stack.enter_context(closing(MemoryShare(tmp_path, lambda: machine_oom_kills() + 1)))
    assert (share.after_kill, share.caution) == (False, 1.0)


DAMAGED = [
    b"",
    bytes(80),
    b"\xff\xfe holiday photographs",
    b"12 1",
    b"a b c d",
    b"12 1 nan 0",
    b"12 1 -3.0 0",
    b"1 1 0.7 x",
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_slot_counts_as_a_first_start(tmp_path: Path, content: bytes) -> None:
    """It must not end every start of the worker."""
    with closing(MemoryShare(tmp_path)):
        (slot,) = tmp_path.glob("memory-*/0")
    slot.write_bytes(content)
    with closing(MemoryShare(tmp_path)) as share:
        assert share.caution == 1.0
        assert not share.after_kill


@pytest.mark.parametrize("content", [b"", bytes(80), b"\xff\xfe holiday photographs", b"x 1 1.0 0", b"-5 0 1.0 0"])
def test_a_damaged_slot_of_another_claims_nothing(tmp_path: Path, content: bytes, stack: ExitStack) -> None:
    """Until its worker writes it anew, with the next batch."""
    mine, other = (stack.enter_context(closing(MemoryShare(tmp_path))) for _ in range(2))
    (slot,) = tmp_path.glob("memory-*/1")
    slot.write_bytes(content)
    assert mine.others() == [Claim(0, busy=False)]
    other.claim(5, busy=True)
    assert mine.others() == [Claim(5, busy=True)]
