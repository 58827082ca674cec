"""Errors that a user can cause, each with the exit code that the command line returns for it.

A message says where, what was given, what is allowed and what to run next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NasError(Exception):
    """Base of all errors that are explained to the user instead of shown as a traceback."""

    exit_code = 1


class UsageError(NasError):
    """A command, option, experiment file or search space that cannot be used as given."""

    exit_code = 2


class ConfigError(UsageError, ValueError):
    """An experiment file or search space with a wrong key, type or value.

    Also a ValueError, so that a settings record which refuses its values is one of the errors that pydantic collects.
    """


class RecordError(UsageError, ValueError):
    """A record (JSON) that does not fit its type, or a value outside its range. A ValueError as ConfigError is."""


class RunMismatchError(UsageError):
    """A run folder that was made by another space, data set, teacher or budget."""


class BudgetError(NasError):
    """Nothing meets the budget; the message names the closest point."""

    exit_code = 3


class DeviceError(NasError):
    """A device or its runtime failed, or is in another state than its table."""

    exit_code = 4


class MissingRowError(DeviceError):
    """A layer has no row in the latency table."""


class DataError(NasError):
    """A data set that is missing, empty, unreadable or contradicts itself."""

    exit_code = 5


class TrainingError(NasError):
    """A training that diverged or learns nothing; a recorded reason in a search, an end elsewhere.

    Its settings do not fit its data, so it counts as an experiment file that cannot be used.
    """

    exit_code = 2


class StorageError(NasError):
    """A file or folder that cannot be read or written, or is held by another process."""

    exit_code = 6


class InterruptedRunError(NasError):
    """The user stopped the run; finished work is kept."""

    exit_code = 130


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest allowed name, or an empty string."""
    close = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
