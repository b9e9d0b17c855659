"""The engine: blocks, barriers, what is kept of a run that was ended, the same bytes always."""

import json
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("datatrove", reason="curate/requirements.txt is not installed")
from killed import digests
from steps import Coloured, Picky, Rare, Server, Slow, Told

import interrupt
from checkpoint import InputError
from curate.engine import Block, Job, Stage, concluded, described, heard, progress, run, split, stages
from curate.page import Page, Picture, Refused, document_of, page_of
from curate.store import read_pages, write_page
from data import Files

STEPS = (Picky(), Rare(), Told())
INPUTS = tuple((str(k), 1) for k in range(24))


def job(out, **changes) -> Job:
    return Job(**{"name": "toy", "source": Coloured(), "steps": STEPS, "inputs": INPUTS, "out": out, "tasks": 5} | changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run in one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(job(out))
    return out


def test_every_page_is_accounted_for(whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    for name, counts in manifest["counts"].items():
        dropped = sum(n for kind, n in counts.items() if kind.startswith("dropped: "))
        assert counts["in"] == counts.get("out", 0) + dropped, name
        if name != "00 Read":
            refused = sum(n for kind, n in counts.items() if kind.startswith("refused: ")) + counts.get("pictures dropped", 0)
            assert counts["pictures in"] == counts.get("pictures out", 0) + refused, name
    counts = manifest["counts"]
    assert counts["00 Read"]["in"] == 72
    assert counts["01 Picky"]["dropped: five"] == 2
    assert counts["01 Picky"]["dropped: failed in Picky"] == 2
    assert counts["01 Picky"]["refused: two"] == sum((k + 2) % 7 > 0 for k in range(24) if k != 5)
    assert manifest["records"] == counts["04 Valid"]["out"] == len((whole / "records.jsonl").read_text().splitlines())


def test_what_comes_out_is_data(whole):
    lines = Files([whole / "records.jsonl"])
    shards = Files(sorted((whole / "shards").glob("*.tar")))
    assert len(lines) == len(shards) > 0
    for k in range(len(lines)):
        a, b = lines[k], shards[k]
        for one, other in zip(a["messages"][1]["content"], b["messages"][1]["content"], strict=True):
            if one["type"] == "text":
                assert one == other
            else:
                assert one["image"].read_bytes() == other["image"]


def test_workers_and_tasks_do_not_show_in_the_records(whole, tmp_path):
    run(job(tmp_path / "two", workers=2))
    assert digests(tmp_path / "two") == digests(whole)
    run(job(tmp_path / "more", tasks=9))
    assert (tmp_path / "more" / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()


def test_a_dead_server_ends_the_run_and_a_living_one_goes_on(tmp_path):
    steps = (Server(str(tmp_path)), *STEPS)
    with pytest.raises(InputError, match="server does not answer"):
        run(job(tmp_path / "out", steps=steps))
    before = (tmp_path / "asked").read_text().split()
    assert not (tmp_path / "out" / "records.jsonl").exists()
    (tmp_path / "alive").touch()
    run(job(tmp_path / "out", steps=steps))
    asked = (tmp_path / "asked").read_text().split()[len(before) :]
    # What was marked as completed is not done again: only the task that was under way.
    assert "0-1" in before and "0-1" not in asked and "22-1" in asked
    run(job(tmp_path / "other", steps=steps))
    assert digests(tmp_path / "other") == digests(tmp_path / "out")


def test_an_unfinished_file_of_a_killed_process_does_no_harm(whole, tmp_path):
    out = tmp_path / "out"
    folder = out / "work" / "stage-0" / "pages"
    folder.mkdir(parents=True)
    (folder / "00001.pages.4242.part").write_bytes(b"half a page")
    (folder / "00002.pages").write_bytes(b"written, but its task was not marked as completed")
    run(job(out))
    assert digests(out) == digests(whole)


def test_a_survey_begins_a_stage_and_surveys_share_one():
    steps = [Picky(), Rare(1), Rare(2), Told(), Rare(3)]
    assert [[n for n, _ in part] for part in split(steps)] == [[1], [2, 3, 4], [5]]
    assert [[n for n, _ in part] for part in split([Rare()])] == [[], [1]]


def test_a_survey_is_asked_of_all_pages(whole):
    found = json.loads((whole / "work" / "found-02.json").read_text())
    assert found["Look: Words of 1."] == 2 and found["Words of 1.\n\nThe end."] == 1
    assert concluded(whole / "work" / "found-02.json", 0) == found


def test_threads_keep_the_order(tmp_path):
    pages = [page for k in range(12) for page in Coloured().read(str(k)) if isinstance(page, Page)]
    block = Block(1, Slow())
    began = time.perf_counter()
    out = [document.id for document in block.run(map(document_of, pages))]
    assert out == [page.id for page in pages]
    assert time.perf_counter() - began < 0.01 * len(pages), "one after the other"


def test_a_page_on_disk_is_the_page(tmp_path):
    pages = [
        Page("1", "http://a", "T", "de", ("half a pair \ud800", Picture("b", b"\n{}\0", "s", 3, 4, "alt", "c", "photo"), "x"),
             (Refused("c", "why: so"),), ({"role": "user", "content": "?"},), {"a": [1, None]}),
        Page("2"),
    ]  # fmt: skip
    with open(tmp_path / "pages", "wb") as file:
        for page in pages:
            write_page(file, page)
    assert list(read_pages(tmp_path / "pages")) == pages
    assert [page_of(document_of(page)) for page in pages] == pages


def test_what_decides_the_output_cannot_change_under_way(whole, tmp_path, capsys):
    run(job(whole))
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(InputError, match="begun with other steps"):
        run(job(whole, steps=(Picky(), Rare(3), Told())))
    (tmp_path / "mine").write_text("not the engine's")
    with pytest.raises(InputError, match="no folder of this command"):
        run(job(tmp_path))


def test_a_folder_has_one_run_at_a_time(tmp_path):
    (tmp_path / "work").mkdir()
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "work" / "lock"], stdout=-1, stdin=-1) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match="another run is at work"):
            run(job(tmp_path))
        other.stdin.close()


