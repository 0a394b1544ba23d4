"""Frames of videos against a bar code in the pictures: what is stored with a pose was shown at its time."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from clips import CLIPS, NUM_FRAMES, Clip, is_upright, number_of, turn, write_clip
from PIL import Image

from raev2.errors import DataError
from raev2_data_recipes.drives.video_poses import VIDEO
from raev2_tasks.nwm.data import video_frames
from raev2_tasks.nwm.data.trajectories import read_trajectories
from raev2_tasks.nwm.data.video_frames import read_frames, timeline

pytest.importorskip("av")
PLAIN = Clip(".mp4", "libx264", options={"preset": "ultrafast"})


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every clip, with poses that tell the time: a robot that drives 1 m/s along x from the first frame shown."""
    folder = tmp_path_factory.mktemp("clips")
    for number, clip in enumerate(CLIPS.values()):
        write_clip(clip, folder / f"{number:02d}{clip.suffix}")
        rows = [f"{t:.3f},{t:.3f},0,0" for t in np.arange(0, 5, 0.05)]
        (folder / f"{number:02d}.csv").write_text("\n".join(["t,x,y,yaw", *rows]))
    return folder


def build(src: Path, out: Path, **options: str) -> dict[str, tuple[np.ndarray, list[int]]]:
    """By video: the times that the poses tell, and the numbers that the pictures show."""
    VIDEO.build(out, {"src": str(src), "format": "png", "split": "nwm-legacy"} | options)
    found: dict[str, tuple[np.ndarray, list[int]]] = {}
    for split in ("train", "val"):
        for one in read_trajectories(out, split):
            pictures = [np.asarray(Image.open(one.frame_file(index))) for index in range(len(one))]
            found[one.id] = (one.poses[:, 0], [number_of(pixels) for pixels in pictures])
    return found


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_every_picture_has_the_pose_of_the_time_at_which_it_is_shown(clips, decoder, tmp_path):
    if decoder == "decord":
        pytest.importorskip("decord")
    found = build(clips, tmp_path / "out", rate_hz="15", decoder=decoder)
    assert len(found) == len(CLIPS) >= 14
    wrong = {}
    for (name, clip), (told, numbers) in zip(CLIPS.items(), (found[key] for key in sorted(found)), strict=True):
        shown = clip.times()
        visible = shown[shown > -1e-6]
        assert len(numbers) >= (len(visible) - 1) // 2 >= 40
        true = shown[numbers] - visible[0]
        wrong[name] = int((np.abs(true - told) > 0.002).sum())  # mkv and webm count milliseconds
    assert wrong == dict.fromkeys(CLIPS, 0)


def test_all_frames_of_a_clip_come_in_order_and_once(clips):
    for number, (name, clip) in enumerate(CLIPS.items()):
        file = clips / f"{number:02d}{clip.suffix}"
        first = NUM_FRAMES - int((clip.times() > -1e-6).sum())
        for shown in (timeline(file), timeline(file, decode=True)):
            pictures = read_frames(file, shown, range(len(shown)))
            assert [number_of(picture) for _, picture in pictures] == list(range(first, NUM_FRAMES)), name
            np.testing.assert_allclose(shown.t, clip.times()[first:] - clip.times()[first], atol=0.002)


def test_a_late_part_is_not_decoded_from_the_beginning_and_is_the_same(clips, monkeypatch):
    monkeypatch.setattr(video_frames, "LATE_S", 1.0)
    for number, clip in enumerate(CLIPS.values()):
        file = clips / f"{number:02d}{clip.suffix}"
        shown = timeline(file)
        first = NUM_FRAMES - int((clip.times() > -1e-6).sum())
        for start in range(20, len(shown), 7):
            ((_, picture),) = read_frames(file, shown, [start])
            assert number_of(picture) == first + start


