"""State of a calibration under way."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmq_serve.calibrate.plan import Plan
from vlmq_serve.calibrate.progress import Progress
from vlmq_serve.calibrate.work import WorkFolder


@dataclass
class Run:
    """One calibration under way: what was asked, and what the report will say of it."""

    plan: Plan
    out: Path
    work: WorkFolder
    progress: Progress
    resume: bool
    overwrite: bool
    hashes: dict[str, str]
    seconds: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note(self, message: str) -> None:
        """Keep a remark for the report and show it."""
        self.notes.append(message)
        self.progress.note(message)
