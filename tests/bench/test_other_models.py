"""bench/ with other models than usual: its rows are right, say what they are of, and lie in a file of their own."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import groups, peers, system
from bench import __main__ as main
from bench.measure import Bench
from checkpoint import InputError
from conftest import make_parts
from families.registry import PRESETS, family_of, load_language_model, load_model, preset
from pipeline import DuoGen, Settings, write_manifest
from training import run_script

SECOND = {"mllm": "tiny-qwen3-vl", "dit": "tiny-wan"}


def bench(tmp_path: Path, size: str = "smoke", group: str = "", **parts: str) -> Bench:
    return Bench("cpu", size, tmp_path / "bench.jsonl", group, parts=parts)


@pytest.mark.parametrize("group", ["guided", "mixed", "decode", "stage2", "stage1", "vision", "pictures", "memory"])
def test_rows_of_the_second_families_are_right(group, tmp_path):
    b = bench(tmp_path, group=group, **SECOND)
    groups.JOBS[group](b)
    assert b.rows
    for row in b.rows:
        assert "failed" not in row and not any("failed" in peer for peer in row["peers"].values()), row
        if "VAE" in row["what"]:
            continue
        assert all(SECOND[part] in row["shape"] for part in groups.PARTS[group] if group != "memory")
        assert any(name in row["shape"] for name in SECOND.values())
        if group not in ("mixed", "pictures", "memory"):
            assert row["peers"] and row["error"] <= 5e-5


def test_embeddings_that_are_also_the_last_layer(tmp_path, monkeypatch):
    """As those of the 2B: one matrix on both sides, in what is read and in what is learned."""
    tied = replace(preset("mllm", "tiny-qwen3-vl"), tie_word_embeddings=True)
    monkeypatch.setitem(PRESETS["mllm"], "tied", tied)
    b = bench(tmp_path, mllm="tied")
    groups.JOBS["decode"](b)
    groups.JOBS["stage1"](b)
    assert len(b.rows) == 2 and all(row["error"] <= 5e-5 and "failed" not in row for row in b.rows)


def test_stage_2_of_mixed_pairs(tmp_path):
    for mllm, dit in (("tiny", "tiny-wan"), ("tiny-qwen3-vl", "tiny")):
        b = bench(tmp_path, mllm=mllm, dit=dit)
        groups.JOBS["stage2"](b)
        (row,) = b.rows
        assert row["error"] <= 5e-5 and row["shape"].startswith(f"{mllm} reads, {dit} learns")


def test_the_document_of_a_checkpoint(tmp_path):
    """Random weights that like to paint: both pictures come out like the libraries', the second with the first before it."""
    folder = make_parts(tmp_path / "random", "qwen3_vl", "WanTransformer3DModel")
    write_manifest(folder, Settings(steps=2, guidance=3.0, max_tokens=20, max_images=2), (32, 32))
    mllm, tokenizer, _ = load_language_model(folder / "mllm")
    dit = load_model("dit", folder / "dit")
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        mllm.lm_head.weight[tokenizer.vision_start] *= 200
        # Gates that training opens are open.
        for p in dit.parameters():
            if not p.any():
                p.copy_(torch.randn(p.shape, generator=noise) * 0.1)
    mllm.save_pretrained(folder / "mllm")
    dit.save_pretrained(folder / "dit")
    assert len(DuoGen.from_pretrained(folder).generate("How do I draw a red house with a blue door?").pictures) == 2
    b = Bench("cpu", "cpu", tmp_path / "bench.jsonl", parts={"ckpt": str(folder)})
    groups.JOBS["document"](b)
    (row,) = b.rows
    assert row["error"] < 1e-3 and row["peers"]["transformers + diffusers"]["ms"] > 0 and str(folder) in row["shape"]


@pytest.mark.parametrize(("mllm", "dit"), [(None, None), ("qwen3-vl-2B", "wan2.1-1.3B"), ("3B", "14B")])
def test_published_sizes_meet_the_libraries_own_models(mllm, dit, tmp_path):
    """Every parameter by its name, on the meta device; embeddings that are also the last layer are one matrix there, too."""
    given = {part: name for part, name in {"mllm": mllm, "dit": dit}.items() if name}
    b = bench(tmp_path, "gpu", **given)
    language = system.mllm_config(b)
    painter = system.dit_config(b)
    assert painter.crossattn_proj_in_channels == language.features
    with torch.device("meta"):
        own = family_of(language).Model(language)
        theirs = peers.transformers_mllm(own)
        assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in own.parameters())
        assert (theirs.lm_head.weight is theirs.get_input_embeddings().weight) == language.tie_word_embeddings
        own = family_of(painter).Model(painter)
        theirs = peers.diffusers_dit(own)
        assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in own.parameters())
    # What is compiled first has all kernels and few layers.
    b.share = (0, 1)
    assert system.mllm_config(b).num_hidden_layers == system.FEWEST and system.dit_config(b).num_layers == 2


def asked(monkeypatch, *flags: str) -> tuple:
    """What the command would run."""
    calls = []
    monkeypatch.setattr(main, "run", lambda *args: calls.append(args) or 0)
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", *flags])
    with pytest.raises(SystemExit):
        main.command()
    return calls[0]


def test_flags_choose_the_groups_and_the_file(monkeypatch):
    usual, _, _, file, _, parts = asked(monkeypatch)
    assert usual == list(groups.ORDER) and file.name == "cpu.jsonl" and parts == {}
    chosen, _, _, file, _, parts = asked(monkeypatch, "--mllm", "tiny-qwen3-vl")
    assert set(chosen) == {"decode", "stage2", "stage1", "vision", "memory"} and parts == {"mllm": "tiny-qwen3-vl"}
    both, _, _, file, _, parts = asked(monkeypatch, "--mllm", "tiny-qwen3-vl", "--dit", "tiny-wan")
    assert file.name == "cpu_tiny-qwen3-vl_tiny-wan.jsonl" and {"guided", "pictures"} <= set(both) and parts == SECOND
    chosen, _, _, file, _, parts = asked(monkeypatch, "--ckpt", "runs/a b")
    assert chosen == ["document"] and file.name == "cpu_runs-a-b.jsonl" and parts == {"ckpt": "runs/a b"}
    assert asked(monkeypatch, "--dit", "tiny-wan", "--group", "vision")[0] == ["vision"]
    assert groups.PARTS.keys() <= set(groups.ORDER)


def stands(b: Bench) -> None:
    b.write(b.record("a row", b.preset("mllm")) | {"ms": 1.0})


def test_a_file_holds_the_rows_of_one_choice(tmp_path, monkeypatch):
    """The group's process is told of it, the first line says it, and two choices are not merged."""
    monkeypatch.setattr(groups, "JOBS", {"stands": stands})
    files = [tmp_path / "usual.jsonl", tmp_path / "second.jsonl"]
    for file, parts in zip(files, ({}, SECOND), strict=True):
        assert groups.run(["stands"], "cpu", "smoke", file, 1, parts) == 0
    first = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert [rows[1]["shape"] for rows in first] == ["tiny", "tiny-qwen3-vl"]
    assert "mllm" not in first[0][0] and first[1][0]["mllm"] == "tiny-qwen3-vl" and first[1][0]["dit"] == "tiny-wan"
    with pytest.raises(InputError, match="other models"):
        groups.merge(files, tmp_path / "both.jsonl")


def test_a_name_that_is_no_preset_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--mllm", "qwen9"])
    with pytest.raises(SystemExit) as stop:
        run_script(main.command)
    complaint = capsys.readouterr().err
    assert stop.value.code == 2 and complaint.count("\n") == 1 and "qwen9" in complaint
