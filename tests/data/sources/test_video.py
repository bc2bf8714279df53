"""Videos as frames, in the layouts of LLaVA-Video-178K and Video-ChatGPT."""

import io
import json
import shutil

from PIL import Image


def run(tmp_path, collected, rows, **more):
    path = tmp_path / "0_30_s_academic_v0_1_cap_processed.json"
    path.write_text(json.dumps(rows))
    return collected(format="video", annotations=[str(path)], videos=str(tmp_path / "videos"), **more)


def shades(pictures) -> list[int]:
    return [Image.open(io.BytesIO(data)).convert("L").getpixel((0, 0)) for data in pictures]


def row(name, mark="<image>", id_="a"):
    talk = [
        {"from": "human", "value": f"{mark}\nWhat happens?".lstrip()},
        {"from": "gpt", "value": "It grows brighter."},
    ]
    return {"id": id_, "conversations": talk, "data_source": "0_30_s_academic_v0_1", "video": name}


def test_a_video_becomes_its_frames(tmp_path, collected, video) -> None:
    (tmp_path / "videos/academic").mkdir(parents=True)
    shutil.copy(video, tmp_path / "videos/academic/a.mp4")
    rows = [row("academic/a.mp4"), row("academic/a.mp4", "<video>", "b"), row("academic/a.mp4", "", "c")]
    own = run(tmp_path, collected, rows, frames=4)
    for record in own.records:
        assert record.turns[0].question == "<image><image><image><image>\nWhat happens?"
    found = shades(own.pictures(0))
    assert len(found) == 4 and found == sorted(found) and found[3] - found[0] > 120
    assert own.pictures(1) == own.pictures(0)
    assert (own.folder / "media/academic/a.mp4").read_bytes() == video.read_bytes()


def test_a_short_video_shows_frames_twice(tmp_path, collected, video) -> None:
    (tmp_path / "videos").mkdir()
    shutil.copy(video, tmp_path / "videos/a.mp4")
    own = run(tmp_path, collected, [row("a.mp4")], frames=24)
    found = shades(own.pictures(0))
    assert len(found) == 24 and found == sorted(found) and len(set(found)) <= 12


def test_missing_and_damaged_videos(tmp_path, collected, video) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/cut.mp4").write_bytes(video.read_bytes()[:300])
    rows = [row("gone.mp4"), row("cut.mp4", id_="b"), row("../../etc/passwd", id_="c"), {"id": "d", "video": None}]
    own = run(tmp_path, collected, rows, frames=2)
    assert own.errors == ["", "", "", "'video' must be a path"]
    assert all("missing" in reason for reason in own.pictures(0))
    assert all(isinstance(reason, str) for reason in own.pictures(1) + own.pictures(2))
    assert set(own.skipped) == {"video:gone.mp4!0!2", "video:../../etc/passwd!0!2"}
