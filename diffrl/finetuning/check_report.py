"""What self-checks found, as a table with the likely causes under it."""

import math
from dataclasses import dataclass

from diffrl.errors import DiffrlError
from diffrl.text_tables import text_table

__all__ = ["Check", "CheckFailed", "Report"]


class CheckFailed(DiffrlError, RuntimeError):
    """Something must be put right before training makes sense."""


@dataclass(frozen=True)
class Check:
    """What one check found. One that passed and has a cause is a note."""

    name: str
    passed: bool
    value: float
    limit: float
    """The largest value that passes; infinite where nothing is demanded."""
    cause: str = ""
    """The likely cause of a failure, or the note."""


@dataclass(frozen=True)
class Report:
    """What all checks found; printed, it is a table with the causes under it."""

    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(c for c in self.checks if not c.passed)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth knowing though it passed, such as a random reward."""
        return tuple(f"{c.name}: {c.cause}" for c in self.checks if c.passed and c.cause)

    @property
    def passed(self) -> bool:
        """Whether all checks passed."""
        return not self.failed

    def __str__(self) -> str:
        rows = [["check", "value", "at most", ""]]
        for c in self.checks:
            limit = "-" if math.isinf(c.limit) else f"{c.limit:.2g}"
            rows.append([c.name, f"{c.value:.2g}", limit, _verdict(c)])
        return "\n".join([text_table(rows), *(f"{c.name}: {c.cause}" for c in self.checks if c.cause)])

    def raise_if_failed(self) -> None:
        """Raise one error that names every failed check.

        Raises:
            CheckFailed: its message names each failed check and the likely cause.
        """
        if self.failed:
            each = (f"{c.name} is {c.value:.3g}, at most {c.limit:.3g}: {c.cause}" for c in self.failed)
            raise CheckFailed("before the first update, " + "; ".join(each))


def _verdict(c: Check) -> str:
    return ("note" if c.cause else "ok") if c.passed else "FAILED"
