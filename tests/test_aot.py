"""Every attention configuration for Hopper, compiled without a GPU, against the committed table: no regression."""

import json
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

TABLE = json.loads((Path(__file__).parent / "aot_sm90.json").read_text())
SHARED = 227 * 1024  # bytes that one thread block can have on sm_90
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux alone")


@pytest.fixture(scope="module")
def compiled(compiled_for_hopper) -> dict:
    return json.loads(compiled_for_hopper("aot.py"))


def test_the_table_holds_what_is_shipped(compiled):
    assert compiled.keys() == TABLE.keys(), "run `make aot`"
    assert compiled["triton"] == TABLE["triton"]


@pytest.mark.parametrize("name", [name for name in TABLE if name != "triton"])
def test_machine_code(compiled, name):
    new, old = compiled[name], TABLE[name]
    assert new["shared"] <= SHARED
    assert new["spill"] <= old["spill"]
    for kind in ("tma", "wgmma", "mma_sync"):
        assert new[kind] == old[kind]
    for kind in ("registers", "shared", "loop"):
        assert new[kind] <= 1.03 * old[kind], f"{kind}: {old[kind]} became {new[kind]}"
    if name.split()[0] in ("forward", "dq", "dkv"):
        assert new["wgmma"] and not new["mma_sync"], "the tensor cores are not fed by warp groups"


# -------------------------------------------------------------------------------------- hopper.py, with every Triton


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


ROOT = Path(__file__).parent.parent
HOPPER = lines((ROOT / "tests/aot_hopper.jsonl").read_text())
TRITONS = list(dict.fromkeys(row["triton"] for row in HOPPER))
RAN = TRITONS[0]  # the one that a GPU has run it with


def rows(triton: str, table: list[dict] = HOPPER) -> dict[str, dict]:
    """What was compiled -> its numbers."""
    return {row["what"]: row for row in table if row["triton"] == triton}


@pytest.fixture(scope="module")
def with_triton(compiled_for_hopper) -> Callable[[str], dict]:
    """A function: version -> the rows that it makes, where it is there."""

    @cache
    def compiled(triton: str) -> dict:
        return rows(triton, lines(compiled_for_hopper("aot_hopper.py", folder_of(triton))))

    return compiled


def folder_of(triton: str) -> Path | None:
    """Where this version lies; None: it is the installed one."""
    try:
        installed = version("triton")
    except PackageNotFoundError:
        installed = None
    if installed == triton:
        return None
    for folder in (ROOT / ".venv-aot", ROOT / f".venv-aot-{triton}"):
        if (folder / f"triton-{triton}.dist-info").is_dir():
            return folder
    pytest.skip(f"Triton {triton} is not here; `make aot` fetches it")


@pytest.mark.parametrize("triton", TRITONS)
def test_hopper_py_compiles_with(with_triton, triton):
    """No more registers, memory and instructions than are committed; the same work, and as much of it at the same time."""
    new = with_triton(triton)
    old = rows(triton)
    assert list(new) == list(old), "run `make aot`"
    for what, row in old.items():
        for kind in ("tma", "wgmma", "bar", "wait", "arrive", "exp"):
            assert new[what][kind] == row[kind], f"{what}: {kind}"
        for kind in ("registers", "spill", "shared", "local"):
            assert new[what][kind] <= row[kind], f"{what}: {kind}"
        assert new[what]["loop"] <= 1.03 * row["loop"], what
        assert new[what]["under"] >= row["under"], what


@pytest.mark.parametrize("triton", TRITONS)
def test_every_triton_makes_the_same_of_hopper_py(triton):
    """The same products, copies and waits, in no more memory; loops as long, within 2 %, that spill nothing."""
    ran = rows(RAN)
    assert list(rows(triton)) == list(ran)
    for what, row in rows(triton).items():
        for kind in ("registers", "shared", "tma", "wgmma", "wait", "arrive", "exp"):
            assert row[kind] == ran[what][kind], f"{what}: {kind}"
        assert row["shared"] <= SHARED
        assert row["bar"] <= ran[what]["bar"]
        assert row["loop"] <= 1.02 * ran[what]["loop"]
        assert row["local"] == 0


def test_what_no_mask_interrupts_overlaps_whole():
    """Every 2^x of a full tile runs under a product, with every Triton. Of causal calls those up to 3.7 leave some behind."""
    for row in HOPPER:
        if "full" in row["what"] or row["triton"] >= "3.8":
            assert row["under"] == row["exp"], row
        else:
            assert row["under"] > row["exp"] / 2, row
