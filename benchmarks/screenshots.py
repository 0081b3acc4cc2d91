"""Take the pictures of the page that docs/server.md shows, with Chromium and the demo model.

    python benchmarks/screenshots.py [--out docs]

The server gets few blocks, so that requests fork, share and are swapped out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SETTINGS = [
    *("--num-gpu-blocks-override", "96", "--max-model-len", "640", "--max-num-seqs", "24"),
    *("--preemption-mode", "swap", "--swap-space", "0.05"),
]
SYSTEM = (
    "You are a librarian in a small town by the sea. You answer in a friendly voice, name three books, say "
    "in one sentence each why they are worth reading, and end with a question about the weather."
)
QUESTIONS = ["About cats?", "About whales?", "About bridges?", "About bread?", "About maps?", "About clocks?"]
CHAT = "Write a Python function that reverses a string."


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """Start a server; yield its address."""
    command = [sys.executable, "-m", "cupaged.serve", "--port", "0", *SETTINGS]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        for line in server.stdout:
            if found := re.search(r"is served on (\S+)", line):
                yield found[1]
                break
        else:
            raise RuntimeError("the server has not started")
    finally:
        server.terminate()
        server.terminate()  # what still runs is not waited for
        server.wait()


def send(address: str, question: str, n: int) -> None:
    """Send a chat request and wait for its answers."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    body: dict[str, Any] = {"model": "SmolLM2-135M-Instruct", "messages": messages, "n": n, "max_tokens": 400}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps({**body, "ignore_eos": True}).encode(),
        {"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=600).read()


def take(page: Page, path: Path) -> None:
    """Write a picture of the page, in 256 colours."""
    page.screenshot(path=path)
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(256).save(path, optimize=True)


def wait_for_preemption(page: Page) -> None:
    """Wait until requests run, and the blocks of another one are in the swap space."""
    condition = """() => {
        const held = Object.values(window.blockPool.state().requests);
        return held.some(([status]) => status === "swapped") && held.some(([status]) => status === "running");
    }"""
    page.wait_for_function(condition, timeout=300_000)


def main(arguments: list[str] | None = None) -> int:
    """Write both pictures and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path("docs"), help="directory for the pictures")
    options = parser.parse_args(arguments)
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        print("error: no Chromium is installed", file=sys.stderr)
        return 1
    pool = ThreadPoolExecutor(len(QUESTIONS))
    with serving() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="dark")
        page.goto(address)
        page.click("#open-settings")
        page.fill("[name=temperature]", "0")
        page.fill("[name=max_tokens]", "160")
        page.click("#settings .primary")
        page.fill("#input", CHAT)
        page.press("#input", "Enter")
        page.wait_for_selector(".message .stats", timeout=300_000)
        page.set_viewport_size({"width": 1280, "height": 640})
        take(page, options.out / "page-chat.png")
        page.set_viewport_size({"width": 1280, "height": 800})
        page.click("#tab-pool")
        page.wait_for_selector("#pool-status.live")
        for i, question in enumerate(QUESTIONS):
            pool.submit(send, address, question, 1 + i % 4)
        wait_for_preemption(page)
        time.sleep(0.25)
        take(page, options.out / "page-pool.png")
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
