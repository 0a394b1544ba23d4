"""The drive page in a real browser: what the keys do, who may use it, what other pages cannot do."""

from __future__ import annotations

import re
import shutil
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from test_drive import SlowModel

from raev2_tasks.nwm.drive.access import Access
from raev2_tasks.nwm.drive.page import make_app, open_socket
from raev2_tasks.nwm.worlds.worlds import ToyWorld

pytest.importorskip("starlette", reason="the extra nwm is not installed (starlette)")
uvicorn = pytest.importorskip("uvicorn", reason="the extra nwm is not installed (uvicorn)")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def serving(app) -> Iterator[str]:
    """Address of a server in a thread."""
    with open_socket("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=120)


@pytest.fixture(scope="module")
def toy_address() -> Iterator[str]:
    with serving(make_app(lambda: (ToyWorld(), ToyWorld()))) as address:
        yield address


@pytest.fixture(scope="module")
def model_address() -> Iterator[str]:
    with serving(make_app(lambda: (SlowModel(), None))) as address:
        yield address


REBINDING = "--host-resolver-rules=MAP evil.test 127.0.0.1"  # what an attacker's name server does


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium here: the tests of the drive page in a browser did not run")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", REBINDING]
        )
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
    with serving(make_app(lambda: (ToyWorld(), None))) as address:
        page.goto(address)
        wait_for_steps(page, 0)
    page.keyboard.press("w")
    page.wait_for_selector("#warning.error")
    assert page.inner_text("#warning") == "The server does not answer."
    page.problems.clear()  # the browser reports the failed request


# Controls.


@pytest.mark.parametrize("text", ["-3", "1.5", "4294967296", "9" * 400, "1e3", "three", ""])
def test_an_invalid_seed_is_refused_on_the_page(page, toy_address, text):
    page.goto(toy_address)
    wait_for_steps(page, 0)
    page.keyboard.press("w")
    wait_for_steps(page, 1)
    page.fill("#seed", text)
    page.click("#reset")
    page.wait_for_selector("#warning.error")
    assert page.inner_text("#warning") == (
        f"seed: not usable; got {text or 'nothing'}; expected a whole number, 0 to 4294967295."
    )
    assert page.get_attribute("#seed", "aria-invalid") == "true"
    assert page.evaluate("[ride.steps, ride.seed]") == [1, 0]
    page.fill("#seed", "4294967295")
    page.keyboard.press("Enter")
    wait_for_steps(page, 0)
    assert page.inner_text("#warning") == "" and page.evaluate("ride.seed") == 2**32 - 1
    assert page.get_attribute("#seed", "aria-invalid") == "false"


def test_sliders_are_moved_by_key_and_keep_the_focus(page, model_address):
    page.goto(model_address)
    wait_for_steps(page, 0)
    for name, id, unit in (
        ("speed", "speed", "m/s"),
        ("turn rate", "turn", "°/s"),
        ("sampler steps", "sampler-steps", ""),
    ):
        slider = page.get_by_role("slider", name=name)
        step, before = float(slider.get_attribute("step")), float(slider.input_value())
        slider.focus()
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
        assert float(slider.input_value()) == pytest.approx(before + 2 * step)
        assert page.evaluate("document.activeElement.id") == id
        said = slider.get_attribute("aria-valuetext")
        assert unit in said and said == page.inner_text(f"#{id}-text")
    assert page.evaluate("ride.steps") == 0
    page.keyboard.press("w")  # drives from there
    wait_for_steps(page, 1)
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowUp")  # and the arrows drive again
    wait_for_steps(page, 2)


def test_tab_reaches_every_control_and_every_one_has_a_name(page, model_address):
    page.goto(model_address)
    wait_for_steps(page, 0)
    controls = page.evaluate("[...document.querySelectorAll('button, input, select')].map((one) => one.outerHTML)")
    reached = []
    for _ in controls:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.outerHTML"))
    assert reached == controls
    roles = ("button", "slider", "combobox", "textbox")
    named = sum(page.get_by_role(role, name=re.compile(r"\w")).count() for role in roles)
    assert named == len(controls)


