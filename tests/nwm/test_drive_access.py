"""What the server of the drive page refuses, by plain HTTP requests; a browser tries the same in test_drive.py."""

from __future__ import annotations

import gc
import re
import secrets
import socket
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor, as_completed

import pytest

from raev2.errors import SpecError
from raev2_tasks.nwm.drive.access import MAX_BODY_BYTES, Access
from raev2_tasks.nwm.drive.page import (
    MAX_REQUESTS,
    MAX_RIDES,
    MAX_SAMPLER_STEPS,
    MAX_STEPS,
    PAGE,
    Drive,
    StepRequest,
    drive,
    make_app,
    page_address,
)
from raev2_tasks.nwm.worlds.worlds import UNDO_STEPS, ToyWorld

pytest.importorskip("starlette", reason="the extra nwm is not installed (starlette)")
testclient = pytest.importorskip("starlette.testclient", reason="httpx is not installed")

OWN = "http://127.0.0.1:8321"
JSON = {"Content-Type": "application/json"}
STEP = b'{"seconds": 0.5, "speed_m_s": 1}'
POSTS = [("", b'{"seed": 3}'), ("/step", STEP), ("/reset", b'{"seed": 3}'), ("/undo", b"{}")]
GETS = ["", "/recording"]


def client_of(make_worlds, access: Access = Access()):  # noqa: B008
    return testclient.TestClient(make_app(make_worlds, access), OWN)


@pytest.fixture
def made() -> list[ToyWorld]:
    """The worlds that the server made."""
    return []


@pytest.fixture
def client(made):
    def make_worlds():
        made.append(ToyWorld())
        return made[-1], None

    with client_of(make_worlds) as client:
        yield client


@pytest.fixture
def at(client) -> str:
    """A ride with one step."""
    at = f"/api/rides/{client.post('/api/rides', json={}).json()['id']}"
    assert client.post(f"{at}/step", content=STEP, headers=JSON).json()["steps"] == 1
    return at


def everything(client, at: str, headers: dict[str, str]) -> set[int]:
    """Status of every request there is, a new ride included."""
    statuses = set()
    for path, body in POSTS:
        statuses.add(client.post(f"{at}{path}" if path else "/api/rides", content=body, headers=headers).status_code)
    for path in GETS:
        statuses.add(client.get(f"{at}{path}", headers=headers).status_code)
    return statuses


# Pages of other origins


@pytest.mark.parametrize("host", ["evil.test", "evil.test:8321", "127.0.0.1.evil.test", "localhost.evil.test", "[::2]"])
def test_a_foreign_name_that_leads_here_gets_nothing(client, made, at, host):
    before = client.get(at).json()
    headers = {"Host": host, "Origin": f"http://{host}", **JSON}
    assert everything(client, at, headers) == {400}
    assert client.get("/", headers=headers).status_code == 400
    assert client.get(at).json() == before and len(made) == 1


@pytest.mark.parametrize("host", ["localhost:8321", "127.0.0.1", "[::1]:8321", "LOCALHOST"])
def test_names_of_the_loopback_are_let_in(client, at, host):
    assert everything(client, at, {"Host": host, "Origin": f"http://{host}", **JSON}) == {200}


@pytest.mark.parametrize(
    "origin", ["http://evil.test", "null", "http://127.0.0.1", "http://127.0.0.1:9", "http://localhost:8321", "x"]
)
def test_another_origin_can_neither_step_reset_nor_read(client, made, at, origin):
    before = client.get(at).json()
    assert everything(client, at, {"Origin": origin, **JSON}) == {403}
    answer = client.post(f"{at}/step", content=STEP, headers={"Origin": origin, **JSON})
    assert answer.json() == {"error": "a page of another origin cannot drive here"}
    assert client.get(at).json() == before and len(made) == 1


