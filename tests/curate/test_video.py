"""The data engine's videos: films rendered here, whose cuts and motion are known, and files that are none."""

import json
import wave
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("av", reason="curate/requirements.txt is not installed")
pytest.importorskip("scenedetect", reason="curate/requirements.txt is not installed")
pytest.importorskip("cv2", reason="curate/requirements.txt is not installed")
pytest.importorskip("datatrove", reason="curate/requirements.txt is not installed")
pytest.importorskip("trafilatura", reason="curate/requirements.txt is not installed")

import film
from film import Scene, Thing

from checkpoint import InputError
from curate import motion, video
from curate.models import Model
from curate.page import Dropped, Page
from curate.shots import RATE, Film, Shot, Unreadable, shots, windows
from curate.wording import words as words_of
from evaluate.judges import Unanswered
from records.validate import load_image

SIZE = (180, 320)
RED = (210, 40, 40)
BLUE = (40, 60, 210)


def through(page: Page) -> Page | Dropped:
    """What the steps make of a page."""
    for step in video.steps_of(Model()):
        page = step(page)
        if isinstance(page, Dropped):
            break
    return page


def pages(path, **settings) -> list[Page | Dropped]:
    return [each if isinstance(each, Dropped) else through(each) for each in video.Clips(**settings).read(str(path))]


def reasons(results: list[Page | Dropped]) -> list[str]:
    return [each.reason.partition(":")[0] for each in results if isinstance(each, Dropped)]


# -------------------------------------------------------------------------------------------------------------------- shots


def test_cuts_and_fades_are_found_to_the_frame(tmp_path):
    """F1 of 1 here: F1 >= 0.99 means that of 16 cuts none may be wrong."""
    rate = 12
    scenes = []
    for k in range(17):
        still = Scene(1.0 + 0.25 * (k % 3), seed=k)
        moving = (
            still,
            replace(still, pan=(0.5, 0)),
            replace(still, zoom=1.4),
            replace(still, things=(Thing((0.3, 0.5), (0.4, 0)),)),
        )
        scenes.append(moving[k % 4])
    # Two of the cuts are fades through black.
    for k in (4, 11):
        scenes[k] = replace(scenes[k], fade_out=0.5)
        scenes[k + 1] = replace(scenes[k + 1], fade_in=0.5)
    path = film.write(tmp_path / "cuts.mp4", film.pictures(scenes, SIZE, rate), rate)
    truth = np.cumsum([scene.seconds for scene in scenes])[:-1]
    watched = shots(path)
    assert watched.frames == sum(round(scene.seconds * rate) for scene in scenes)
    hits = 0
    for seconds, scene in zip(truth, scenes, strict=False):
        near = 0.5 if scene.fade_out else 1e-3
        hits += any(abs(cut - seconds) <= near for cut in watched.cuts)
    f1 = 2 * hits / (len(truth) + len(watched.cuts))
    assert f1 >= 0.99, (truth.tolist(), watched.cuts)


def test_the_shortest_shot_is_told_in_seconds(tmp_path):
    """At 6 frames a second the library's own 15 frames would be 2.5 s."""
    path = film.write(tmp_path / "slow.mp4", film.pictures([Scene(1.0, seed=k) for k in range(5)], SIZE, 6), 6)
    assert np.allclose(shots(path).cuts, [1, 2, 3, 4])
    assert np.allclose(shots(path, least=1.5).cuts, [2, 4])


def test_times_are_those_of_the_frames_where_the_rate_varies(tmp_path):
    """60 frames in the first two seconds, then 10 a second: by their number the cut would stand elsewhere."""
    times = [round(n * 1000 / 30) for n in range(60)] + [2000 + 100 * n for n in range(30)]
    frames = [
        *film.pictures([Scene(2.0, seed=1, pan=(0.2, 0))], SIZE, 30),
        *film.pictures([Scene(3.0, seed=2, pan=(0.3, 0))], SIZE, 10),
    ]
    path = film.write(tmp_path / "varies.mkv", frames, 30, times=times, codec="libx264")
    watched = shots(path)
    assert watched.cuts == pytest.approx([2.0], abs=0.002)
    assert watched.seconds == pytest.approx(5.0, abs=0.15)
    found = [each for each in pages(path, seconds=1.5) if isinstance(each, Page)]
    assert [each.notes["shot"] for each in found] == [0, 1]
    assert found[1].url.endswith("#t=2.100,3.600")