def test_a_signal_whose_exception_was_lost_comes_again(tmp_path):
    """In the midst of a fork Python drops it."""
    asked = threading.Event()
    asked.set()
    with pytest.raises(KeyboardInterrupt), progress(job(tmp_path), Stage("stage-0", [], 1), asked):
        time.sleep(30)


@pytest.mark.parametrize(("lost", "told"), [(KeyboardInterrupt, 0), (interrupt.Terminated, 0), (ValueError, 1)])
def test_a_lost_interrupt_leaves_no_traceback(lost, told, monkeypatch):
    class Fork:
        def __del__(self):
            raise lost

    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    with heard():
        Fork()
    assert len(printed) == told


def test_the_manifest_names_every_threshold():
    assert described(Rare(7)) == {"name": "Rare", "most": 7}
    assert described(Server("/somewhere")) == {"name": "Server", "folder": "", "fails_at": "22-1"}


def test_the_report_shows_every_step_and_its_reasons(whole):
    page = (whole / "index.html").read_text()
    for words in ("01 Picky", "five: begins so", "never seen an eight", "two: ends so", "Look: Words of", "data:image/jpeg"):
        assert words in page, words
    assert "http" not in page.replace("http://a/", "").replace("http-equiv", "")


def test_slurm_gets_a_chain_of_jobs(tmp_path, monkeypatch):
    """One job for each stage, each after the one before; sbatch is a stand-in that writes down what it gets."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        f'#!/bin/bash\ncat "${{@: -1}}" > {tmp_path}/job.$$\necho "$@" >> {tmp_path}/calls\necho Submitted batch job $$\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    out = tmp_path / "out"
    run(job(out, how="slurm", workers=3))
    names = [stage.name for stage in stages(job(out))]
    assert names == ["stage-0", "found-02", "stage-1", "finish"]
    scripts = [(out / "work" / name / "launch_script.slurm").read_text() for name in names]
    assert "#SBATCH --array=0-4%3" in scripts[0] and "#SBATCH --array=0-0%3" in scripts[1]
    assert all("launch_pickled_pipeline" in script for script in scripts)
    calls = [call for call in (tmp_path / "calls").read_text().splitlines() if "RUN_OFFSET" in call]
    assert len(calls) == 4 and sum("--dependency=afterok:" in call for call in calls) == 3
    assert isinstance(stages(job(out))[0], Stage)
