"""The chat page's files, as they are served."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the page is served by FastAPI: pip install avlm[serve]")
pytest.importorskip("httpx", reason="requests are made by httpx: pip install avlm[dev]")
from fastapi import FastAPI
from fastapi.testclient import TestClient

import avlm.inference.serving
from avlm.inference.serving.pages import page_files, page_router

FOLDER = Path(avlm.inference.serving.__file__).parent / "page"


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.include_router(page_router())
    return TestClient(app)


def test_every_file_comes_with_its_type_and_the_rules_of_the_page(client: TestClient) -> None:
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    for path in FOLDER.iterdir():
        got = client.get("/" if path.name == "index.html" else f"/page/{path.name}")
        assert got.status_code == 200 and got.content == path.read_bytes()
        assert got.headers["content-type"].partition(";")[0] == types[path.suffix]
        assert got.headers["x-content-type-options"] == "nosniff"
        assert got.headers["cache-control"] == "no-cache"
        rules = dict(rule.split(" ", 1) for rule in got.headers["content-security-policy"].split("; "))
        assert rules["default-src"] == "'none'" and rules["script-src"] == rules["connect-src"] == "'self'"
        assert "unsafe" not in got.headers["content-security-policy"]
        assert rules["frame-ancestors"] == "'none'"


def test_a_browser_keeps_what_has_not_changed(client: TestClient) -> None:
    first = client.get("/page/main.js")
    again = client.get("/page/main.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/page/main.js", headers={"If-None-Match": '"other"'}).status_code == 200
    head = client.head("/page/main.js")
    assert head.status_code == 200 and head.headers["etag"] == first.headers["etag"]


@pytest.mark.parametrize(
    "path", ["/page/none.js", "/page/../pages.py", "/page/..%2fpages.py", "/page/%2e%2e/pages.py", "/page/"]
)
def test_there_is_nothing_but_the_page(client: TestClient, path: str) -> None:
    got = client.get(path)
    assert got.status_code == 404 and b"def page_router" not in got.content
    assert client.post("/").status_code == 405


def test_everything_that_the_page_names_is_there_and_nothing_is_elsewhere() -> None:
    known = page_files()
    named = set()
    for name, file in known.items():
        text = file.body.decode()
        named |= {found.removeprefix("page/") for found in re.findall(r'(?:src|href)="(page/[^"]+)"', text)}
        named |= set(re.findall(r'from "\./([^"]+)"', text)) | set(re.findall(r'new URL\("([\w.]+)", import', text))
        addresses = re.findall(
            r"\b(?:https?:)?//[\w-]+\.[^\s\"')]+", re.sub(r"^\s*(?://|/\*).*$", "", text, flags=re.M)
        )
        assert [a for a in addresses if "www.w3.org/2000/svg" not in a] == [], name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), name
        assert not re.search(r"<[^>]+\s(?:on\w+|style)=|<script(?![^>]+src=)|<style", text) or name.endswith(".js"), (
            name
        )
    assert named == set(known) - {"index.html"}


def test_the_package_brings_the_page() -> None:
    import tomllib

    settings = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["avlm.inference.serving"]
    assert {path.name for path in FOLDER.iterdir()} == {p.name for glob in patterns for p in FOLDER.parent.glob(glob)}
