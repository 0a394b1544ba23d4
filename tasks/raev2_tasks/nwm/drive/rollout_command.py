"""`raev2 nwm rollout`: drive a trained model along a recorded path, by commands, or by a record; write what it sees."""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raev2.command.actions import source_of
from raev2.command.cli import source_options
from raev2.errors import DataError, SpecError
from raev2.files.artefact import write_json
from raev2.files.replace import Kind, check_replaceable, new_folder
from raev2.spec import SamplingSpec
from raev2_tasks.nwm.data.dataset import TrajectoryDataset, as_trajectories
from raev2_tasks.nwm.data.own_start import OwnFile, OwnStart, add_own_options, own_file
from raev2_tasks.nwm.data.places import Places
from raev2_tasks.nwm.data.video import contact_sheet, side_by_side, write_gif, write_mp4
from raev2_tasks.nwm.drive.model_world import open_run
from raev2_tasks.nwm.eval.predict import Predictor
from raev2_tasks.nwm.rollout import RolloutSession

logger = logging.getLogger(__name__)
COLUMNS = ("seconds", "forward_m", "left_m", "turn_deg")
RECORD = "rollout.json"
ROLLOUT = Kind(RECORD, '"follows_recorded_path"', r"rollout\.(json|mp4|gif)|sheet\.png|poses\.csv")
Commands = list[tuple[float, np.ndarray]]  # seconds and motion (3,) of each step


def rollout_command(argv: Sequence[str]) -> None:
    """Drive a trained model along a recorded path, by commands, or by a record; write what it sees."""
    parser = argparse.ArgumentParser(
        prog="raev2 nwm rollout",
        description="Predict a video from the first frames of a trajectory and motions. Writes rollout.mp4 and "
        "rollout.gif, sheet.png (true frames below where the recorded path is followed), poses.csv, and "
        f"{RECORD}, which --commands takes to repeat the rollout.",
    )
    source_options(parser, own=("--task",))
    parser.add_argument("--split", default="val", help="where the first frames come from (default: val)")
    parser.add_argument("--trajectory", metavar="ID", help="default: the first one that is long enough")
    parser.add_argument(
        "--start", type=float, metavar="S", help="now, in seconds (default: after a full context; of a clip its end)"
    )
    add_own_options(parser)
    parser.add_argument(
        "--seconds", type=float, default=4.0,
        help="length, along the recorded path; from your own picture or clip straight ahead (default: 4)",
    )  # fmt: skip
    parser.add_argument("--fps", type=float, default=4.0, help="frames a second (default: 4)")
    parser.add_argument(
        "--commands", metavar="FILE",
        help=f"instead of the recorded path: CSV with the columns {','.join(COLUMNS)}, or {RECORD} of a rollout",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, help="solver steps (default: those of the run)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--out", metavar="DIR", help="default: RUN/rollouts/TRAJECTORY-seed-N")
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args(argv)
    if own_file(options) and options.trajectory is not None:
        raise SpecError("--trajectory", "has no effect with --image or --video")
    if options.seconds <= 0 or options.fps <= 0:
        raise SpecError("--seconds, --fps", "must be above 0", got=f"{options.seconds:g}, {options.fps:g}")
    print(roll_out(options))


def roll_out(options: argparse.Namespace) -> Path:
    """Carry out the parsed options of `rollout_command`; returns the folder that was written."""
    record: Mapping[str, Any] | None = None
    commands: Commands = []
    if options.commands:
        file = Path(options.commands)
        record = read_record(file) if file.suffix == ".json" else None
        commands = read_commands(file) if record is None else []
    trained = open_run(source_of(options, "nwm"))
    sampling, seed = trained.run.spec.sampling, options.seed
    if record is not None:
        sampling, seed = SamplingSpec.model_validate(record["sampling"]), record["seed"]
    elif options.steps is not None:
        sampling = sampling.replace(steps=options.steps)
    context = trained.context(sampling, seed)

    # Where the rollout starts, and how it goes on.
    split = record["split"] if record else options.split
    dataset, own = as_trajectories(context.dataset(split)), own_file(options)
    if record is not None:
        if own:
            raise SpecError("--image, --video", "have no effect with a record, which names its start")
        places = place_of_record(options.commands, record, dataset)
        commands = [(step["seconds"], np.array(step["commands"][0])) for step in record["steps"]]
    elif own:
        places = OwnStart(dataset, own)
    else:
        places = find_place(dataset, options.trajectory, options.start, 0.0 if commands else options.seconds)
    follows = bool(record["follows_recorded_path"]) if record else not options.commands and not own
    if not commands:
        commands = (straight_commands if own else recorded_commands)(places, options.seconds, options.fps)
    name, start = start_of(places)
    out = Path(options.out) if options.out else trained.run.dir / "rollouts" / f"{name}-seed-{seed}"
    check_replaceable(out, ROLLOUT, options.overwrite, (options.run, options.commands, options.image, options.video))

    # Predict, one frame after the other.
    predictor = Predictor(context, places)
    session = predictor.session([0])
    frames, begin = [places.images([0], 0.0)[0]], time.monotonic()
    for seconds, motion in commands:
        frames.append(context.decode(predictor.step(session, motion, seconds))[0])
        rate = (len(frames) - 1) / (time.monotonic() - begin)
        logger.info("%.2f s: frame %d of %d, %.2f frames/s", session.time_s, len(frames) - 1, len(commands), rate)

    # Write.
    times = np.cumsum([0.0, *(seconds for seconds, _ in commands)])
    clip = torch.stack(frames)
    rows = [("model", clip)]
    if follows:
        rows.append(("true", torch.cat([places.images([0], float(time)) for time in times])))
    shown, fps = side_by_side(*(pixels for _, pixels in rows)), 1 / commands[0][0]
    with new_folder(out, ROLLOUT) as folder:
        write_mp4(shown, folder / "rollout.mp4", fps)
        write_gif(shown, folder / "rollout.gif", fps)
        contact_sheet(rows, ["now", *(f"+{time:g} s" for time in times[1:])], folder / "sheet.png")
        write_poses(session, folder / "poses.csv")
        head = {
            "run": str(trained.run.dir), "data": dataset.fingerprint, "split": split, **start,
            "follows_recorded_path": follows,
        }  # fmt: skip
        write_json(folder / RECORD, {**head, **session.record()})
    return out


