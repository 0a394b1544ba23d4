"""Drive a world from a web page: keys in, frames out. `raev2 nwm drive`.

    Drive        one ride: a world, maybe the real engine beside it, and everything that was done
    make_app     the web application: JSON in, JSON with PNG pictures out, one ride per browser tab
    serve        run it until Ctrl-C

The page itself is in drive_page/ and loads nothing from elsewhere; who may use it is said in access.py. The page, the
server and the recording speak metres, degrees and seconds.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import logging
import math
import secrets
import socket
import threading
import time
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from pydantic import Field, ValidationError

from raev2.command.actions import source_of
from raev2.command.cli import source_options
from raev2.errors import DataError, RaeError, SpecError, TaskError
from raev2.spec import Spec
from raev2_tasks.nwm.data.own_start import OwnFile, add_own_options, own_file
from raev2_tasks.nwm.drive.access import HEADERS, MAX_BODY_BYTES, THIS_MACHINE, Access, Refused, in_address
from raev2_tasks.nwm.pose import exp
from raev2_tasks.nwm.worlds.worlds import UNDO_STEPS, Frame, Poses, ToyWorld, World

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from raev2.model.opened import Source

logger = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "drive_page"
RECORD_FORMAT_VERSION = 1
MAX_RIDES = 8  # the longest unused one is dropped for a new one
MAX_STEPS = 1000  # of a ride; all its frames are kept for the recording
MAX_SAMPLER_STEPS = 50  # for a frame, or as many as the run itself takes
MAX_REQUESTS = 2  # of a ride at a time: one at work and one behind it
PORT = 8321


class StepRequest(Spec):
    """A command as the page gives it: constant speed and turn rate (left positive) for some seconds."""

    speed_m_s: float = Field(0, ge=-50, le=50)
    turn_deg_s: float = Field(0, ge=-720, le=720)
    seconds: float = Field(gt=0, le=60)
    sampler_steps: int | None = Field(None, ge=1)

    @property
    def command(self) -> Poses:
        """Motion (3,) in metres and radians: an arc."""
        return exp(np.array([self.speed_m_s, 0.0, math.radians(self.turn_deg_s)]) * self.seconds)


class StartRequest(Spec):
    """Where to start."""

    seed: int = Field(0, ge=0, lt=2**32, strict=True)


@dataclass(frozen=True)
class Shown:
    """What the page shows after a step, or at the start (request None)."""

    frame: Frame
    pose: Poses
    engine_frame: Frame | None
    engine_pose: Poses | None
    request: StepRequest | None = None
    latency_s: float = 0.0
    complaint: str = ""


# A ride


class Drive:
    """One ride through a world.

    engine   the real thing beside it, which gets the same commands from the same start
    """

    def __init__(self, world: World, engine: World | None = None, seed: int = 0) -> None:
        self.id = secrets.token_urlsafe(9)
        self.world, self.engine = world, engine
        self.max_sampler_steps = max(MAX_SAMPLER_STEPS, world.sampler_steps or 0)
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """Start again."""
        self.seed = seed
        frame = self.world.reset(seed)
        engine_frame = self.engine.reset(seed) if self.engine else None
        self.shown = [self._shown(frame, engine_frame)]
        self._undoable = 0

    def step(self, request: StepRequest) -> None:
        """Carry out a command. Nothing has happened if it raises."""
        if len(self.shown) > MAX_STEPS:
            raise SpecError("ride", "it cannot get longer", got=f"{MAX_STEPS} steps", hint="Download it, then reset.")
        if request.sampler_steps is not None and request.sampler_steps > self.max_sampler_steps:
            raise SpecError(
                "sampler_steps", "too many", got=request.sampler_steps, expected=f"at most {self.max_sampler_steps}"
            )
        complaint = self.world.motion.complaint(request.command, request.seconds) if self.world.motion else ""
        if request.sampler_steps is not None and self.world.sampler_steps is not None:
            self.world.sampler_steps = request.sampler_steps
        begin = time.perf_counter()
        frame = self.world.step(request.command, request.seconds)
        latency_s = time.perf_counter() - begin
        engine_frame = self.engine.step(request.command, request.seconds) if self.engine else None
        self.shown.append(self._shown(frame, engine_frame, request, latency_s, complaint))
        self._undoable = min(self._undoable + 1, UNDO_STEPS)

    def undo(self) -> None:
        """Back to before the last step; nothing at the start. SpecError beyond `UNDO_STEPS`."""
        if len(self.shown) == 1:
            return
        if not self._undoable:
            raise SpecError("undo", "earlier steps are not kept", got=f"{UNDO_STEPS} undone")
        for world in filter(None, (self.world, self.engine)):
            world.undo()
        self.shown.pop()
        self._undoable -= 1

    def state(self) -> dict[str, Any]:
        """What the page needs, in JSON types."""
        last, motion = self.shown[-1], self.world.motion
        done = self.shown[1:]
        return {
            "id": self.id,
            "world": self.world.name,
            "engine": self.engine.name if self.engine else None,
            "seed": self.seed,
            "steps": len(done),
            "time_s": sum(shown.request.seconds for shown in done if shown.request),
            "frame": _data_url(last.frame),
            "engine_frame": None if last.engine_frame is None else _data_url(last.engine_frame),
            "pose": _pose_values(last.pose),
            "trail": [shown.pose.tolist() for shown in self.shown],
            "engine_trail": [shown.engine_pose.tolist() for shown in self.shown if shown.engine_pose is not None],
            "latency_ms": round(1000 * last.latency_s, 1) if done else None,
            "complaint": last.complaint,
            "durations_s": list(self.world.durations_s),
            "sampler_steps": self.world.sampler_steps,
            "max_sampler_steps": self.max_sampler_steps,
            "motion": None
            if motion is None
            else {
                "speed_m_s": list(motion.speed_m_s),
                "turn_deg_s": [math.degrees(turn) for turn in motion.turn_rad_s],
            },
        }

    def record(self) -> dict[str, Any]:
        """Everything that was done, in JSON types: enough to do it again, see `replay`."""
        return {
            "format_version": RECORD_FORMAT_VERSION,
            "world": self.world.name,
            "engine": self.engine.name if self.engine else None,
            "seed": self.seed,
            "axes": "x forward, y left, yaw counter-clockwise; poses seen from the start of the world",
            "start": _pose_values(self.shown[0].pose),
            "steps": [
                {
                    **shown.request.model_dump(),
                    "pose": _pose_values(shown.pose),
                    "latency_ms": round(1000 * shown.latency_s, 1),
                    "complaint": shown.complaint,
                }
                for shown in self.shown
                if shown.request is not None
            ],
        }

    def recording(self) -> bytes:
        """A zip file: session.json, frames/000000.png and so on, and engine/ where there is one."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("session.json", json.dumps(self.record(), indent=1))
            for number, shown in enumerate(self.shown):
                archive.writestr(f"frames/{number:06d}.png", _png(shown.frame))
                if shown.engine_frame is not None:
                    archive.writestr(f"engine/{number:06d}.png", _png(shown.engine_frame))
        return buffer.getvalue()

    def _shown(self, frame: Frame, engine_frame: Frame | None, *rest: Any) -> Shown:
        engine_pose = None if self.engine is None else np.array(self.engine.pose)
        return Shown(frame, np.array(self.world.pose), engine_frame, engine_pose, *rest)