def test_the_own_origin_and_programs_without_one_are_let_in(client, at):
    assert everything(client, at, {"Origin": OWN, **JSON}) == {200}
    assert everything(client, at, JSON) == {200}


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "json",
             "text/plain; application/json"],
)  # fmt: skip
def test_what_a_browser_posts_without_asking_is_refused(client, at, kind):
    """Pages elsewhere can send these content types without a preflight."""
    for path, body in POSTS:
        answer = client.post(f"{at}{path}" if path else "/api/rides", content=body, headers={"Content-Type": kind})
        assert (answer.status_code, answer.json()["error"]) == (415, "the request is not JSON")
    assert client.get(at).json()["steps"] == 1
    assert client.post(f"{at}/undo", content=b"{}").status_code == 415  # none at all
    assert client.post(
        f"{at}/undo", content=b"{}", headers={"Content-Type": "Application/JSON; charset=utf-8"}
    ).is_success


def test_a_preflight_is_never_answered_with_leave(client, at):
    asked = {"Origin": "http://evil.test", "Access-Control-Request-Method": "POST"}
    answer = client.options(f"{at}/step", headers=asked)
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_every_answer_has_the_headers_that_keep_other_pages_out(client, at):
    answers = [client.get("/"), client.get("/drive.js"), client.get(at), client.get("/nothing"),
               client.get("/", headers={"Host": "evil.test"}), client.get(at, headers={"Origin": "null"})]  # fmt: skip
    assert [answer.status_code for answer in answers] == [200, 200, 200, 404, 400, 403]
    for answer in answers:
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["connect-src"] == "'self'"
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"


def test_the_page_has_no_script_or_style_in_its_text():
    text = (PAGE / "index.html").read_text()
    assert not re.search(r"\son\w+\s*=|\sstyle\s*=|javascript:|<style", text)
    assert re.findall(r"<script[^>]*>", text) == ['<script src="drive.js">']


# Bodies


def test_a_huge_body_is_refused_with_or_without_its_length(client, at):
    exact = b'{"seed": 3}'.ljust(MAX_BODY_BYTES)
    assert client.post(f"{at}/reset", content=exact, headers=JSON).status_code == 200
    assert client.post(f"{at}/step", content=STEP, headers=JSON).json()["steps"] == 1
    assert client.post(f"{at}/reset", content=exact + b" ", headers=JSON).status_code == 413
    stream = iter([b" " * 1024] * 1000)
    assert client.post(f"{at}/reset", content=stream, headers=JSON).status_code == 413
    assert client.get(at).json()["steps"] == 1


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        ("-1", "seed: Input should be greater than or equal to 0"),
        ("4294967296", "seed: Input should be less than 4294967296"),
        ("1" + "0" * 400, "seed: Input should be less than 4294967296"),
        ("1.5", "seed: Input should be a valid integer"),
        ("3.0", "seed: Input should be a valid integer"),
        ('"3"', "seed: Input should be a valid integer"),
        ("true", "seed: Input should be a valid integer"),
        ("null", "seed: Input should be a valid integer"),
    ],
)
def test_a_seed_that_is_none_is_refused(client, made, at, seed, message):
    body = f'{{"seed": {seed}}}'.encode()
    for path in ("/api/rides", f"{at}/reset"):
        answer = client.post(path, content=body, headers=JSON)
        assert answer.status_code == 422 and answer.json()["error"] == message
    assert client.get(at).json()["steps"] == 1 and len(made) == 1


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "null", '"1"x'])
def test_a_speed_that_is_no_number_is_refused(client, at, value):
    answer = client.post(f"{at}/step", content=f'{{"seconds": 1, "speed_m_s": {value}}}'.encode(), headers=JSON)
    assert answer.status_code in (400, 422) and "\n" not in answer.json()["error"]
    assert client.get(at).json()["steps"] == 1


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b"[" * 4000, b'{"a":' * 800, b"9" * 4000])
def test_a_body_that_no_parser_likes_is_one_line(client, at, body):
    answer = client.post(f"{at}/step", content=body, headers=JSON)
    assert answer.status_code in (400, 422) and "\n" not in answer.json()["error"]


# The token


