"""`vllm bench serve` many times in one process, because its imports take longer than many a measurement."""

import contextlib
import json
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from vlmq_serve.format.errors import VLMQError


class Client:
    """A process that runs one `vllm bench serve` after the other; what they print goes to `log`."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def __enter__(self) -> "Client":
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(self._log)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    def run(self, arguments: Sequence[str]) -> None:
        """Run `vllm bench serve ARGUMENTS`; `VLMQError` with the end of its output when it fails."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([*arguments]) + "\n")
            self._process.stdin.flush()
        if self._process.stdout.readline().strip() != "done":
            raise VLMQError(f"`vllm bench serve` failed; {self._log} ends with:\n{self.tail()}")

    def tail(self, lines: int = 15) -> str:
        """The end of what was printed."""
        text = self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])


def _serve_commands(log: Path) -> None:
    assert sys.__stdout__ is not None
    with log.open("a", encoding="utf-8") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        # Before the first command comes, so that it does not wait for them.
        from vllm.benchmarks.serve import add_cli_args, main
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        for line in sys.stdin:
            outcome = "done"
            try:
                main(parser.parse_args(json.loads(line)))
            except (Exception, SystemExit):
                traceback.print_exc()
                outcome = "failed"
            sink.flush()
            sys.__stdout__.write(outcome + "\n")
            sys.__stdout__.flush()


if __name__ == "__main__":
    _serve_commands(Path(sys.argv[1]))