def replay(world: World, record: Mapping[str, Any]) -> Iterator[Frame]:
    """The frames of a recorded ride again, the first one included.

    record   content of session.json
    """
    if record.get("format_version") != RECORD_FORMAT_VERSION:
        raise DataError(
            "session.json", "another format", got=record.get("format_version"), expected=str(RECORD_FORMAT_VERSION)
        )
    if record["world"] != world.name:
        raise DataError("session.json", "recorded in another world", got=record["world"], expected=world.name)
    drive = Drive(world, seed=record["seed"])
    yield drive.shown[0].frame
    for entry in record["steps"]:
        drive.step(StepRequest(**{name: entry[name] for name in StepRequest.model_fields}))
        yield drive.shown[-1].frame


def _pose_values(pose: Poses) -> dict[str, float]:
    return {"x_m": float(pose[0]), "y_m": float(pose[1]), "yaw_deg": math.degrees(pose[2])}


def _png(frame: Frame) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()


def _data_url(frame: Frame) -> str:
    return "data:image/png;base64," + base64.b64encode(_png(frame)).decode()


# The web application

MakeWorlds = Callable[[], tuple[World, World | None]]
"""Called for every browser tab: a world, and the engine beside it or None."""


class Rides:
    """The rides of all tabs. Worlds may share a model: only one of them works at any time."""

    def __init__(self, make_worlds: MakeWorlds) -> None:
        self._make_worlds = make_worlds
        self._rides: OrderedDict[str, Drive] = OrderedDict()  # the longest unused one first
        self._requests: Counter[str] = Counter()  # at work or waiting, by ride; "": of rides to be
        self._lock = threading.Lock()

    @contextmanager
    def queue(self, id: str) -> Iterator[None]:
        """A place among the requests of a ride; Refused where there is none."""
        if id and id not in self._rides:
            raise _gone()
        if self._requests[id] >= (MAX_REQUESTS if id else MAX_RIDES):
            raise Refused(429, "drive: busy with earlier requests. Wait for their answers.")
        self._requests[id] += 1
        try:
            yield
        finally:
            self._requests -= Counter([id])  # forgets what is zero

    def start(self, id: str, body: bytes) -> dict[str, Any]:
        """A new ride, whatever `id`."""
        seed = StartRequest.model_validate_json(body).seed
        with self._lock:
            drive = Drive(*self._make_worlds(), seed)
            self._rides[drive.id] = drive
            while len(self._rides) > MAX_RIDES:
                self._rides.popitem(last=False)
            return drive.state()

    def acting(self, action: Callable[[Drive, bytes], Any]) -> Callable[[str, bytes], Any]:
        """Like `start`: does something with the ride `id` and tells its state, or what the action returns."""

        def act(id: str, body: bytes) -> Any:
            with self._lock:
                if id not in self._rides:
                    raise _gone()
                self._rides.move_to_end(id)
                drive = self._rides[id]
                return action(drive, body) or drive.state()

        return act