def test_beyond_the_loopback_every_request_needs_the_token():
    access = Access.of("192.168.1.5", "192.168.1.5")
    assert len(access.token) >= 32 and access.token != Access.of("192.168.1.5", "192.168.1.5").token
    with client_of(lambda: (ToyWorld(), None), access) as client:
        right = {"Host": "192.168.1.5:8321", "Authorization": f"Bearer {access.token}", **JSON}
        at = f"/api/rides/{client.post('/api/rides', content=b'{}', headers=right).json()['id']}"
        for wrong in (
            "",
            access.token,
            f"Bearer {access.token[:-1]}",
            f"Bearer {access.token}x",
            "Bearer ",
            "Bearer é",
        ):
            assert everything(client, at, {**right, "Authorization": wrong.encode("latin-1")}) == {401}, wrong
        refused = client.get(at, headers={"Host": "192.168.1.5:8321"})
        assert refused.json()["error"] == ("the token is missing. Open the address that `raev2 nwm drive` printed.")
        assert client.get("/", headers={"Host": "192.168.1.5:8321"}).status_code == 200  # the page tells no secret
        assert everything(client, at, right) == {200}
        assert everything(client, at, {**right, "Origin": "http://evil.test"}) == {403}


def test_the_token_is_compared_in_constant_time(monkeypatch):
    asked = []
    monkeypatch.setattr(secrets, "compare_digest", lambda given, own: asked.append((given, own)) or True)
    Access(token="abc").check("GET", {"host": "localhost", "authorization": "Bearer xyz"})
    assert asked == [(b"Bearer xyz", b"Bearer abc")]


