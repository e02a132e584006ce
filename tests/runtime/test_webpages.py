"""The common part of pages: text is escaped, names are known, files are served as they are."""

import asyncio
import time

import jinja2
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from worker.runtime import webpages


def rendered(folder, source: str, **values: object) -> str:
    (folder / "page.html").write_text(source)
    return webpages.templates(folder).get_template("page.html").render(**values)


def test_text_is_escaped_and_markup_of_the_page_is_not(tmp_path):
    shown = rendered(tmp_path, "<b>{{ name }}</b>", name="<script>'\"&")
    assert shown == "<b>&lt;script&gt;&#39;&#34;&amp;</b>"


def test_name_that_no_view_gives_is_an_error(tmp_path):
    for source in ("{{ rewrad }}", "{% for x in rewrad %}{% endfor %}", "{{ node.rewrad }}"):
        with pytest.raises(jinja2.UndefinedError, match="rewrad"):
            rendered(tmp_path, source, reward=1, node={})


def test_lines_of_blocks_leave_no_empty_lines(tmp_path):
    source = "<ul>\n  {% for n in (1, 2) %}\n  <li>{{ n }}\n  {% endfor %}\n</ul>"
    assert rendered(tmp_path, source) == "<ul>\n  <li>1\n  <li>2\n</ul>"


def test_first_folder_wins(tmp_path):
    for name in ("own", "common"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "page.html").write_text(name)
    (tmp_path / "common/other.html").write_text("other")
    found = webpages.templates(tmp_path / "own", tmp_path / "common")
    assert found.get_template("page.html").render() == "own"
    assert found.get_template("other.html").render() == "other"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "–"), (0.0, "1970-01-01 00:00"), (1798761659.9, "2027-01-01 00:00")],
)
def test_time_is_shown_in_utc(tmp_path, monkeypatch, seconds, shown):
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    time.tzset()
    try:
        assert rendered(tmp_path, "{{ at|day }}", at=seconds) == shown
    finally:
        monkeypatch.undo()
        time.tzset()


def served(application: web.Application, *paths: str) -> list[tuple[int, str, str, bytes]]:
    """Return status, type, a header of ours, and body of each path."""

    async def ask() -> list[tuple[int, str, str, bytes]]:
        async with TestClient(TestServer(application)) as client:
            found = []
            for path in paths:
                async with client.get(path) as answer:
                    kind, ours = answer.headers["Content-Type"], answer.headers.get("X-Ours", "")
                    found.append((answer.status, kind, ours, await answer.read()))
            return found

    return asyncio.run(ask())


def test_files_are_served_with_their_types_and_headers(tmp_path):
    (tmp_path / "page.js").write_bytes("let ü = 1;".encode())
    (tmp_path / "secret.css").write_text("not named")
    application = web.Application()
    webpages.add_files(application, tmp_path, ("page.js",), {"X-Ours": "yes"})
    script, style, icon, unnamed = served(
        application, "/page.js", "/base.css", "/icon.svg", "/secret.css"
    )
    assert script == (200, "text/javascript; charset=utf-8", "yes", "let ü = 1;".encode())
    assert style[:3] == (200, "text/css; charset=utf-8", "yes")
    assert icon[:3] == (200, "image/svg+xml; charset=utf-8", "yes")
    assert b"<svg" in icon[3]
    assert unnamed[0] == 404


def test_file_is_read_once_at_the_start(tmp_path):
    file = tmp_path / "page.css"
    file.write_text("old")
    application = web.Application()
    webpages.add_file(application, file, {})
    file.unlink()
    assert served(application, "/page.css")[0][3] == b"old"


def test_missing_file_and_unknown_type_stop_the_service_at_its_start(tmp_path):
    with pytest.raises(FileNotFoundError):
        webpages.add_file(web.Application(), tmp_path / "none.css", {})
    (tmp_path / "page.exe").touch()
    with pytest.raises(KeyError):
        webpages.add_file(web.Application(), tmp_path / "page.exe", {})
