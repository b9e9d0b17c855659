"""`python -m curate show`: what every step makes of one page."""

import shutil
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="curate/requirements.txt is not installed")

from checkpoint import InputError
from curate.show import main

EXAMPLE = Path(__file__).parent.parent.parent / "curate" / "example" / "cat.html"


def sections(said: str) -> dict[str, list[str]]:
    """{name of a step: its lines}"""
    found: dict[str, list[str]] = {}
    for line in said.splitlines():
        if not line.startswith(" "):
            name, _, rest = line[3:].partition(": ")
            found[name] = [rest]
        else:
            found[name].append(line.strip())
    return found


def test_the_example_loses_what_is_litter_and_keeps_its_pictures_in_order(capsys):
    main([str(EXAMPLE)])
    steps = sections(capsys.readouterr().out)
    assert "! ads/crayons.png: not in the main text" in steps["Extract"]
    assert "+ [step-1.png: A pink oval]" in steps["Extract"]  # behind a data: address, in data-src
    assert steps["Language"] == ["166 words, 7 pictures", "+ language: en"]
    assert steps["Sides"][1:] == ["- [small-cat.png: ]", "! small-cat.png: small: 40 x 40"]
    assert steps["DifferentPictures"][0] == "166 words, 4 pictures"
    assert any(line.startswith("+ Did it work? Send a photo of your cat to [e-mail]") for line in steps["Personal"])
    shown = [line for line in steps["Dialogue"] if "[step-" in line]
    assert shown == [f"+     [step-{k}.png]" for k in (1, 2, 3, 4)]
    assert steps["Valid"] == ["as it was"] and len(steps) == 25


def test_the_step_that_drops_a_page_is_the_last_one_shown(capsys, tmp_path):
    (tmp_path / "page.html").write_text("<html><body><p>Too few words.</p></body></html>")
    main([str(tmp_path / "page.html")])
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith("03 Language: dropped: language unsure")


def test_another_threshold_and_whole_lines(capsys):
    main([str(EXAMPLE), "--set", "Sides.least=20", "--whole"])
    steps = sections(capsys.readouterr().out)
    assert steps["Sides"] == ["as it was"]
    assert any(line.endswith("crayons that are not too hard will do.") for line in steps["Extract"])


@pytest.mark.parametrize("name, words", [("none.html", "no such file"), (".", "must be one file")])
def test_what_is_no_page(tmp_path, name, words):
    shutil.copy(EXAMPLE, tmp_path / "one.html")
    shutil.copy(EXAMPLE, tmp_path / "two.html")
    with pytest.raises(InputError, match=words):
        main([str(tmp_path / name)])
