"""Command line flags that follow from a dataclass. Its source says everything, once: name, type and default of a field are the
flag's, the comment behind it is the help text, and a line of dashes with a title begins a group of `--help`.

    @dataclass
    class Config:
        # ---- optimizer
        lr: float = 3e-5  # learning rate
        compile: bool = False  # torch.compile of each block

gives --lr FLOAT and --compile / --no-compile. A dash may be an underscore, and an unknown flag is an error with a suggestion.
"""

import argparse
import difflib
import inspect
import re
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass, fields

from checkpoint import InputError

TITLE = re.compile(r"    # -+ (?P<title>.+)")
REMARK = re.compile(r"    # (?P<text>.+)")
FIELD = re.compile(r"    (?P<name>\w+): .*?(  # (?P<text>.+))?")


class Parser(argparse.ArgumentParser):
    """Whose mistakes are those of a user, like all others."""

    def error(self, message: str) -> typing.NoReturn:
        raise InputError(message)

    def parse_flags(self, argv: list[str], stray: str = "see --help") -> argparse.Namespace:
        """A dash may be an underscore; an unknown flag is an error with a suggestion. stray: what to do about a bare word."""
        argv = list(argv)
        for i, arg in enumerate(argv):
            if arg.startswith("--"):
                flag, equals, value = arg.partition("=")
                argv[i] = flag.replace("_", "-") + equals + value
        args, unknown = self.parse_known_args(argv)
        if not unknown:
            return args
        if not unknown[0].startswith("-"):
            raise InputError(f"{unknown[0]!r} belongs to no flag: {stray}")
        flag = unknown[0].partition("=")[0]
        close = difflib.get_close_matches(flag, self._option_string_actions, 1)
        remedy = f"did you mean {close[0]}?" if close else "see --help"
        raise InputError(f"unknown flag {flag}: {remedy}")


@dataclass
class Told:
    """What the source says of a field beside its type."""

    group: str = ""
    text: str = ""


def told(cls: type) -> dict[str, Told]:
    """What the source of a dataclass and of its bases says of each field. One that gets another default stays in its group, and
    keeps its text if it gets no other."""
    found: dict[str, Told] = {}
    for owner in reversed(cls.__mro__):
        if not vars(owner).get("__annotations__"):  # it adds nothing, or was made without source
            continue
        group, above = "", []
        for line in inspect.getsource(owner).splitlines():
            if match := TITLE.fullmatch(line):
                group, above = match["title"], []
            elif match := REMARK.fullmatch(line):
                above.append(match["text"])
            elif (match := FIELD.fullmatch(line)) and match["name"] in owner.__annotations__:
                field = found.setdefault(match["name"], Told(group))
                field.text = " ".join([*above, match["text"] or ""]).strip() or field.text
                above = []
    return found


def add_flags(
    parser: Parser,
    cls: type,
    *,
    title: str = "settings",
    aliases: dict[str, list[str]] | None = None,
    leave_out: Collection[str] = (),
    given_only: bool = False,
) -> None:
    """A flag for each field of a dataclass, in its groups; those without one come under `title`.

    given_only: what is not given is absent from the result, and no default is shown, because another place has the defaults.
    """
    hints = typing.get_type_hints(cls)
    said = told(cls)
    groups = {}
    for field in fields(cls):
        if field.name in leave_out:
            continue
        about = said.get(field.name, Told())
        heading = about.group or title
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)

        kind = hints[field.name]
        if isinstance(kind, types.UnionType):  # "int | None": None is a default, never given
            kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
        if kind is bool:
            form = {"action": argparse.BooleanOptionalAction}
        else:
            form = {"type": kind, "metavar": kind.__name__.upper()}
        form["default"] = argparse.SUPPRESS if given_only else field.default

        names = [f"--{field.name.replace('_', '-')}", *(aliases or {}).get(field.name, [])]
        action = groups[heading].add_argument(*names, dest=field.name, **form)
        action.help = about.text.replace("%", "%%")  # set here, for argparse adds a default of its own to that of a switch
        if not given_only:
            action.help = f"{action.help} (default {shown(field.default)})".strip()


def shown(default: object) -> str:
    """A default in a help text."""
    if isinstance(default, bool):
        return "yes" if default else "no"
    if default == "":
        return "empty"
    return str(default).replace("%", "%%")
