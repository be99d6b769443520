"""How the grid compares a simulation's ranking of plans with reality's."""

from __future__ import annotations

import pytest

from benchmarks.grid import kendall_tau


@pytest.mark.parametrize(
    ("simulated", "tau"), [([1, 2, 3], 1.0), ([3, 2, 1], -1.0), ([1, 3, 2], 1 / 3), ([1, 2, 2], 2 / 3)]
)
def test_tau_is_the_share_of_agreeing_pairs_less_that_of_others(simulated: list[float], tau: float) -> None:
    """A tie in the simulation of what differs is neither."""
    found, pairs = kendall_tau([[1.0, 1.1], [2.0, 2.1], [3.0, 3.3]], simulated)
    assert found == pytest.approx(tau)
    assert pairs == 3


def test_plans_whose_jobs_overlap_cannot_be_ranked() -> None:
    """Nor those that differ by less than a fiftieth; where none can be, there is nothing to get wrong."""
    assert kendall_tau([[1.0, 2.0], [1.9, 3.0]], [2, 1]) == (1.0, 0)
    assert kendall_tau([[1.0, 1.0], [1.01, 1.01]], [2, 1]) == (1.0, 0)