def test_clips_lie_within_shots():
    assert np.allclose(windows(Shot(10.0, 21.0), 5.0), [(10.1, 15.1), (15.1, 20.1)])
    assert windows(Shot(10.0, 15.0), 5.0) == []


def test_bounds_and_frames_of_clips(tmp_path):
    """Each scene has its own colour, so that a frame tells which scene it is of."""
    colours = [(190, 60, 60), (60, 170, 60), (70, 70, 190)]
    lengths = [2.5, 1.5, 4.5]
    worlds = [film.texture(k, (540, 960), colour) for k, colour in enumerate(colours)]
    scenes = [Scene(s, world=world, pan=(0.3, 0)) for s, world in zip(lengths, worlds, strict=True)]
    path = film.write(tmp_path / "bounds.mp4", film.pictures(scenes, SIZE, 12), 12)
    results = pages(path, seconds=2.0)
    assert reasons(results) == ["short shot"]
    found = [each for each in results if isinstance(each, Page)]
    bounds = [[float(t) for t in each.url.partition("#t=")[2].split(",")] for each in found]
    # A shot's first tenth of a second is left out: the frame behind it is the second of twelve.
    starts = [0.0, 4.0, 6.0]
    for (start, end), true in zip(bounds, starts, strict=True):
        assert true + 0.1 <= start <= true + 0.1 + 1 / 12 + 0.02
        assert 2.0 - 0.1 <= end - start <= 2.0
    for each, scene in zip(found, (0, 2, 2), strict=True):
        for picture in each.pictures:
            assert np.asarray(load_image(picture.data)).mean(axis=(0, 1)).argmax() == scene


def test_pictures_are_upright_and_no_larger_than_asked_for(tmp_path):
    scene = Scene(1.5, seed=3, things=(Thing((0.2, 0.2), (0.2, 0), size=0.3, colour=RED, box=True),))
    for rotation, corner in ((0, (0.2, 0.2)), (90, (0.2, 0.8)), (180, (0.8, 0.8)), (-90, (0.8, 0.2))):
        frames = film.render(scene, (240, 426), [n / 12 for n in range(18)])
        path = film.write(tmp_path / f"turned{rotation}.mp4", frames, 12, rotation=rotation)
        page = next(video.Clips(seconds=1.0, side=213).read(str(path)))
        first = page.pictures[0]
        assert (first.width, first.height) == ((213, 120) if rotation % 180 == 0 else (120, 213))
        # rotation counts against the clock: what was at the top left is then at the bottom left.
        pixels = np.asarray(load_image(first.data)).astype(int)
        redness = pixels[..., 0] - pixels[..., 1:].max(axis=-1)
        ys, xs = np.nonzero(redness > 0.8 * redness.max())
        assert xs.mean() / first.width == pytest.approx(corner[0], abs=0.12)
        assert ys.mean() / first.height == pytest.approx(corner[1], abs=0.12)


# -------------------------------------------------------------------------------------------------------------------- words

WORDS = [
    (Scene(3, pan=(0.3, 0)), "The camera pans to the right."),
    (Scene(3, pan=(-0.5, 0)), "The camera pans to the left."),
    (Scene(3, pan=(0, -0.3)), "The camera pans up."),
    (Scene(3, pan=(0, 0.2)), "The camera pans down."),
    (Scene(3, pan=(0.25, 0.4)), "The camera pans down and to the right."),
    (Scene(3, zoom=1.3), "The camera zooms in."),
    (Scene(3, zoom=0.7), "The camera zooms out."),
    (Scene(3, turn=15), "The camera turns counterclockwise."),
    (
        Scene(3, things=(Thing((0.2, 0.5), (0.4, 0), colour=RED),)),
        "The camera stays still. Something red on the left moves to the right.",
    ),
    (
        Scene(3, things=(Thing((0.8, 0.8), (0, -0.5), colour=BLUE, box=True),)),
        "The camera stays still. Something blue at the bottom right moves up.",
    ),
    (
        Scene(3, pan=(0.2, 0), things=(Thing((0.8, 0.2), (-0.2, 0.35), colour=RED),)),
        "The camera pans to the right. Something red at the top right moves down and to the left.",
    ),
    (
        Scene(3, zoom=1.25, things=(Thing((0.6, 0.5), (-0.25, 0), colour=BLUE),)),
        "The camera zooms in. Something blue in the middle moves to the left.",
    ),
    (
        Scene(3, things=(Thing((0.8, 0.2), since=0.5, colour=RED),)),
        "The camera stays still. Something red appears at the top right.",
    ),
    (
        Scene(3, things=(Thing((0.2, 0.5), until=0.5, colour=BLUE, box=True),)),
        "The camera stays still. Something blue disappears on the left.",
    ),
    (
        Scene(3, things=(Thing((-0.2, 0.5), (0.6, 0), colour=RED),)),
        "The camera stays still. Something red comes in on the left and moves to the right.",
    ),
    (
        Scene(3, things=(Thing((0.5, 0.5), (0.65, 0), size=0.25, colour=RED),)),
        "The camera stays still. Something red in the middle moves to the right and leaves the picture.",
    ),
]