def test_buttons_work_by_key(page, toy_address):
    page.goto(toy_address)
    wait_for_steps(page, 0)
    page.get_by_role("button", name="W, ahead", exact=True).focus()
    page.keyboard.press("Enter")
    wait_for_steps(page, 1)
    page.keyboard.press("Space")
    wait_for_steps(page, 2)
    x = page.evaluate("ride.trail.map((pose) => pose[0])")
    assert len(set(x)) == 3  # both went ahead, space did not wait
    page.focus("#undo")
    page.keyboard.press("Space")
    wait_for_steps(page, 1)
    page.keyboard.press("Enter")
    wait_for_steps(page, 0)


def test_after_a_click_all_keys_drive(page, toy_address):
    page.goto(toy_address)
    wait_for_steps(page, 0)
    page.click("#turn", position={"x": 120, "y": 5})
    assert float(page.input_value("#turn")) > 100
    page.keyboard.press("ArrowLeft")
    wait_for_steps(page, 1)
    page.click("#undo")
    wait_for_steps(page, 0)
    page.keyboard.press("Space")
    wait_for_steps(page, 1)
    assert page.evaluate("ride.trail[0]") == page.evaluate("ride.trail[1]")  # waited


@pytest.mark.parametrize("width", [320, 360, 414, 1240])
def test_nothing_is_wider_than_the_screen(page, width):
    class Long(SlowModel):
        name = "runs/nwm/" + "a-rather-long-name-of-a-run-folder" * 5

    page.set_viewport_size({"width": width, "height": 740})
    with serving(make_app(lambda: (Long(), ToyWorld()))) as address:
        page.goto(address)
        wait_for_steps(page, 0)
        page.fill("#speed", "3")
        page.keyboard.press("w")
        wait_for_steps(page, 1)
        assert page.is_visible("#warning.warn")
        page.fill("#seed", "9" * 300)
        page.click("#reset")
        page.wait_for_selector("#warning.error")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        right = "[...document.body.querySelectorAll('*')].map((one) => one.getBoundingClientRect().right)"
        assert max(page.evaluate(right)) <= width


# Tabs.


def test_a_new_tab_is_a_new_ride_and_so_is_a_copy_of_a_tab(browser, toy_address):
    context = browser.new_context()
    page, other = context.new_page(), context.new_page()
    page.goto(toy_address)
    wait_for_steps(page, 0)
    page.keyboard.press("w")
    wait_for_steps(page, 1)
    page.reload()
    wait_for_steps(page, 1)
    with page.expect_popup() as opened:  # a copy: it gets what is in the session storage of this tab
        page.evaluate("void open(location.href)")
    other.goto(toy_address)
    tabs = [opened.value, other]
    for tab in tabs:
        wait_for_steps(tab, 0)
        tab.keyboard.press("a")
        wait_for_steps(tab, 1)
    assert len({tab.evaluate("ride.id") for tab in (page, *tabs)}) == 3
    assert page.evaluate("ask(`/${ride.id}`).then((state) => state.trail)") == page.evaluate("ride.trail")
    for tab in (page, *tabs):  # each finds its own again
        id = tab.evaluate("ride.id")
        tab.reload()
        wait_for_steps(tab, 1)
        assert tab.evaluate("ride.id") == id
    context.close()


# Pages of other origins.

