"""Every attention configuration for Hopper, compiled without a GPU, against the committed table: no regression."""

import json
import sys
from pathlib import Path

import pytest

TABLE = json.loads((Path(__file__).parent / "aot_sm90.json").read_text())
SHARED = 227 * 1024  # bytes that one thread block can have on sm_90
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux alone")


@pytest.fixture(scope="module")
def compiled(compiled_for_hopper) -> dict:
    return compiled_for_hopper("aot.py")


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