def _gone() -> Refused:
    return Refused(404, "drive: this ride is no longer there. Reload the page to start a new one.")


ACTIONS: dict[str, Callable[[Drive, bytes], None]] = {
    "step": lambda drive, body: drive.step(StepRequest.model_validate_json(body)),
    "reset": lambda drive, body: drive.reset(StartRequest.model_validate_json(body).seed),
    "undo": lambda drive, body: drive.undo(),
}


def make_app(make_worlds: MakeWorlds, access: Access = THIS_MACHINE) -> Starlette:
    """The application."""
    Starlette, routing = _web("starlette.applications").Starlette, _web("starlette.routing")
    concurrency, responses = _web("starlette.concurrency"), _web("starlette.responses")
    Middleware, Around = _web("starlette.middleware").Middleware, _web("starlette.middleware.base").BaseHTTPMiddleware
    TrustedHost, static = _web("starlette.middleware.trustedhost").TrustedHostMiddleware, _web("starlette.staticfiles")
    rides = Rides(make_worlds)

    def endpoint(action: Callable[[str, bytes], Any]) -> Callable[[Any], Any]:
        """Run an action beside the event loop; errors of the user become one line of JSON."""

        async def run(request: Any) -> Any:
            try:
                access.check(request.method, request.headers)
                body, id = await request.body(), request.path_params.get("id", "")
                with rides.queue(id):
                    result = await concurrency.run_in_threadpool(action, id, body)
            except (Refused, ValidationError, RaeError) as error:
                text, status = _reason(error)
                return responses.JSONResponse({"error": text}, status)
            if isinstance(result, bytes):
                return responses.Response(result, media_type="application/zip")
            return responses.JSONResponse(result)

        return run

    async def with_headers(request: Any, answer: Any) -> Any:
        response = await answer(request)
        response.headers.update(HEADERS)
        return response

    api = [
        routing.Route("/rides", endpoint(rides.start), methods=["POST"]),
        routing.Route("/rides/{id}", endpoint(rides.acting(lambda drive, body: None))),
        routing.Route("/rides/{id}/recording", endpoint(rides.acting(lambda drive, body: drive.recording()))),
    ]
    for name, action in ACTIONS.items():
        api.append(routing.Route(f"/rides/{{id}}/{name}", endpoint(rides.acting(action)), methods=["POST"]))
    return Starlette(
        routes=[
            routing.Mount("/api", routes=api, max_body_size=MAX_BODY_BYTES),
            routing.Mount("/", static.StaticFiles(directory=PAGE, html=True)),
        ],
        middleware=[
            Middleware(Around, dispatch=with_headers),
            Middleware(TrustedHost, allowed_hosts=access.hosts, www_redirect=False),
        ],
    )