def find_place(dataset: TrajectoryDataset, trajectory: str | None, start_s: float | None, seconds: float) -> Places:
    """The one place to start from: a moment with a full context before it and `seconds` after it."""
    places = Places(dataset, horizon_s=seconds)
    if trajectory is not None:
        number = dataset.trajectory_number(trajectory)
        places.moments = [moment for moment in places.moments if moment[0] == number]
    if start_s is not None:
        first = places.frames(start_s)
        places.moments = [moment for moment in places.moments if moment[1] >= first]
    if not places.moments:
        raise DataError(
            f"data {dataset.dir}", "no such place", got=f"trajectory {trajectory or 'any'}, start {start_s or 0:g} s",
            expected=f"{dataset.num_context} frames of context before it and {seconds:g} s after it",
            hint="Choose another --trajectory, an earlier --start or fewer --seconds.",
        )  # fmt: skip
    places.moments = places.moments[:1]
    return places


def place_of_record(file: str, record: Mapping[str, Any], dataset: TrajectoryDataset) -> Places:
    """Where an earlier rollout started; DataError when its data or its file have changed."""
    if record["data"] != dataset.fingerprint:
        raise DataError(file, "was made with other data", got=record["data"][:12], expected=dataset.fingerprint[:12])
    if "own" in record:
        return OwnStart(dataset, OwnFile.of_record(record["own"]))
    places = Places(dataset)
    places.moments = [(dataset.trajectory_number(record["trajectory"]), record["start_frame"])]
    return places


def start_of(places: Places) -> tuple[str, dict[str, Any]]:
    """A name for the start, and what the record says about it."""
    if isinstance(places, OwnStart):
        return Path(places.own.file).stem, {"own": places.own.record()}
    number, frame = places.moments[0]
    trajectory = places.dataset.trajectories[number].id
    return trajectory, {"trajectory": trajectory, "start_frame": frame}


def straight_commands(places: Places, seconds: float, fps: float) -> Commands:
    """Straight ahead at the mean speed of the training data, in steps of 1 / fps seconds."""
    speed = places.dataset.spacing_m * places.dataset.rate_hz
    return [(1 / fps, np.array([speed / fps, 0.0, 0.0]))] * num_steps(seconds, fps)


def recorded_commands(places: Places, seconds: float, fps: float) -> Commands:
    """The recorded path of the first place in steps of 1 / fps seconds, each seen from the frame where it begins."""
    steps = range(num_steps(seconds, fps))
    return [(1 / fps, places.motions([0], step / fps, (step + 1) / fps)[0]) for step in steps]


def num_steps(seconds: float, fps: float) -> int:
    """Frames of a rollout; SpecError unless that is a whole number."""
    steps = round(seconds * fps)
    if steps < 1 or abs(steps / fps - seconds) > 1e-6:
        raise SpecError(
            "--seconds", "not a whole number of frames", got=f"{seconds:g}", expected=f"a multiple of {1 / fps:g}"
        )
    return steps


def read_commands(file: Path) -> Commands:
    """Commands of a CSV file with the columns `COLUMNS`: seconds, metres and degrees."""
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            rows = list(csv.DictReader(opened))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(str(file), "cannot be read", got=error) from error
    commands: Commands = []
    for line, row in enumerate(rows, start=2):
        try:
            seconds, forward, left, turn = (float(row[name]) for name in COLUMNS)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{file}, line {line}", "no command", got=dict(row), expected=",".join(COLUMNS)) from error
        commands.append((seconds, np.array([forward, left, math.radians(turn)])))
    if not commands:
        raise DataError(str(file), "no commands", expected=f"a header {','.join(COLUMNS)} and a line for each step")
    return commands


def read_record(file: Path) -> dict[str, Any]:
    """The record of an earlier rollout."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(str(file), "cannot be read as JSON", got=error) from error
    if not isinstance(record, dict) or "steps" not in record or not {"start_frame", "own"} & set(record):
        raise DataError(str(file), "not a record of a rollout", expected=f"{RECORD} of `raev2 nwm rollout`")
    return record


def write_poses(session: RolloutSession, file: Path) -> None:
    """Poses over time as CSV, seen from the start: seconds, metres and degrees."""
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["time_s", "x_m", "y_m", "yaw_deg"])
        times = np.cumsum([0.0, *session.state.seconds])
        for time_s, (x, y, yaw) in zip(times, session.state.poses[:, 0], strict=True):
            writer.writerow([f"{time_s:g}", f"{x:.6f}", f"{y:.6f}", f"{math.degrees(yaw):.6f}"])


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"rollout": rollout_command}