def test_words_say_what_the_renderer_did():
    right = 0
    wrong = []
    for k, (scene, words) in enumerate(WORDS):
        frames = list(film.render(replace(scene, seed=40 + k), SIZE, [n / RATE for n in range(3 * RATE + 1)]))
        measured = motion.measure(frames)
        assert motion.motion_of(json.loads(json.dumps(measured.as_json()))).as_json() == measured.as_json()
        said = words_of(measured)
        right += said == words
        if said != words:
            wrong.append((words, said))
    assert right >= 0.95 * len(WORDS), wrong


def test_nothing_is_said_where_nothing_can_be_followed():
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 255, (*SIZE, 3), dtype=np.uint8) for _ in range(8)]
    page = video.page_of_clip("noise.mp4", 0, video.Clip(0.0, 1.0, noise[0], noise[-1], noise))
    assert video.Clear()(page).reason.startswith("unclear: 0.")
    grey = [np.full((*SIZE, 3), level, np.uint8) for level in range(40, 200, 20)]
    measured = motion.measure(grey)
    assert measured.camera.unclear == 1
    assert words_of(measured) == ""


def test_a_still_plain_wall_is_a_still_camera():
    frames = [np.full((*SIZE, 3), 128, np.uint8)] * 5
    assert words_of(motion.measure(frames)) == "The camera stays still."


# -------------------------------------------------------------------------------------------------------------------- steps


def test_what_is_of_no_use_is_dropped_by_measure(tmp_path):
    rate = 12
    moving = Scene(1.5, seed=5, pan=(0.4, 0))
    film_of = {
        "dark": [(0.1 * each).astype(np.uint8) for each in film.pictures([moving], SIZE, rate)],
        "static": list(film.pictures([Scene(1.5, seed=6)], SIZE, rate)),
        "cut": list(film.pictures([moving, replace(moving, seed=7)], SIZE, rate)),
    }
    smooth = np.linspace(60, 200, 320)[None, :, None] + np.linspace(-40, 40, 180)[:, None, None]
    film_of["blurred"] = [np.repeat(smooth + 2 * n, 3, axis=2).astype(np.uint8) for n in range(18)]
    for kind, frames in film_of.items():
        path = film.write(tmp_path / f"{kind}.mp4", frames, rate)
        # Of the cut, no detector is told.
        results = pages(path, seconds=1.2, content=255.0)
        assert kind in reasons(results), (kind, results)
        assert all(any(c.isdigit() for c in each.reason) for each in results if isinstance(each, Dropped))
    kept = [each for each in pages(film.write(tmp_path / "good.mp4", film.pictures([moving], SIZE, rate), rate), seconds=1.2)]
    assert reasons(kept) == [] and len(kept) == 1


def test_no_clip_holds_a_dissolve(tmp_path):
    scenes = [Scene(3.0, seed=60 + k, pan=(0.3, 0)) for k in range(4)]
    path = film.write(tmp_path / "dissolves.mp4", film.pictures(scenes, SIZE, 12, dissolve=0.5), 12)
    for each in pages(path, seconds=2.0):
        if isinstance(each, Page):
            start, end = map(float, each.url.partition("#t=")[2].split(","))
            assert not any(start < seconds - 0.3 and end > seconds for seconds in (3.0, 6.0, 9.0)), each.url


class Saying:
    """A model that says one thing."""

    def __init__(self, words: str):
        self.words = words

    def write(self, asked, max_tokens):
        assert [getattr(part, "width", 0) > 0 for part in asked] == [True, True, False]
        assert "pans to the right" in asked[2] and "3 seconds" in asked[2]
        if not self.words:
            raise Unanswered("nobody is there")
        return self.words


