"""Writes docs/support.md, what has been tested about serving, from the outcome of the tests.

python -m pytest tests/quant_methods tests/serve tests/export tests/verify --junitxml report.xml
python scripts/support_matrix.py report.xml docs/support.md

Several reports may be given before the target; a case that is in more than one counts as the last has it.
"""

import argparse
import ast
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAD = """# What is tested about serving

Written by `scripts/support_matrix.py` from a run of the tests; do not edit. A line is a test, in its own words, with
the cases it went through and how many of them passed, failed or were skipped.
"""


def main() -> None:
    """One section per test file and one line per test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    sections: dict[str, dict[str, dict[str, str]]] = {}
    for report in options.reports:
        for case in ElementTree.parse(report).iter("testcase"):
            name, _, identifier = case.attrib["name"].partition("[")
            tests = sections.setdefault(case.attrib["classname"], {})
            tests.setdefault(name, {})[identifier.removesuffix("]")] = _outcome(case)
    text = HEAD
    for module, tests in sorted(sections.items()):
        text += (
            f"\n## {_title(module)}\n\n`{module.replace('.', '/')}.py`\n\n| test | cases | outcome |\n|---|---|---|\n"
        )
        text += "".join(_line(name, cases) for name, cases in tests.items())
    options.target.write_text(text, encoding="utf-8")


def _line(name: str, cases: dict[str, str]) -> str:
    identifiers = ", ".join(filter(None, cases)).replace("|", "\\|")
    counts = Counter(cases.values())
    outcome = ", ".join(f"{count} {what}" for what, count in counts.items())
    return f"| {name.removeprefix('test_').replace('_', ' ')} | {identifiers} | {outcome} |\n"


def _outcome(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


def _title(module: str) -> str:
    """The first line of the test file's docstring."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or module
    return docstring.splitlines()[0].rstrip(".")


if __name__ == "__main__":
    main()