ATTACK = """
async ([address, id]) => {
  const ride = `${address}/api/rides/${id}`, read = [];
  const posts = [[`${address}/api/rides`, {}], [`${ride}/step`, { seconds: 0.5 }], [`${ride}/reset`, { seed: 9 }],
    [`${ride}/undo`, {}]];
  const make = (tag, values) => Object.assign(document.createElement(tag), values);
  const attempt = async (url, options) => {
    try {
      const text = await (await fetch(url, options)).text();
      if (text) read.push(text);
    } catch (error) { if (!(error instanceof TypeError)) throw error; }
  };
  for (const mode of ["cors", "no-cors"]) {
    for (const url of [address, ride, `${ride}/recording`]) await attempt(url, { mode });
    for (const [url, value] of posts) {
      const body = JSON.stringify(value);
      for (const type of ["text/plain", "application/json", "application/x-www-form-urlencoded"]) {
        await attempt(url, { mode, method: "POST", body, headers: { "Content-Type": type } });
      }
      await attempt(url, { mode, method: "POST", body: new Blob([body]) });
      navigator.sendBeacon(url, body);
    }
  }
  for (const [url, value] of posts) { // a form, whose answer lands in a frame
    const text = JSON.stringify({ ...value, x: "=" }), cut = text.indexOf("=");
    const frame = make("iframe", { name: url });
    const form = make("form", { method: "post", action: url, target: url, enctype: "text/plain" });
    form.append(make("input", { name: text.slice(0, cut), value: text.slice(cut + 1) }));
    const loaded = new Promise((done) => { frame.onload = done; });
    document.body.append(frame, form);
    form.submit();
    await loaded;
  }
  const frame = make("iframe", { src: address }); // to lay something over it
  const loaded = new Promise((done) => { frame.onload = done; });
  document.body.append(frame);
  await loaded;
  return read;
}
"""


async def attacker(scope, receive, send) -> None:
    """The server of another page, which is empty."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
    await send({"type": "http.response.body", "body": b"<!doctype html><body>"})


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "evil.test"])
def test_a_page_of_another_origin_can_neither_step_reset_nor_read_a_ride(page, browser, host):
    """The attacker knows the name of the ride, and tries what a page can send."""
    made = []

    def make_worlds():
        made.append(ToyWorld())
        return made[-1], None

    with serving(make_app(make_worlds)) as address, serving(attacker) as elsewhere:
        page.goto(address)
        wait_for_steps(page, 0)
        page.keyboard.press("w")
        wait_for_steps(page, 1)
        before, id = page.evaluate("ask(`/${ride.id}`)"), page.evaluate("ride.id")
        evil = browser.new_page()
        evil.goto(elsewhere.replace("127.0.0.1", host))
        assert evil.evaluate(ATTACK, [address, id]) == []
        assert page.evaluate("ask(`/${ride.id}`)") == before and len(made) == 1
        evil.close()
        assert page.evaluate(ATTACK, [address, id]) != []  # the same from the own page is not without effect
        assert page.evaluate("ask(`/${ride.id}`)") != before and len(made) > 1
    page.problems.clear()  # what was refused


def test_a_foreign_name_that_leads_to_the_server_shows_nothing(browser, toy_address):
    """DNS rebinding: the browser takes the server for one of the attacker."""
    evil = browser.new_page()
    answer = evil.goto(toy_address.replace("127.0.0.1", "evil.test"))
    assert answer.status == 400 and evil.inner_text("body") == "Invalid host header"
    api = "fetch('/api/rides', { method: 'POST', body: '{}', headers: { 'Content-Type': 'application/json' } })"
    assert evil.evaluate(f"{api}.then((answer) => answer.status)") == 400
    evil.close()


def test_the_token_in_the_address_opens_the_page(page, tmp_path: Path):
    with serving(make_app(lambda: (ToyWorld(), None), Access(token="a-token"))) as address:
        page.goto(address)
        page.wait_for_selector("#warning.error")
        assert page.inner_text("#warning") == "the token is missing. Open the address that `raev2 nwm drive` printed."
        page.problems.clear()  # the browser reports the refusal
        page.goto(f"{address}/#a-token")  # only what is behind # changes: the page loads itself again
        wait_for_steps(page, 0)
        page.keyboard.press("w")
        wait_for_steps(page, 1)
        with page.expect_download() as download:
            page.click("#recording")
        download.value.save_as(tmp_path / "ride.zip")
    assert zipfile.is_zipfile(tmp_path / "ride.zip")