def a_page() -> Page:
    frames = list(film.render(Scene(3, seed=1, pan=(0.3, 0)), SIZE, [n / RATE for n in range(25)]))
    return video.page_of_clip("film.mp4", 0, video.Clip(0.0, 3.0, frames[0], frames[-1], frames))


def test_a_models_words_are_used_unless_they_break_a_rule():
    page = a_page()
    told = video.Told(Saying("A red bus drives from left to right while the camera follows it."))(page)
    assert told.parts[1] == "A red bus drives from left to right while the camera follows it."
    assert told.messages[0]["content"][1]["text"].count(told.parts[1]) == 1
    for words, reason in (
        ("", "no answer"),
        ("Yes.", "1 words"),
        ("word " * 91, "91 words"),
        ("**The camera** pans over a wide street.", "not plain text"),
        ("In the second image the bus has gone.", "speaks of the second image"),
        ("I cannot see what happens between them.", "speaks of itself"),
    ):
        told = video.Told(Saying(words))(page)
        assert told.parts[1] == "The camera pans to the right."
        assert told.notes["words refused"].startswith(reason)


# -------------------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Files that are no videos, or no longer whole, by the reason that they must be given."""
    folder = tmp_path_factory.mktemp("hostile")
    frames = list(film.pictures([Scene(3.0, seed=8, pan=(0.3, 0))], SIZE, 12))
    whole = film.write(folder / "whole.mkv", frames, 12, codec="libx264").read_bytes()
    mp4 = film.write(folder / "good.mp4", frames, 12).read_bytes()
    (folder / "whole.mkv").unlink()
    files = {
        "empty.mp4": (b"", "empty file"),
        "noise.mp4": (np.random.default_rng(0).bytes(20_000), "broken"),
        "text.avi": (b"this is no video " * 500, "broken"),
        "headless.mp4": (mp4[: len(mp4) // 2], "broken"),
        "cutoff.mkv": (whole[: len(whole) // 2], "truncated"),
        "list.ts": (f"#EXTM3U\n#EXTINF:3,\n{folder}/good.mp4\n#EXT-X-ENDLIST\n".encode(), "broken"),
        "list.mov": (f"ffconcat version 1.0\nfile '{folder}/good.mp4'\n".encode(), "format"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    with wave.open(str(folder / "sound.ts"), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes(bytes(16000))
    return folder, {name: reason for name, (_, reason) in files.items()} | {"sound.ts": "no moving pictures"}


def test_files_that_are_no_videos_are_named_and_survived(hostile):
    folder, expected = hostile
    for name, reason in expected.items():
        results = pages(folder / name, seconds=1.0)
        assert reasons(results)[:1] == [reason], (name, results)
    assert any(isinstance(each, Page) for each in pages(folder / "cutoff.mkv", seconds=1.0))
    with pytest.raises(Unreadable, match="no file"):
        Film(folder / "nowhere.mp4")


def test_the_command_makes_records_and_counts_all_the_rest(hostile, tmp_path):
    folder, expected = hostile
    out = tmp_path / "out"
    video.main([str(folder), "--out", str(out), "--seconds", "1", "--side", "96"])
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["decoder"]["PyAV"] and manifest["decoder"]["libavcodec"].count(".") == 2
    counts = manifest["counts"]["00 Read"]
    for reason in set(expected.values()):
        assert counts[f"dropped: {reason}"] >= 1
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert len(records) == manifest["records"] >= 3
    for record in records:
        asked, shown = record["messages"]
        assert [part["type"] for part in asked["content"]] == ["image", "text"]
        assert "pans to the right" in asked["content"][1]["text"]
        assert [part["type"] for part in shown["content"]] == ["image"]
        assert load_image(out / shown["content"][0]["image"]).size == (96, 54)


def test_bad_flags_are_one_line(tmp_path):
    with pytest.raises(InputError, match="--seconds 0: must be more than 0"):
        video.main([str(tmp_path), "--out", str(tmp_path / "out"), "--seconds", "0"])
    with pytest.raises(InputError, match="no video in it"):
        video.main([str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match="no such file"):
        video.main([str(tmp_path / "gone.mp4"), "--out", str(tmp_path / "out")])
