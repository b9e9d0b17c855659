"""All nine benchmarks end to end, two items each, judged by the miniature's own language model and by a real server.

The server is `transformers serve`; the command in nine.py does the same with any number of items.
"""

import json
from pathlib import Path

import nine
import published
import pytest
import served

from evaluate.benchmark import names


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if lacking := served.lacking():
        pytest.skip(f"no real server: {', '.join(lacking)} are not installed (pip install transformers fastapi uvicorn openai)")
    with served.served(tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.mark.parametrize("name", names())
def test_a_benchmark_runs_from_items_to_report(name, server, tmp_path, monkeypatch):
    monkeypatch.setattr(nine, "WRITTEN", 8)
    sampling = ["--steps", "1", "--max_images", "1", "--max_tokens", "40", "--device", "cpu"]
    rows = nine.run(tmp_path / name, name, 2, None, *server, *sampling)
    assert [row[3] for row in rows] == ["self", "server"] and {row[1] for row in rows} == {"2"}
    own, other = (dict(zip(nine.HEAD, row, strict=True)) for row in rows)
    # The own model has an opinion on all; what the server's says in words is counted, whatever it is.
    assert own["refused"] == own["unparsable"] == "0"
    assert sum(int(own[why]) for why in ("judged", "missing")) == sum(int(other[why]) for why in nine.WHYS)
    report = json.loads((tmp_path / name / "report.json").read_text())
    assert len(report["judges"]) == 2 and (tmp_path / name / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("name", [name for name in names() if name not in published.OWN])
def test_items_in_the_published_form_are_read_with_the_real_prompts_too(name, shared, tmp_path):
    from evaluate.answers import items_of
    from evaluate.benchmark import find

    items = published.write_items(tmp_path, name, 20, shared)
    requests, _ = items_of(find(name), str(items), None)
    assert len(requests) == 20
    pictures = [p["image"] for r in requests for m in r.messages for p in m["content"] if p["type"] == "image"]
    assert all(Path(picture).is_file() for picture in pictures)