def _reason(error: Exception) -> tuple[str, int]:
    """Why a request was not carried out, in one line, and the HTTP status."""
    if not isinstance(error, ValidationError):
        return str(error), error.status if isinstance(error, Refused) else 400
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return "the request is not JSON", 400
    return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"]))), 422


def serve(make_worlds: MakeWorlds, host: str = "127.0.0.1", port: int = PORT, names: Sequence[str] = ()) -> None:
    """Serve the page until Ctrl-C. Port 0 takes any free port; the address is logged, with the token if there is one.

    names   that this machine is known by, besides `host`
    """
    uvicorn = _web("uvicorn")
    with open_socket(host, port) as listener:
        bound, port = listener.getsockname()[:2]
        access = Access.of(host, bound, names)
        config = uvicorn.Config(make_app(make_worlds, access), log_level="warning", timeout_graceful_shutdown=3)
        logger.info("drive at %s   (Ctrl-C stops)", page_address(host, bound, port, access.token))
        with suppress(KeyboardInterrupt):  # raised again after an orderly end; here it is the ordinary way to stop
            uvicorn.Server(config).run(sockets=[listener])
    logger.info("stopped")


def page_address(host: str, bound: str, port: int, token: str | None) -> str:
    """The address to open, with the token."""
    reachable = socket.gethostname() if ip_address(bound).is_unspecified else host
    return f"http://{in_address(reachable)}:{port}" + (f"/#{token}" if token else "")


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket; SpecError where the address cannot be had."""
    if not 0 <= port < 2**16:
        raise SpecError("--port", "not a port", got=port, expected="0 to 65535")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise SpecError(
            "raev2 nwm drive", f"cannot listen on {host}:{port}", got=str(error),
            hint="Is it running already? Choose another --port; 0 takes a free one.",
        )  from error  # fmt: skip


def _web(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise TaskError("raev2 nwm drive", f"{error.name} is not installed", hint="pip install 'raev2[nwm]'") from error


# The command


def drive(argv: Sequence[str]) -> None:
    """Drive a trained model, or the toy world, from a web page."""
    parser = argparse.ArgumentParser(prog="raev2 nwm drive", description=drive.__doc__)
    source_options(parser, own=("--task",))
    parser.add_argument("--toy", action="store_true", help="drive the built-in toy world; needs no run")
    add_own_options(parser)
    parser.add_argument("--engine", action="store_true", help="show the simulator that made the data beside the model")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, reachable from this machine only")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME",
                        help="another name or address that this machine is reached by, with --host")  # fmt: skip
    parser.add_argument("--port", type=int, default=PORT, help=f"0 takes a free one (default: {PORT})")
    options = parser.parse_args(argv)
    source = options.run if options.toy else source_of(options, "nwm")
    make_worlds = open_worlds(source, toy=options.toy, engine=options.engine, own=own_file(options))
    serve(make_worlds, options.host, options.port, options.allow_host)


def open_worlds(
    run: Source | str | None = None, *, toy: bool = False, engine: bool = False, own: OwnFile | None = None
) -> MakeWorlds:
    """Worlds of the toy, or of a trained model (None: the newest) with the simulator of its data beside it.

    own   start from this picture or clip and not from places of the data
    """
    if not toy:
        from raev2_tasks.nwm.drive.model_world import model_worlds

        return model_worlds(run, engine=engine, own=own)
    if run or engine or own:
        raise SpecError("--toy", "needs none of --run, --engine, --image, --video")
    return lambda: (ToyWorld(), None)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"drive": drive}
