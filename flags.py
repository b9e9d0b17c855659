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

# Four blanks in front: fields stand there in a class, and what a method has within it stands deeper.
TITLE = re.compile(r"    # -+ (?P<title>.+)")
REMARK = re.compile(r"    # (?P<text>.+)")
FIELD = re.compile(r"    (?P<name>\w+): .*?(  # (?P<text>.+))?")


class Parser(argparse.ArgumentParser):
    """Whose mistakes are those of a user, like all others."""

    def error(self, message: str) -> typing.NoReturn:
        raise InputError(message)

    def parse_flags(self, argv: list[str], stray: str = "see --help") -> argparse.Namespace:
        """A dash may be an underscore; an unknown flag is an error with a suggestion. stray: what to do about a bare word."""
        # Only the flag itself: an underscore in its value, --out=my_run, is the user's.
        argv = list(argv)
        for i, arg in enumerate(argv):
            if arg.startswith("--"):
                flag, equals, value = arg.partition("=")
                argv[i] = flag.replace("_", "-") + equals + value
        # parse_args would only say that a flag is unknown; this one hands it over, so that a near one can be suggested.
        args, unknown = self.parse_known_args(argv)
        if not unknown:
            return args
        # A bare word is mostly a text whose quotes are missing; to suggest a flag for it would lead astray.
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
    # Python keeps no comments, so the source is read. From the oldest class on, so that a later one has the last word.
    found: dict[str, Told] = {}
    for owner in reversed(cls.__mro__):
        if not vars(owner).get("__annotations__"):  # it adds nothing, or was made without source
            continue
        group = ""
        above = []  # lines of comment since the last field: they belong to the next one
        for line in inspect.getsource(owner).splitlines():
            if match := TITLE.fullmatch(line):
                group = match["title"]
                above = []
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
    # A field's own type may be a string (postponed annotations, PEP 563); the hints are always types.
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

        # The type is what argparse calls on the text. bool would not do: bool("no") is true, so a switch has two flags.
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):  # "int | None": None is a default, never given
            kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
        if kind is bool:
            form = {"action": argparse.BooleanOptionalAction}
        else:
            form = {"type": kind, "metavar": kind.__name__.upper()}
        # A suppressed default leaves no attribute at all, so "given" and "given as the default" can be told apart.
        form["default"] = argparse.SUPPRESS if given_only else field.default

        names = [f"--{field.name.replace('_', '-')}", *(aliases or {}).get(field.name, [])]
        action = groups[heading].add_argument(*names, dest=field.name, **form)
        action.help = about.text.replace("%", "%%")  # set here, for argparse adds a default of its own to that of a switch
        if not given_only:
            action.help = f"{action.help} (default {shown(field.default)})".strip()


def shown(default: object) -> str:
    """A default in a help text."""
    # As the flags say it: what --no-x turns off is "no", not False.
    if isinstance(default, bool):
        return "yes" if default else "no"
    if default == "":
        return "empty"
    # argparse fills in what follows a %, so that one has to be doubled.
    return str(default).replace("%", "%%")
