"""The files of the page."""

import re

import httpx
import pytest

from package_files import PACKAGE
from services import running

FILES = {path.name: path.read_text() for path in sorted((PACKAGE / "service" / "page").iterdir())}


def test_all_files_are_served_with_their_types():
    types = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    with running(page=True) as address:
        for name, content in FILES.items():
            response = httpx.get(address if name == "index.html" else f"{address}/static/{name}")
            assert response.text == content
            assert response.headers["content-type"].split(";")[0] == types[name.rpartition(".")[2]]


def test_the_service_alone_has_no_page():
    with running() as address:
        assert httpx.get(address).status_code == 404
        assert httpx.get(f"{address}/static/page.js").status_code == 404


@pytest.mark.parametrize("name", FILES)
def test_nothing_comes_from_other_hosts_and_nothing_is_inline(name):
    content = FILES[name].replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//\w+\.\w+|@import", content)
    assert not re.search(r"<style|\bstyle=|\son\w+=|<script(?![^>]*src=)|\beval\(", content)


def test_scripts_find_their_elements():
    ids = set(re.findall(r'id="([\w-]+)"', FILES["index.html"]))
    scripts = FILES["page.js"] + FILES["picture.js"]
    used = set(re.findall(r'(?:\bat|getElementById)\("([\w-]+)"\)', scripts))
    assert len(used) > 15 and used <= ids
    files = re.findall(r'/static/([\w.]+)"', FILES["index.html"]) + re.findall(r'from "\./([\w.]+)"', scripts)
    assert {*files} <= FILES.keys()
