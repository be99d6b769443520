"""The states of a task, and which state may follow which."""

from __future__ import annotations

from enum import Enum


class TaskState(Enum):
    """Where a task is, between its fetch and its end at Antenna."""

    FETCHED = "fetched"  # on record, and nothing was begun
    DOWNLOADING = "downloading"  # its download runs
    WAITING = "waiting"  # its download failed and is tried again at a known time
    STAGED = "staged"  # on disk, header read
    ADMITTED = "admitted"  # has its place in the arena: decoded and inferred there
    PARKED = "parked"  # waits for a host or a machine at fault
    KEPT = "kept"  # its result, or its error, is on this host's disk
    POSTING = "posting"  # a post with its result is under way
    ACCEPTED = "accepted"  # Antenna has queued its result
    GIVEN_UP = "given up"  # left to its lease, knowingly
    HANDED_BACK = "handed back"  # given back over NATS, so that others get it at once
    RETIRED = "retired"  # its job is over or restarted: nobody wants it any more


ENDED = frozenset(
    {TaskState.ACCEPTED, TaskState.GIVEN_UP, TaskState.HANDED_BACK, TaskState.RETIRED}
)

# Work that has no result yet may end in each of these ways, whatever state it is in.
_MAY_END = frozenset(
    {TaskState.KEPT, TaskState.PARKED, TaskState.GIVEN_UP, TaskState.HANDED_BACK, TaskState.RETIRED}
)

TRANSITIONS: dict[TaskState, frozenset[TaskState]] = {
    TaskState.FETCHED: _MAY_END | {TaskState.DOWNLOADING},
    TaskState.DOWNLOADING: _MAY_END | {TaskState.FETCHED, TaskState.WAITING, TaskState.STAGED},
    TaskState.WAITING: _MAY_END | {TaskState.FETCHED, TaskState.DOWNLOADING},
    TaskState.STAGED: _MAY_END | {TaskState.FETCHED, TaskState.ADMITTED},
    TaskState.ADMITTED: _MAY_END | {TaskState.STAGED},
    TaskState.PARKED: (_MAY_END - {TaskState.PARKED}) | {TaskState.FETCHED},
    TaskState.KEPT: frozenset({TaskState.POSTING, TaskState.ACCEPTED, TaskState.RETIRED}),
    TaskState.POSTING: frozenset({TaskState.KEPT, TaskState.ACCEPTED, TaskState.RETIRED}),
} | {state: frozenset() for state in ENDED}


class IllegalTransition(AssertionError):
    """A stage moved a task to a state that does not follow from its own: a bug."""

    def __init__(self, task_id: int, before: TaskState, after: TaskState) -> None:
        super().__init__(f"task {task_id} is {before.value} and cannot become {after.value}")


def check_transition(task_id: int, before: TaskState, after: TaskState) -> None:
    """Raise IllegalTransition unless `after` may follow `before`."""
    if after not in TRANSITIONS[before]:
        raise IllegalTransition(task_id, before, after)
