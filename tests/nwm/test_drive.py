"""The drive page: rides, the web application, and the page itself in a real browser, all in the toy world."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raev2.errors import DataError, SpecError
from raev2_tasks.nwm.drive.page import MAX_RIDES, PAGE, Drive, StepRequest, drive, make_app, open_socket, replay
from raev2_tasks.nwm.worlds.worlds import ToyWorld

pytest.importorskip("starlette", reason="the extra nwm is not installed (starlette)")
pytest.importorskip("uvicorn", reason="the extra nwm is not installed (uvicorn)")

AHEAD = StepRequest(speed_m_s=1.0, seconds=0.5)
LEFT = StepRequest(turn_deg_s=60, seconds=0.5)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class SlowModel(ToyWorld):
    """A toy world that pretends to sample, for the controls of a model."""

    name = "pretended model"
    sampler_steps = 20


# ---------------------------------------------------------------------------------------------------------------------
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


# ---------------------------------------------------------------------------------------------------------------------
# The web application


@pytest.fixture
def client():
    testclient = pytest.importorskip("starlette.testclient", reason="httpx is not installed")
    with testclient.TestClient(make_app(lambda: (ToyWorld(), None))) as client:
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
        (b"[]", 422, "valid dictionary"),
        (b"seconds=1", 400, "the request is not JSON"),
    ],
)
def test_bad_requests_are_one_line_and_change_nothing(client, body, status, message):
    at = f"/api/rides/{client.post('/api/rides', json={}).json()['id']}"
    answer = client.post(f"{at}/step", content=body)
    assert answer.status_code == status and message in answer.json()["error"]
    assert client.get(at).json()["steps"] == 0


def test_errors_of_the_world_reach_the_page():
    class Refusing(ToyWorld):
        def step(self, command, seconds):
            raise SpecError("rollout.seconds", "the model was not trained for this duration", got=seconds)

    testclient = pytest.importorskip("starlette.testclient", reason="httpx is not installed")
    with testclient.TestClient(make_app(lambda: (Refusing(), None))) as client:
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


# ---------------------------------------------------------------------------------------------------------------------
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


# ---------------------------------------------------------------------------------------------------------------------
# The page in a browser


def serving(make_worlds) -> Iterator[str]:
    """Address of a server in a thread."""
    import uvicorn

    with open_socket("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(make_app(make_worlds), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=120)


@pytest.fixture(scope="module")
def toy_address() -> Iterator[str]:
    yield from serving(lambda: (ToyWorld(), ToyWorld()))


@pytest.fixture(scope="module")
def model_address() -> Iterator[str]:
    yield from serving(lambda: (SlowModel(), None))


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1240, "height": 720})
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
    yield page
    page.close()
    assert page.problems == []


def wait_for_steps(page, steps: int) -> None:
    page.wait_for_selector(f"body[data-steps='{steps}']", timeout=120_000)


def wait_until(page, expression: str) -> None:
    """Like `page.wait_for_function`, which the content security policy of the page forbids."""
    for _ in range(2400):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"never came true: {expression}")


def frame(page) -> str:
    return page.get_attribute("#frame", "src")


def test_a_key_moves_and_the_page_says_how_long_it_took(page, toy_address):
    page.goto(toy_address)
    wait_for_steps(page, 0)
    first = frame(page)
    assert page.inner_text("#latency") == "–"
    page.keyboard.press("w")
    wait_for_steps(page, 1)
    assert frame(page) != first
    assert page.inner_text("#steps") == "1"
    assert re.fullmatch(r"\d+(\.\d)? ms", page.inner_text("#latency"))
    page.keyboard.press("ArrowLeft")
    wait_for_steps(page, 2)
    assert page.inner_text("#time") == "1.00 s"
    assert page.is_visible("#engine-frame") and page.get_attribute("#engine-frame", "src") == frame(page)


def test_keys_turn_to_the_side_they_say(page, toy_address):
    page.goto(toy_address)
    wait_for_steps(page, 0)
    headings = [float(page.inner_text("#heading")[:-1])]
    for steps, key in enumerate(("a", "d", "d"), start=1):
        page.keyboard.press(key)
        wait_for_steps(page, steps)
        headings.append(float(page.inner_text("#heading")[:-1]))
    turns = [(b - a + 180) % 360 - 180 for a, b in zip(headings, headings[1:], strict=False)]
    assert turns[0] > 5 and turns[1] < -5 and turns[2] < -5


def test_a_held_key_drives_on_and_two_keys_make_an_arc(page, toy_address):
    page.goto(toy_address)
    wait_for_steps(page, 0)
    page.keyboard.down("w")
    page.keyboard.down("a")
    wait_until(page, "ride.steps >= 3")
    page.keyboard.up("w")
    page.keyboard.up("a")
    page.wait_for_timeout(300)
    steps = int(page.inner_text("#steps"))
    trail = page.evaluate("ride.trail")
    assert len(trail) == steps + 1
    moved, turned = np.diff(np.array(trail), axis=0)[1, :2], np.diff(np.array(trail), axis=0)[1, 2]
    assert np.hypot(*moved) > 0 and turned > 0
    page.wait_for_timeout(200)
    assert int(page.inner_text("#steps")) == steps  # nothing runs on after the keys are up


def test_a_held_key_keeps_to_real_time(page, toy_address):
    """By the clock of the page, which stands still here: a slow tap is one step, the next one comes after its time."""
    page.clock.install(time=0)
    page.goto(toy_address)
    wait_for_steps(page, 0)
    page.clock.pause_at(10_000)
    page.keyboard.down("w")
    wait_for_steps(page, 1)
    page.clock.run_for(490)
    assert page.evaluate("ride.steps") == 1
    page.clock.run_for(20)
    wait_for_steps(page, 2)
    page.keyboard.up("w")
    page.clock.run_for(5_000)
    assert page.evaluate("ride.steps") == 2


def test_undo_reset_and_reload(page, toy_address):
    page.goto(toy_address)
    wait_for_steps(page, 0)
    first = frame(page)
    page.keyboard.press("d")
    wait_for_steps(page, 1)
    second = frame(page)
    page.keyboard.press("w")
    wait_for_steps(page, 2)
    page.keyboard.press("u")
    wait_for_steps(page, 1)
    assert frame(page) == second
    page.reload()
    wait_for_steps(page, 1)
    assert frame(page) == second
    page.click("#reset")
    wait_for_steps(page, 0)
    assert frame(page) == first
    page.fill("#seed", "5")
    page.keyboard.press("Enter")
    wait_until(page, "ride.seed === 5")
    assert frame(page) != first


def test_a_fast_command_is_warned_about(page, toy_address):
    page.goto(toy_address)
    wait_for_steps(page, 0)
    assert "(data: -0.50 to 1.50 m/s)" in page.inner_text("#speed-text")
    page.fill("#speed", "3")
    page.keyboard.press("w")
    wait_for_steps(page, 1)
    assert "speed 3.00 m/s is outside the data (-0.50 to 1.50)" in page.inner_text("#warning")
    page.fill("#speed", "1")
    page.keyboard.press("w")
    wait_for_steps(page, 2)
    assert page.inner_text("#warning") == ""


def test_buttons_drive_and_the_ride_is_downloaded(page, toy_address, tmp_path: Path):
    page.goto(toy_address)
    wait_for_steps(page, 0)
    page.click("[data-drive='forward']")
    wait_for_steps(page, 1)
    with page.expect_download() as download:
        page.click("#recording")
    download.value.save_as(tmp_path / "ride.zip")
    with zipfile.ZipFile(tmp_path / "ride.zip") as archive:
        assert "frames/000001.png" in archive.namelist()


def test_sampler_steps_are_offered_only_where_something_is_sampled(page, toy_address, model_address):
    page.goto(toy_address)
    wait_for_steps(page, 0)
    assert not page.is_visible("#sampler-steps")
    page.goto(model_address)
    wait_for_steps(page, 0)
    assert page.input_value("#sampler-steps") == "20" and not page.is_visible("#engine")
    page.fill("#sampler-steps", "7")
    page.keyboard.press("w")
    wait_for_steps(page, 1)
    assert page.evaluate("ride.sampler_steps") == 7


def test_a_server_that_is_gone_is_said(page):
    server = serving(lambda: (ToyWorld(), None))
    page.goto(next(server))
    wait_for_steps(page, 0)
    next(server, None)  # stops it
    page.keyboard.press("w")
    page.wait_for_selector("#warning.error")
    assert page.inner_text("#warning") == "The server does not answer."
    page.problems.clear()  # the browser reports the failed request
