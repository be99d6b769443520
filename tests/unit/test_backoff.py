"""One back-off for everything that is tried again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adc_worker.backoff import Backoff


def test_nothing_that_did_not_fail_waits() -> None:
    """The first attempt comes at once, and so does the next one after a success."""
    backoff = Backoff(first_s=0.5, most_s=30.0)
    assert backoff.wait_s() == 0.0
    assert backoff.after_failure().after_success().wait_s() == 0.0


def test_waits_double_up_to_the_limit() -> None:
    """0.5, 1, 2, 4 and from then on 5 seconds, without jitter."""
    backoff = Backoff(first_s=0.5, most_s=5.0)
    waits = []
    for _ in range(6):
        backoff = backoff.after_failure()
        waits.append(backoff.wait_s(chance=0.0))
    assert waits == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0]


@given(st.integers(1, 10_000), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_jitter_only_shortens_a_wait(failures: int, jitter: float, chance: float) -> None:
    """However often it failed, and whatever chance says."""
    backoff = Backoff(first_s=0.5, most_s=30.0, jitter=jitter, failures=failures)
    wait_s = backoff.wait_s(chance)
    assert (1 - jitter) * backoff.longest_wait_s <= wait_s + 1e-9
    assert wait_s <= backoff.longest_wait_s <= 30.0


@pytest.mark.parametrize(("first_s", "most_s", "jitter"), [(0.0, 1.0, 0.5), (2.0, 1.0, 0.5), (1.0, 2.0, 1.5)])
def test_a_back_off_that_makes_no_sense_is_refused(first_s: float, most_s: float, jitter: float) -> None:
    """With the offending values."""
    with pytest.raises(ValueError, match=r"back-off needs|jitter lies"):
        Backoff(first_s=first_s, most_s=most_s, jitter=jitter)
