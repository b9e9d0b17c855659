"""Flags and their help follow from dataclasses and the comments in them."""

from dataclasses import dataclass, fields

import pytest

import train_stage1
import train_stage2
from flags import Parser, add_flags, told
from pipeline import Settings
from sketchbook import pretrain
from tools.plan import PlanConfig


@dataclass
class Base:
    # ---- optimizer
    lr: float = 3e-5  # learning rate
    steps: int = 10  # in all, 100 % of them
    # ---- machine
    fast: bool = False  # by magic


@dataclass
class Special(Base):
    # ---- data
    # How many of them
    # there are.
    names: int | None = None
    word: str = ""
    # ---- other defaults
    lr: float = 1e-5
    steps: int = 20  # more

    def method(self) -> None:
        local: int = 1  # not a field
        return local


def test_comments_and_titles_are_read_from_the_source():
    found = {name: (field.group, field.text) for name, field in told(Special).items()}
    assert found == {
        "lr": ("optimizer", "learning rate"),
        "steps": ("optimizer", "more"),
        "fast": ("machine", "by magic"),
        "names": ("data", "How many of them there are."),
        "word": ("data", ""),
    }


def test_help_has_groups_texts_and_defaults(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    parser = Parser()
    add_flags(parser, Special, aliases={"lr": ["--rate"]})
    said = parser.format_help()
    assert "optimizer:\n  --lr FLOAT, --rate FLOAT\n" in said and "learning rate (default 1e-05)" in said
    assert "machine:\n  --fast, --no-fast     by magic (default no)\n" in said
    assert "--names INT           How many of them there are. (default None)" in said and "(default empty)" in said
    parser = Parser()
    add_flags(parser, Base)
    assert "in all, 100 % of them (default 10)" in parser.format_help()
    assert vars(parser.parse_flags(["--fast", "--lr", "1"])) == {"lr": 1.0, "steps": 10, "fast": True}


def test_flags_that_are_not_given_may_be_absent():
    parser = Parser()
    add_flags(parser, Special, leave_out=["lr"], given_only=True)
    assert vars(parser.parse_flags(["--no-fast", "--names=3"])) == {"fast": False, "names": 3}
    assert "default" not in parser.format_help() and "--lr" not in parser.format_help()


CONFIGS = [train_stage1.Stage1Config, train_stage2.Stage2Config, PlanConfig, Settings]
CONFIGS += [config for config, _ in pretrain.COMMANDS.values()]


@pytest.mark.parametrize("cls", CONFIGS, ids=[cls.__name__ for cls in CONFIGS])
def test_every_setting_says_what_it_means(cls):
    said = told(cls)
    assert [field.name for field in fields(cls) if len(said[field.name].text) < 4] == []
