"""`raev2 demo` as the pages show it, in a process of its own: pictures are those of `raev2 sample`, and it works."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_docs import MANUAL, numbered_lines

from raev2.command.cli import main
from raev2.errors import TaskError
from raev2.sampler import CPU_CHUNK

(LINE,) = (line.arguments for page in MANUAL for line in numbered_lines(page) if line.arguments[0] == "demo")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def address(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("gradio", reason="the extra demo is not installed (gradio)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("demo") / "log"
    shutil.copytree(trained_run, log.parent / "runs/imagenet/quickstart")
    command = [sys.executable, "-m", "raev2", *LINE, "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=log.parent)
    try:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, log.read_text()
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def test_its_pictures_are_those_of_sample(address, trained_run, tmp_path, capsys):
    from gradio_client import Client

    client = Client(address, verbose=False, download_files=str(tmp_path / "demo"))
    label = "disc"
    shown, strip, said = client.predict(label, "internal", 1.5, 3, 7, api_name="/sample")
    line = [
        "--label",
        label,
        "--n",
        str(CPU_CHUNK),
        "--guidance",
        "internal",
        "--scale",
        "1.5",
        "--steps",
        "3",
        "--seed",
        "7",
    ]
    assert main(["sample", "--run", str(trained_run), *line, "--out", str(tmp_path / "out")]) == 0
    for number, picture in enumerate(shown):
        with Image.open(picture["image"]) as one, Image.open(tmp_path / "out" / f"{number:05d}.png") as other:
            assert np.array_equal(np.asarray(one.convert("RGB")), np.asarray(other))
    assert len(shown) == CPU_CHUNK and said == "step 3 of 3, t = 0.000"
    assert [picture["caption"] for picture in strip] == ["step 1", "step 2", "step 3"]


def test_its_page_samples_in_a_browser_and_asks_no_other_machine(address):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium here: the page was not looked at in a browser")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page, asked = browser.new_page(), []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.get_by_label("steps").first.fill("2")
        page.get_by_role("button", name="Sample").click()
        page.get_by_text("step 2 of 2").wait_for(timeout=60_000)
        assert page.locator("img").count() >= 4
        assert not [url for url in asked if url.startswith("http") and not url.startswith(address)]
        browser.close()


def test_without_gradio_it_says_what_to_install(trained_run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "--run", str(trained_run)]) == TaskError.exit_code
    assert "raev2 demo: needs gradio; got" in (said := capsys.readouterr().err) and "'raev2[demo]'" in said
