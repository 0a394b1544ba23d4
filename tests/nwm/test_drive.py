"""The drive page: rides and the web application, in the toy world. A browser drives in test_drive_browser.py."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from raev2.errors import DataError, SpecError
from raev2_tasks.nwm.drive.page import MAX_RIDES, PAGE, Drive, StepRequest, drive, make_app, open_socket, replay
from raev2_tasks.nwm.worlds.worlds import ToyWorld

pytest.importorskip("starlette", reason="the extra nwm is not installed (starlette)")
pytest.importorskip("uvicorn", reason="the extra nwm is not installed (uvicorn)")

AHEAD = StepRequest(speed_m_s=1.0, seconds=0.5)
JSON = {"Content-Type": "application/json"}
LEFT = StepRequest(turn_deg_s=60, seconds=0.5)


class SlowModel(ToyWorld):
    """A toy world that pretends to sample, for the controls of a model."""

    name = "pretended model"
    sampler_steps = 20


# Rides


def test_commands_are_arcs_in_metres_and_radians():
    assert StepRequest(speed_m_s=2, seconds=0.5).command == pytest.approx([1, 0, 0])
    quarter = StepRequest(speed_m_s=np.pi / 2, turn_deg_s=90, seconds=1).command
    assert quarter == pytest.approx([1, 1, np.pi / 2])  # to the left


def test_steps_undo_and_reset():
    ride = Drive(ToyWorld(), ToyWorld(), seed=3)
    start = ride.shown[0]
    ride.step(AHEAD)
    once = ride.shown[-1]
    ride.step(LEFT)
    ride.undo()
    assert ride.state()["steps"] == 1 and ride.shown[-1] is once
    ride.step(LEFT)
    assert ride.world.pose == pytest.approx(ride.engine.pose)
    ride.undo(), ride.undo(), ride.undo()
    assert ride.state()["steps"] == 0 and ride.world.pose == pytest.approx(start.pose)
    ride.step(AHEAD)
    assert (ride.shown[-1].frame == once.frame).all()
    ride.reset(3)
    assert (ride.shown[-1].frame == start.frame).all()
    ride.reset(4)
    assert not (ride.shown[-1].frame == start.frame).all()


def test_a_command_outside_the_data_is_named():
    ride = Drive(ToyWorld())
    ride.step(StepRequest(speed_m_s=9, turn_deg_s=-170, seconds=0.5))
    assert "speed 9.00 m/s is outside the data (-0.50 to 1.50)" in ride.state()["complaint"]
    assert "turn rate -170 °/s is outside the data (-90 to 90)" in ride.state()["complaint"]
    ride.step(AHEAD)
    assert ride.state()["complaint"] == ""


def test_state_speaks_metres_degrees_and_seconds():
    ride = Drive(ToyWorld(), seed=1)
    ride.step(LEFT)
    ride.step(AHEAD)
    state = ride.state()
    assert state["time_s"] == 1.0
    assert state["pose"]["yaw_deg"] == pytest.approx(np.degrees(ride.world.pose[2]))
    assert np.array(state["trail"]).shape == (3, 3) and state["engine_trail"] == []
    assert state["motion"]["turn_deg_s"] == pytest.approx([-90, 90])
    assert state["latency_ms"] > 0 and state["sampler_steps"] is None
    json.dumps(state)


def test_a_recording_can_be_driven_again():
    ride = Drive(SlowModel(), ToyWorld(), seed=7)
    for request in (AHEAD, LEFT, AHEAD.replace(sampler_steps=5)):
        ride.step(request)
    with zipfile.ZipFile(io.BytesIO(ride.recording())) as archive:
        assert archive.testzip() is None
        frames = [np.array(Image.open(archive.open(f"frames/{i:06d}.png"))) for i in range(4)]
        assert sum(name.startswith("engine/") for name in archive.namelist()) == 4
        record = json.loads(archive.read("session.json"))
    assert record["seed"] == 7 and [entry["turn_deg_s"] for entry in record["steps"]] == [0, 60, 0]
    world = SlowModel()
    again = list(replay(world, record))
    assert all((a == b).all() for a, b in zip(frames, again, strict=True))
    assert world.sampler_steps == 5
    with pytest.raises(DataError, match="recorded in another world; got pretended model; expected toy world"):
        list(replay(ToyWorld(), record))
    with pytest.raises(DataError, match="session.json: another format; got 0; expected 1"):
        list(replay(world, {**record, "format_version": 0}))


# The web application


@pytest.fixture
def client():
    testclient = pytest.importorskip("starlette.testclient", reason="httpx is not installed")
    with testclient.TestClient(make_app(lambda: (ToyWorld(), None)), "http://127.0.0.1") as client:
        yield client


def test_the_application_drives(client):
    first = client.post("/api/rides", json={"seed": 2}).json()
    at = f"/api/rides/{first['id']}"
    second = client.post(f"{at}/step", json={"speed_m_s": 1, "turn_deg_s": 30, "seconds": 0.5}).json()
    assert (first["steps"], second["steps"]) == (0, 1)
    assert second["frame"].startswith("data:image/png;base64,") and second["frame"] != first["frame"]
    assert client.get(at).json() == second
    assert client.post(f"{at}/undo", json={}).json()["frame"] == first["frame"]
    assert client.post(f"{at}/reset", json={"seed": 2}).json()["frame"] == first["frame"]
    recording = client.get(f"{at}/recording")
    assert recording.headers["content-type"] == "application/zip"
    assert "session.json" in zipfile.ZipFile(io.BytesIO(recording.content)).namelist()


def test_tabs_have_rides_of_their_own(client):
    one, other = (client.post("/api/rides", json={}).json()["id"] for _ in range(2))
    client.post(f"/api/rides/{one}/step", json={"seconds": 0.5})
    assert [client.get(f"/api/rides/{id}").json()["steps"] for id in (one, other)] == [1, 0]


def test_old_rides_make_room(client):
    ids = [client.post("/api/rides", json={}).json()["id"] for _ in range(MAX_RIDES + 1)]
    gone = client.get(f"/api/rides/{ids[0]}")
    assert gone.status_code == 404
    assert gone.json()["error"] == "drive: this ride is no longer there. Reload the page to start a new one."
    assert client.get(f"/api/rides/{ids[-1]}").status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b'{"seconds": 0}', 422, "seconds: Input should be greater than 0"),
        (b'{"seconds": 1, "speed": 3}', 422, "speed: Extra inputs are not permitted"),
        (b'{"seconds": 1, "speed_m_s": 1e99}', 422, "speed_m_s: Input should be less than or equal to 50"),
        (b"[]", 422, "Input should be an object"),
        (b"seconds=1", 400, "the request is not JSON"),
    ],
)
def test_bad_requests_are_one_line_and_change_nothing(client, body, status, message):
    at = f"/api/rides/{client.post('/api/rides', json={}).json()['id']}"
    answer = client.post(f"{at}/step", content=body, headers=JSON)
    assert answer.status_code == status and message in answer.json()["error"]
    assert client.get(at).json()["steps"] == 0


def test_errors_of_the_world_reach_the_page():
    class Refusing(ToyWorld):
        def step(self, command, seconds):
            raise SpecError("rollout.seconds", "the model was not trained for this duration", got=seconds)

    testclient = pytest.importorskip("starlette.testclient", reason="httpx is not installed")
    with testclient.TestClient(make_app(lambda: (Refusing(), None)), "http://127.0.0.1") as client:
        at = f"/api/rides/{client.post('/api/rides', json={}).json()['id']}"
        answer = client.post(f"{at}/step", json={"seconds": 9})
    assert answer.status_code == 400
    assert answer.json()["error"] == "rollout.seconds: the model was not trained for this duration; got 9.0"


def test_the_page_loads_nothing_from_elsewhere(client):
    page = client.get("/")
    assert page.status_code == 200 and "<title>raev2 · drive</title>" in page.text
    for name in re.findall(r'(?:src|href)="([^"#:]+)"', page.text):
        assert client.get(f"/{name}").status_code == 200, name
    for file in PAGE.iterdir():
        assert not re.search(r"https?://|@import|url\(", file.read_text()), file.name


# The command


def test_a_port_in_use_is_a_clear_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            SpecError, match=f"cannot listen on 127.0.0.1:{port}; got .* in use.* Choose another --port"
        ):
            open_socket("127.0.0.1", port)
    with pytest.raises(SpecError, match="--port: not a port; got 99999; expected 0 to 65535"):
        open_socket("127.0.0.1", 99_999)
    with pytest.raises(SpecError, match="cannot listen on no.such.host.invalid:0"):
        open_socket("no.such.host.invalid", 0)


def test_toy_excludes_what_needs_a_run():
    with pytest.raises(SpecError, match="--toy: needs none of --run, --engine, --image, --video"):
        drive(["--toy", "--engine"])


def test_the_server_stops_at_ctrl_c():
    code = "import logging, sys; logging.basicConfig(level='INFO', format='%(message)s')\n"
    code += "from raev2_tasks.nwm.drive.page import drive; drive(['--toy', '--port', '0'])"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        address = re.match(r"drive at http://(127\.0\.0\.1):(\d+)   \(Ctrl-C stops\)", process.stderr.readline())
        with socket.create_connection((address[1], int(address[2])), timeout=120) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 200"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0
        assert process.stderr.read() == "stopped\n"
    finally:
        process.kill()
        process.stderr.close()
