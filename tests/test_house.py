"""The house: who imports whom, read from the import statements of all files. The root is the paper, folders are around it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up: a module imports only what stands in a line above its own.
LAYERS = """
    checkpoint threads interrupt hopper
    kernels distributed flags lora
    ops
    tokenizer connector vae model
    dit
    flow flops records
    pages
    pipeline data
    training
    replay
    train_stage1 train_stage2 sample
"""
LAYER = {name: n for n, line in enumerate(LAYERS.split("\n")) for name in line.split()}
INNER = {"records", "pages"}  # folders that the root uses; the other folders use the root
SCRIPTS = {"sample", "train_stage1", "train_stage2"}  # which alone may ask tools/ for something, at --plan


def modules() -> dict[str, Path]:
    """Name -> file, of the root and of the folders that are packages; tests aside."""
    files = [*ROOT.glob("*.py"), *(f for init in ROOT.glob("*/__init__.py") for f in init.parent.rglob("*.py"))]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


MODULES = modules()
FOLDERS = {name.split(".")[0] for name in MODULES if "." in name}


def imports(name: str, everywhere: bool = True) -> set[str]:
    """The modules of this repository that a module imports; those at its top level alone, or in its functions, too."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: imports are written from the root"
            found |= {f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in MODULES else node.module for a in node.names}
    return found & MODULES.keys()


def test_every_folder_of_code_is_a_package_that_does_nothing():
    """A folder of the same name under tests/ would else be taken for it, and importing one module would import others.

    It may look up a name when it is asked for one (PEP 562).
    """
    assert FOLDERS >= INNER | {"sketchbook", "evaluate", "bench", "tools"}
    for folder in FOLDERS:
        body = ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8")).body
        assert isinstance(body[0], ast.Expr), folder
        assert all(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in body[1:]), folder
    stray = {f.parent.name for f in ROOT.glob("*/*.py")} - FOLDERS - {"tests"}
    assert not {name for name in stray if not name.startswith(".")}


PAPER = sorted(m for m in MODULES if m.split(".")[0] not in FOLDERS - INNER)


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_does_not_import_the_world_around_it(name):
    """Nor in its functions, but for a script that is asked for a plan. What it imports is no string either."""
    outer = {m for m in imports(name) if m.split(".")[0] in FOLDERS - INNER}
    assert not outer or (name in SCRIPTS and {m.split(".")[0] for m in outer} == {"tools"})
    assert not {m for m in imports(name, everywhere=False) if m.split(".")[0] in FOLDERS - INNER}
    if name not in SCRIPTS:
        nodes = ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8")))
        assert not {n.value for n in nodes if isinstance(n, ast.Constant)} & {*MODULES, *FOLDERS} - {*PAPER, *INNER}


def test_pages_know_of_nothing_that_writes_answers():
    """What they show is handed in."""
    pages = [imports(name) for name in MODULES if name.split(".")[0] == "pages"]
    assert {m.split(".")[0] for m in set().union(*pages)} <= {"pages", "records", "checkpoint"}


def test_every_file_of_the_root_has_its_layer():
    assert {name for name in MODULES if name not in FOLDERS and "." not in name} == LAYER.keys() - INNER


@pytest.mark.parametrize("name", sorted(m for m in MODULES if m.split(".")[0] in LAYER))
def test_modules_stand_on_lower_layers_only(name):
    own = name.split(".")[0]
    for other in imports(name):
        below = other.split(".")[0]
        if below != own and below in LAYER:
            assert LAYER[below] < LAYER[own], f"{name} imports {other}"


@pytest.mark.parametrize("everywhere", [False, True], ids=["at the top", "anywhere"])
def test_no_circles(everywhere):
    """In the whole house."""
    graph, done = {name: imports(name, everywhere) for name in MODULES}, set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_model_knows_of_records_or_data():
    for name in ("model", "connector", "vae", "dit", "tokenizer"):
        assert not {m for m in imports(name) if m.split(".")[0] in ("records", "data")}, name
