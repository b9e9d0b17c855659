"""tools/measure.py: what it counts, that it sees circles, and that the README's reading order still tells the truth."""

import re
from pathlib import Path

from tools import measure

ROOT = Path(__file__).parent.parent.parent


def test_lines_tokens_comments_and_functions_are_counted(tmp_path):
    text = '"""Not code,\nin two lines."""\n\n# why\nx = 1  # beside code\n\n\ndef f(a):\n    return [a,\n            x]\n'
    (tmp_path / "a.py").write_text(text)
    file = measure.measure(tmp_path / "a.py", tmp_path)
    assert (file.lines, file.code, file.comments, file.functions) == (10, 4, 1, {"f": 3})
    assert file.tokens == len("x = 1 def f ( a ) : return [ a , x ]".split())


def test_circles_are_found_wherever_the_import_stands(tmp_path):
    (tmp_path / "a.py").write_text("import b\n")
    (tmp_path / "b.py").write_text("def f():\n    from c import g\n")
    (tmp_path / "c.py").write_text("import a\nimport os\n")
    (tmp_path / "d.py").write_text("import a\n")
    graph = measure.import_graph([measure.measure(p, tmp_path) for p in measure.python_files(tmp_path)])
    assert graph == {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert measure.circles(graph) == [["a", "b", "c"]]


def test_the_report_leaves_tests_out(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("assert True\n")
    (tmp_path / "a.py").write_text("x = 1\n")
    text = measure.report(tmp_path)
    assert "| a.py" in text and "test_a" not in text and "circles: none" in text


def test_the_readme_gives_the_files_in_reading_order_with_their_lengths():
    """Within a tenth: a number that has to be changed with every commit would soon be wrong."""
    told = re.findall(r"^\| (\d) \| `(\w+)\.py` \| (\d+) \| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    true = re.findall(r"^\| (\d) \| `(\w+)\.py` \| (\d+) \| (\d+) \|", measure.reading(ROOT), re.M)
    assert [row[:2] for row in told] == [row[:2] for row in true]
    for (_, name, lines, minutes), (_, _, now, _) in zip(told, true, strict=True):
        assert abs(int(lines) - int(now)) <= max(5, 0.1 * int(now)), f"{name}.py: `python -m tools.measure --reading`"
        assert abs(int(minutes) - int(lines) / measure.PACE) <= 1
