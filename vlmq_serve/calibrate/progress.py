"""How a run tells its caller where it is; the command line draws it."""

from typing import Protocol


class Progress(Protocol):
    """Receives the stages of a run. `advance` counts one of the stage's `total` steps."""

    def stage(self, title: str, total: int) -> None: ...

    def advance(self, detail: str = "") -> None: ...

    def note(self, message: str) -> None: ...


class SilentProgress:
    """Shows nothing."""

    def stage(self, title: str, total: int) -> None:
        """Ignore."""

    def advance(self, detail: str = "") -> None:
        """Ignore."""

    def note(self, message: str) -> None:
        """Ignore."""
