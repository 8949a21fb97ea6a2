"""One line of a verification."""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How a finding counts: only an error makes a checkpoint unfit to serve."""

    OK = "ok"
    NOTE = "note"
    SKIPPED = "skipped"
    ERROR = "error"


@dataclass(frozen=True)
class Finding:
    """What a check found; `message` is one line."""

    level: Level
    check: str
    message: str


def judge(check: str, problems: list[str], fine: str) -> list[Finding]:
    """One error per problem, or one line that says what was checked and is fine."""
    if not problems:
        return [Finding(Level.OK, check, fine)]
    return [Finding(Level.ERROR, check, problem) for problem in problems]
