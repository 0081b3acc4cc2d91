"""The files of the page, without a browser."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "engine/server/page"
FILES = sorted(path.name for path in FOLDER.iterdir())
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


@pytest.mark.parametrize("name", ["", *FILES])
def test_files_come_with_their_type_and_a_policy(server, name):
    path = f"/page/{name}" if name else "/"
    response = httpx.get(server.url + path)
    assert response.status_code == 200
    assert response.headers["content-type"].split(";")[0] == TYPES[(name or "page.html").split(".")[1]]
    assert response.content == (FOLDER / (name or "page.html")).read_bytes()
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"https?:|\*", policy)
    unchanged = httpx.get(server.url + path, headers={"If-None-Match": response.headers["etag"]})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    head = httpx.head(server.url + path)
    assert (head.status_code, head.headers["etag"]) == (200, response.headers["etag"])


@pytest.mark.parametrize("name", ["no.js", "..%2Fapp.py", "%2e%2e/app.py", "page.html/"])
def test_nothing_else_is_served(server, name):
    response = httpx.get(f"{server.url}/page/{name}")
    assert response.status_code == 404
    assert "does not exist" in response.json()["error"]["message"]


@pytest.mark.parametrize("name", FILES)
def test_files_are_short_and_ask_for_nothing_elsewhere(name):
    text = (FOLDER / name).read_text()
    assert len(text.splitlines()) <= 400
    addresses = set(re.findall(r"https?://[\w.]+", text)) - {"http://www.w3.org"}  # SVG's name
    assert not addresses
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text
    )
    assert not re.search(r"<[^>]*\s(style|on\w+)=", text), "the policy forbids it"
