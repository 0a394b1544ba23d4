"""Picture of the drive page for the documentation: real keys in a real browser. Needs Chromium and playwright.

python docs/drive_picture.py --toy --keys wwawwd docs/figures/drive-toy.png
python docs/drive_picture.py --run runs/nwm/laptop --engine --keys wwawwd docs/figures/drive-model.png
"""

from __future__ import annotations

import argparse
import shutil
import threading

import uvicorn
from playwright.sync_api import sync_playwright

from raev2_tasks.nwm.drive.page import make_app, open_socket, open_worlds

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("out", metavar="FILE.png")
parser.add_argument("--run", metavar="DIR")
parser.add_argument("--toy", action="store_true")
parser.add_argument("--engine", action="store_true")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--keys", default="wwawaww", help="one step for each key")
options = parser.parse_args()

app = make_app(open_worlds(options.run, toy=options.toy, engine=options.engine))
with open_socket("127.0.0.1", 0) as listener:
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        with sync_playwright() as playwright:
            path = next(filter(None, map(shutil.which, BROWSERS)), None)
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1240, "height": 720}, color_scheme="light")
            page.goto(f"http://127.0.0.1:{listener.getsockname()[1]}")
            page.wait_for_selector("body[data-steps='0']")
            page.fill("#seed", str(options.seed))
            page.click("#reset")
            for number, key in enumerate(options.keys, start=1):
                page.keyboard.press(key)
                page.wait_for_selector(f"body[data-steps='{number}']", timeout=120_000)
            page.locator("body").screenshot(path=options.out)
            browser.close()
    finally:
        server.should_exit = True
        thread.join()
