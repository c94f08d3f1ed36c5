"""Exit statuses, and the exceptions whose message, one line, is all that a person needs to read."""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """With what a command exits; a process that a second Ctrl-C ends has 130."""

    DONE = 0
    FAILED = 1
    BAD_INPUT = 2
    AGAIN = 75  # a signal or the time stopped it: the same command continues
    STALLED = 76  # no step ended for long: the same command continues
    NOT_FINITE = 77  # the loss, the gradient or an update is not finite
    NO_CHECKPOINT = 78  # no state that was saved can be read; of `tiedjax check`: something that was saved is damaged
    LOCKED = 79  # another process writes there


class UserError(ValueError):
    """Bad input: its message is one line that says what was wrong, where, and what would be right.

    The command line prints the message and exits with `status`; Python callers see a ValueError.
    """

    status = Status.BAD_INPUT


class LockedError(UserError):
    """Another live process writes where this one was to write."""

    status = Status.LOCKED


class NoCheckpointError(UserError):
    """A run has saved states, and none of them can be used."""

    status = Status.NO_CHECKPOINT


class StoreError(UserError):
    """An object store does not do what it was asked, at a place that may well be right."""

    status = Status.FAILED


class TrainingError(RuntimeError):
    """The run cannot go on, and its config is at fault: one line that says where and what to try."""

    status = Status.FAILED


class NotJoinedError(TrainingError):
    """The other processes of the cluster do not answer."""

    status = Status.STALLED


class TakenOverError(TrainingError):
    """Another process has begun to write where this one was writing."""

    status = Status.LOCKED


class NotFiniteError(TrainingError):
    """The loss, its gradient, or what an update made of the parameters, is not finite."""

    status = Status.NOT_FINITE
