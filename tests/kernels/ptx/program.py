"""PTX text to a list of statements that `warp.Warp` can run."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple


class NotModelledError(Exception):
    """Valid PTX that our kernels do not contain today: refused, as what is passed over could hide a fault."""


class Address(NamedTuple):
    """[base + offset]; base is a register, or the name of a parameter."""

    base: str
    offset: int


Operand = str | int | Address | tuple[Any, ...]
"""A register or symbol, the bits of a literal, an address, or a vector {a, b, …} of registers."""


@dataclass(frozen=True)
class Statement:
    """`@guard name operands;`, the guard negated after `@!`."""

    text: str
    name: str
    operands: tuple[Operand, ...]
    guard: str | None = None
    negated: bool = False

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """Name and modifiers, as in ("ld", "global", "v4", "b32")."""
        return tuple(self.name.replace("::", ":").split("."))


@dataclass(frozen=True)
class Program:
    """Statements of a kernel, labels as places among them, and its parameters in order."""

    statements: tuple[Statement, ...]
    labels: dict[str, int]
    parameters: tuple[str, ...]


_STATEMENT = re.compile(r"(?:@(?P<not>!?)(?P<guard>%\w+)\s+)?(?P<name>[a-z][\w.:]*)\s*(?P<rest>.*)", re.S)
_LABEL = re.compile(r"(\$\w+):")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+")


def parse(text: str) -> Program:
    """The one kernel in `text`. Registers that inline assembly declares for itself get names of their own."""
    text = re.sub(r"//[^\n]*|^\s*\.loc[^\n]*", "", text, flags=re.M)
    head, _, body = text.partition(".visible .entry")[2].partition("{")
    statements: list[Statement] = []
    labels: dict[str, int] = {}
    scopes: list[dict[str, str]] = [{}]
    for fragment in body.split(";"):
        fragment = fragment.strip()
        while fragment and (fragment[0] in "{}" or _LABEL.match(fragment)):
            if fragment[0] == "}" and len(scopes) == 1:
                return Program(tuple(statements), labels, tuple(re.findall(r"\w+_param_\d+", head)))
            if label := _LABEL.match(fragment):
                labels[label[1]] = len(statements)
            elif fragment[0] == "{":
                scopes.append(dict(scopes[-1]))
            else:
                scopes.pop()
            fragment = fragment[label.end() if label else 1 :].strip()
        if fragment.startswith(".reg") and len(scopes) > 1:
            scopes[-1] |= {n: f"{n}#{len(statements)}" for n in re.findall(r"[\w]+", fragment.split(maxsplit=2)[2])}
        elif fragment and fragment[0] != ".":
            statements.append(_statement(fragment, scopes[-1]))
    raise ValueError("the kernel does not end")


def parse_assembly(text: str) -> Program:
    """Statements of an inline assembly block."""
    return parse(f".visible .entry {{ {text} }}")


def _statement(fragment: str, local: dict[str, str]) -> Statement:
    found = _STATEMENT.fullmatch(fragment)
    if found is None:
        raise ValueError(f"PTX: {fragment}")
    operands = tuple(_operand(o, local) for o in _OPERAND.findall(found["rest"]))
    return Statement(" ".join(fragment.split()), found["name"], operands, found["guard"], found["not"] == "!")


def _operand(text: str, local: dict[str, str]) -> Operand:
    if text[0] == "{":
        return tuple(_operand(o, local) for o in _OPERAND.findall(text[1:-1]))
    if text[0] == "[":
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(local.get(base, base), int(offset or "0", 0))
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return int(text[2:], 16)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    return local.get(text, text)
