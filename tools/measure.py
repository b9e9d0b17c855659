"""How this code lies, in figures: lines, tokens, comments, long functions, imports and circles, file by file.

    python -m tools.measure                  this repository
    python -m tools.measure FOLDER ...       others beside it
    python -m tools.measure --reading        the reading order with lines and minutes, as the README has it

Standard library alone, so that any Python can measure any checkout. A code line is one with a token that is neither comment nor
docstring; tokens are Python's names, operators, numbers and strings; tests are left out.
"""

import ast
import sys
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

KINDS = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
SKIPPED = {"tests", "test", "build", "dist", "node_modules"}
LONG = 60  # lines of a function that is too long to be seen at once
PACE = 15  # lines that a reader takes in a minute
EVENINGS = {  # the reading order of the README
    1: ("sample", "pipeline", "tokenizer", "model", "connector"),
    2: ("vae", "dit", "flow", "data", "train_stage1", "train_stage2", "replay"),
    3: ("ops", "lora", "training", "distributed", "flags", "checkpoint", "threads", "interrupt", "flops"),
    4: ("kernels", "hopper"),
}


@dataclass
class File:
    """What is counted of one file."""

    path: Path  # relative to the folder that is measured
    lines: int = 0
    code: int = 0  # lines with code
    tokens: int = 0
    comments: int = 0  # lines with nothing but a comment
    wide: int = 0  # lines over 110 columns
    functions: dict[str, int] = field(default_factory=dict)  # name -> lines
    imports: set[str] = field(default_factory=set)  # dotted names, as written


def measure(path: Path, root: Path) -> File:
    """Count one file."""
    text = path.read_text(encoding="utf-8", errors="replace")
    tree = ast.parse(text)
    file = File(path.relative_to(root), lines=text.count("\n"))
    file.wide = sum(len(line) > 110 for line in text.splitlines())

    # Docstrings are strings that stand alone; they explain, so they are not code.
    docstrings = set()
    for node in ast.walk(tree):
        alone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if alone and isinstance(node.value.value, str):
            docstrings.add(node.lineno)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            file.functions[node.name] = node.end_lineno - node.lineno + 1
        if isinstance(node, ast.Import):
            file.imports |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            file.imports |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}

    # Lines with code are those on which a token that counts begins.
    code = set()
    with open(path, "rb") as f:
        for token in tokenize.tokenize(f.readline):
            # A remark behind code explains a name or a number; only what has a line of its own explains a step.
            if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
                file.comments += 1
            is_docstring = token.type == tokenize.STRING and token.start[0] in docstrings
            if token.type in KINDS and not is_docstring:
                file.tokens += 1
                code.add(token.start[0])
    file.code = len(code)
    return file


def python_files(root: Path) -> list[Path]:
    """All Python files below root but tests, hidden folders and what was built."""
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts[:-1]
        if not any(part in SKIPPED or part.startswith(".") for part in parts):
            found.append(path)
    return found


def import_graph(files: list[File]) -> dict[str, set[str]]:
    """Module -> the modules of the same checkout that it imports, wherever in the file."""
    # A package has the name of its folder.
    names = {}
    for file in files:
        parts = file.path.with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        names[".".join(parts)] = file

    # What the libraries give is no part of the graph.
    graph = {}
    for name, file in names.items():
        graph[name] = {other for other in file.imports if other in names and other != name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, by whatever way (Tarjan's strongly connected components)."""
    found = []
    index = {}  # module -> when it was first visited
    low = {}  # module -> the earliest visited one that it leads back to
    stack = []  # modules whose group is not complete yet

    def visit(name: str) -> None:
        index[name] = len(index)
        low[name] = index[name]
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        # Nothing from here on leads back before this module: all that was visited since is one group.
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return found


def row(name: str, files: list[File]) -> list[str]:
    """One line of the table: the sums over these files."""
    lines = sum(f.lines for f in files)
    code = sum(f.code for f in files)
    tokens = sum(f.tokens for f in files)
    comments = sum(f.comments for f in files)
    wide = sum(f.wide for f in files)
    functions = [n for f in files for n in f.functions.values()]
    too_long = [n for n in functions if n > LONG]
    # By the sums, not the mean of the files' own rates: a short file must not count as much as a long one.
    return [
        name,
        str(len(files)),
        f"{lines:,}",
        f"{tokens:,}",
        f"{tokens / (code or 1):.1f}",
        f"{100 * comments / (code or 1):.1f}",
        f"{100 * wide / (lines or 1):.1f}",
        f"{len(too_long)} of {len(functions)}",
        str(max(functions, default=0)),
    ]


HEAD = ["", "files", "lines", "tokens", "a line", "comments", "wide", f"over {LONG}", "longest"]


def table(rows: list[list[str]]) -> str:
    """Markdown, with columns of equal width."""
    widths = [max(len(r[i]) for r in [HEAD, *rows]) for i in range(len(HEAD))]
    rule = ["-" * w for w in widths]
    text = []
    for line in [HEAD, rule, *rows]:
        cells = [cell.ljust(w) for cell, w in zip(line, widths, strict=True)]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def report(root: Path) -> str:
    """The figures of one checkout."""
    files = [measure(path, root) for path in python_files(root)]
    top = [f for f in files if len(f.path.parts) == 1]
    path = [f for f in top if f.path.stem in (*EVENINGS[1], *EVENINGS[2])]
    rows = [row("all", files), row("root", top)]
    # Another checkout may have a file of one of these names by chance, but not several.
    if len(path) > 3:
        rows.append(row("reading path", path))
    folders = {f.path.parts[0] for f in files if len(f.path.parts) > 1}
    for folder in sorted(folders):
        inside = [f for f in files if f.path.parts[0] == folder]
        rows.append(row(f"{folder}/", inside))
    rows += [row(f.path.name, [f]) for f in top]

    graph = import_graph(files)
    found = circles(graph)
    text = f"{root.resolve().name}\n\n{table(rows)}\n\n"
    text += "tokens a code line; comment lines per 100 code lines; percent of lines over 110 columns; functions over 60 lines\n"
    text += f"imports between modules: {sum(map(len, graph.values()))}; circles: {found or 'none'}\n"
    return text


def reading(root: Path) -> str:
    """Evening, file, lines, minutes: the system in the order in which it explains itself."""
    lines = []
    for evening, names in EVENINGS.items():
        for name in names:
            length = measure(root / f"{name}.py", root).lines
            lines.append(f"| {evening} | `{name}.py` | {length} | {round(length / PACE)} |")
    return "\n".join(lines)


def main() -> None:
    here = Path(__file__).parent.parent
    if sys.argv[1:] == ["--reading"]:
        print(reading(here))
        return
    for folder in sys.argv[1:] or [here]:
        if not Path(folder).is_dir():
            sys.exit(f"error: {folder}: no such folder")
        print(report(Path(folder)))


if __name__ == "__main__":
    main()