def test_an_edit_list_with_one_pose_too_many_is_an_error_with_both_numbers(tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    for name in "ab":
        write_clip(CLIPS["h264 trimmed by an edit list, mp4"], src / f"{name}.mp4")
    rows = {name: [f"{i},{i},0,0" for i in range(count)] for name, count in (("a", NUM_FRAMES), ("b", NUM_FRAMES - 15))}
    for name, lines in rows.items():
        (src / f"{name}.csv").write_text("\n".join(["frame,x,y,yaw", *lines]))
    found = build(src, tmp_path / "out", rate_hz="10", segment_s="2", reading="plain")
    assert set(found) == {"b_0", "b_1"}
    numbers = found["b_0"][1] + found["b_1"][1]
    np.testing.assert_allclose(np.array(numbers) - 15, np.concatenate([found["b_0"][0], found["b_1"][0]]), atol=1e-6)
    (reject,) = map(json.loads, (tmp_path / "out" / "rejects.jsonl").read_text().splitlines())
    assert reject["reason"].startswith("video a: different numbers of visible frames and poses; got 106 and 121;")


# Display matrices: x' = a x + c y, y' = b x + d y as (a, b, c, d).
TURNS = {
    "90": (0, 1, -1, 0), "180": (-1, 0, 0, -1), "270": (0, -1, 1, 0), "mirrored": (-1, 0, 0, 1),
    "upside down": (1, 0, 0, -1), "turned and mirrored": (0, 1, 1, 0), "none": (1, 0, 0, 1),
}  # fmt: skip


def laid_down(picture: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """A picture as a camera stores it so that `matrix` shows it as `picture`: pixel by pixel, from the definition."""
    a, b, c, d = matrix
    height, width = picture.shape[:2]
    rows, columns = (width, height) if a == 0 else (height, width)
    y, x = np.mgrid[:rows, :columns]
    shown_x, shown_y = a * x + c * y, b * x + d * y
    return picture[shown_y - shown_y.min(), shown_x - shown_x.min()]


@pytest.mark.parametrize("name", list(TURNS))
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_a_picture_is_upright_whatever_the_display_matrix(name, decoder, tmp_path):
    import av
    from clips import picture

    file = tmp_path / "a.mp4"
    stored = np.ascontiguousarray(laid_down(picture(5), TURNS[name]))
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = *stored.shape[:2], "yuv420p"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(stored, format="rgb24")))
        container.mux(stream.encode())
    turn(file, TURNS[name])
    for _, pixels in read_frames(file, timeline(file), [0, 3], decoder):
        assert pixels.shape == picture(5).shape and number_of(pixels) == 5 and is_upright(pixels)


def test_decord_serves_only_where_its_pictures_are_those_of_pyav(clips, caplog):
    pytest.importorskip("decord")
    caplog.set_level(logging.INFO)
    names = list(CLIPS)

    def said(name: str) -> str:
        caplog.clear()
        file = clips / f"{names.index(name):02d}{CLIPS[name].suffix}"
        shown = timeline(file)
        assert len(list(read_frames(file, shown, range(0, len(shown), 3), "decord"))) == -(-len(shown) // 3)
        return caplog.text

    assert "decord shows the same 16 pictures as PyAV and is used" in said("h264 with B-frames, mp4")
    assert "decord shows another picture at" in said("hevc with open GOPs, mp4")
    assert "frames have no times to ask decord for, decoding with PyAV" in said("h264 with B-frames, avi")
    assert "decord failed (" in said("av1, mp4") and "decoding with PyAV" in caplog.text
    assert "has no presentation times; taken as a steady 30 frames a second" in said("h264 with B-frames, avi")


def test_a_decoder_that_hangs_is_given_up(tmp_path, caplog):
    file = write_clip(PLAIN, tmp_path / "a.mp4")
    found = list(read_frames(file, timeline(file), [0, 4], "decord", time_limit_s=0.01))
    assert [number_of(picture) for _, picture in found] == [0, 4]
    assert "decord gave no answer in 0.01 s, decoding with PyAV" in caplog.text


def test_a_file_is_decoded_once_with_one_picture_in_memory(tmp_path, monkeypatch):
    src = tmp_path / "src"
    src.mkdir()
    for name in "ab":
        write_clip(PLAIN, src / f"{name}.mp4")
        (src / f"{name}.csv").write_text("\n".join(["t,x,y,yaw", *(f"{i / 10},{i / 10},0,0" for i in range(50))]))
    passes: list[Path] = []
    decoded = video_frames._decoded

    def counted(file: Path, seek_pts: int | None = None):
        passes.append(file)
        yield from decoded(file, seek_pts)

    monkeypatch.setattr(video_frames, "_decoded", counted)
    found = build(src, tmp_path / "out", rate_hz="10", segment_s="1", min_frames="2")
    assert len(found) == 8 and sorted(passes) == [src / "a.mp4", src / "b.mp4"]


def test_what_is_wrong_with_a_video_is_said(tmp_path):
    import av

    file = write_clip(PLAIN, tmp_path / "a.mp4")
    shown = timeline(file)
    with pytest.raises(DataError, match="video a.mp4: corrupt, it ends early; got 121 frames; expected frame 130"):
        longer = video_frames.Timeline(np.arange(200) / 30, None)
        list(read_frames(file, longer, [3, 130]))
    with pytest.raises(DataError, match="its container lists a frame at 0.050 s that is not shown. Set times=decoded"):
        assert shown.pts is not None
        between = video_frames.Timeline(np.array([0, 0.05]), np.array([shown.pts[0], shown.pts[1] + 1]))
        list(read_frames(file, between, [0, 1]))
    (tmp_path / "b.mp4").write_bytes(b"\0" * 1000)
    with pytest.raises(DataError, match="video b.mp4: corrupt, cannot be opened"):
        timeline(tmp_path / "b.mp4")
    with av.open(str(tmp_path / "c.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        container.mux(sound.encode(silence))
        container.mux(sound.encode())
    with pytest.raises(DataError, match="video c.mp4: has no pictures"):
        timeline(tmp_path / "c.mp4")
    data = file.read_bytes()
    middle = data.index(b"mdat") + 3000
    file.write_bytes(data[:middle] + bytes(range(256)) * 40 + data[middle + 10240 :])
    with pytest.raises(DataError, match="video a.mp4: corrupt after frame"):
        list(read_frames(file, shown, range(121)))