def test_who_is_let_in_follows_from_the_address(monkeypatch):
    loopback = {"localhost", "127.0.0.1", "[::1]"}
    for host, bound in (("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("::1", "::1")):
        assert Access.of(host, bound).token is None and set(Access.of(host, bound).hosts) == loopback
    other = Access.of("robot.lan", "192.168.1.5", ["gate.example", "fd00::1"])
    assert set(other.hosts) == loopback | {"robot.lan", "192.168.1.5", "gate.example", "[fd00::1]"}
    monkeypatch.setattr(socket, "gethostname", lambda: "robot")
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_: [(0, 0, 0, "", ("192.168.1.5", 0)), (0, 0, 0, "", ("fd00::1", 0))]
    )
    for host, bound in (("0.0.0.0", "0.0.0.0"), ("::", "::"), ("", "0.0.0.0")):
        everywhere = Access.of(host, bound)
        assert everywhere.token and set(everywhere.hosts) == loopback | {"robot", "192.168.1.5", "[fd00::1]"}

    def unknown(*_):
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert set(Access.of("0.0.0.0", "0.0.0.0").hosts) == loopback | {"robot"}


def test_the_printed_address_carries_the_token(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "robot")
    assert page_address("127.0.0.1", "127.0.0.1", 80, None) == "http://127.0.0.1:80"
    assert page_address("::1", "::1", 8321, None) == "http://[::1]:8321"
    assert page_address("0.0.0.0", "0.0.0.0", 8321, "secret") == "http://robot:8321/#secret"


@pytest.mark.parametrize("name", ["*", "*.example", "http://a", "a b", "user@a", ""])
def test_an_allowed_name_must_be_a_name(name):
    with pytest.raises(SpecError, match=re.escape(
        f"--allow-host: not usable; got {name!r}; expected a name or an address, without port"
    )):  # fmt: skip
        Access.of("127.0.0.1", "127.0.0.1", [name])


def test_the_command_passes_its_names_on(monkeypatch):
    asked = []
    monkeypatch.setattr("raev2_tasks.nwm.drive.page.serve", lambda *arguments: asked.append(arguments[1:]))
    drive(["--toy", "--host", "0.0.0.0", "--port", "5", "--allow-host", "a", "--allow-host", "b"])
    assert asked == [("0.0.0.0", 5, ["a", "b"])]


# Bounds


class Waiting(ToyWorld):
    """A toy world whose steps wait."""

    go = threading.Event()

    def step(self, command, seconds):
        assert self.go.wait(60)
        return super().step(command, seconds)


def test_one_request_may_wait_behind_the_one_at_work_and_others_are_refused():
    Waiting.go.clear()
    with client_of(lambda: (Waiting(), None)) as client, ThreadPoolExecutor(MAX_REQUESTS + 3) as pool:
        at, other = (f"/api/rides/{client.post('/api/rides', json={}).json()['id']}" for _ in range(2))

        def step():
            return client.post(f"{at}/step", content=STEP, headers=JSON)

        try:
            answers = [pool.submit(step) for _ in range(MAX_REQUESTS + 3)]
            first = as_completed(answers, timeout=60)
            refused = [next(first).result() for _ in range(3)]  # the others wait for the world
        finally:
            Waiting.go.set()
        assert {answer.status_code for answer in refused} == {429}
        assert refused[0].json() == {"error": "drive: busy with earlier requests. Wait for their answers."}
        assert sorted(answer.result().json()["steps"] for answer in first) == [1, 2]
        assert step().json()["steps"] == 3  # and the ride is free again
        assert client.get(other).json()["steps"] == 0


def test_new_rides_queue_too():
    go = threading.Event()

    def make_worlds():
        assert go.wait(60)
        return ToyWorld(), None

    with client_of(make_worlds) as client, ThreadPoolExecutor(MAX_RIDES + 2) as pool:
        try:
            answers = [pool.submit(client.post, "/api/rides", json={}) for _ in range(MAX_RIDES + 2)]
            first = as_completed(answers, timeout=60)
            refused = [next(first).result().status_code for _ in range(2)]
        finally:
            go.set()
        assert refused == [429, 429]
        assert sorted(answer.result().status_code for answer in answers) == [200] * MAX_RIDES + [429, 429]


def test_sampler_steps_have_a_bound():
    class Sampled(ToyWorld):
        sampler_steps = 20

    ride = Drive(Sampled())
    ride.step(StepRequest(seconds=1, sampler_steps=MAX_SAMPLER_STEPS))
    with pytest.raises(SpecError, match="sampler_steps: too many; got 51; expected at most 50"):
        ride.step(StepRequest(seconds=1, sampler_steps=MAX_SAMPLER_STEPS + 1))
    assert ride.state()["steps"] == 1 and ride.world.sampler_steps == MAX_SAMPLER_STEPS
    Sampled.sampler_steps = 250  # the run's own number is always possible
    long = Drive(Sampled())
    long.step(StepRequest(seconds=1, sampler_steps=250))
    assert long.state()["max_sampler_steps"] == 250
    with pytest.raises(SpecError, match="got 251; expected at most 250"):
        long.step(StepRequest(seconds=1, sampler_steps=251))


def test_a_ride_ends_somewhere():
    ride = Drive(ToyWorld(size_px=2))
    for _ in range(MAX_STEPS):
        ride.step(StepRequest(seconds=1))
    with pytest.raises(SpecError, match="ride: it cannot get longer; got 1000 steps. Download it, then reset."):
        ride.step(StepRequest(seconds=1))
    assert ride.state()["steps"] == MAX_STEPS
    for _ in range(UNDO_STEPS):
        ride.undo()
    with pytest.raises(SpecError, match="undo: earlier steps are not kept; got 20 undone"):
        ride.undo()
    assert ride.state()["steps"] == MAX_STEPS - UNDO_STEPS
    ride.step(StepRequest(seconds=1))
    ride.undo()
    ride.reset(0)
    ride.undo()  # nothing at the start
    assert ride.state()["steps"] == 0


def test_a_dropped_ride_frees_its_memory(client, made, at):
    world = weakref.ref(made[0])
    made.clear()
    gc.collect()
    assert world() is not None
    for _ in range(MAX_RIDES):
        client.post("/api/rides", json={})
    made.clear()
    gc.collect()
    assert world() is None
    assert client.get(at).status_code == 404
