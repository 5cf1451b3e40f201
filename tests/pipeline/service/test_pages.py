"""Pages: who may see them, what forms they take, and what a browser may do with them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlencode

import httpx
import pytest
import yaml

from counterweight.pipeline.jobs.journal import Ended
from counterweight.pipeline.jobs.lease import take
from counterweight.pipeline.jobs.states import Cause
from counterweight.pipeline.service.lines import placed
from counterweight.pipeline.service.problems import FieldProblem
from tests.pipeline.jobs.memory import MemoryStore
from tests.pipeline.service.house import House, bundle, document

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
HTML = {"Accept": "text/html"}


class Browser:
    """Keeps cookies, and sends a page's own forms."""

    def __init__(self, house: House, who: str | None = "submitter") -> None:
        self.house, self.cookies = house, httpx.Cookies()
        if who is not None:
            answer = self.post("/sign-in", {"token": f"{who}-token"}, proof=False)
            assert (answer.status_code, answer.headers["location"]) == (303, "/")

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self._send(lambda client: client.get(path, headers={**HTML, **headers}))

    def post(self, path: str, fields: dict[str, str], *, proof: bool = True, **headers: str) -> httpx.Response:
        if proof:
            found = re.search(r'name="csrf" value="([0-9a-f]+)"', self.get("/").text)
            assert found is not None
            fields = {**fields, "csrf": found[1]}
        sent = {**HTML, **FORM, **headers}
        return self._send(lambda client: client.post(path, content=urlencode(fields), headers=sent))

    def _send(self, send: Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]) -> httpx.Response:
        async def sent() -> httpx.Response:
            async with self.house.client() as client:
                client.cookies = self.cookies
                answer = await send(client)
                self.cookies = client.cookies
                return answer

        return asyncio.run(sent())


class Page(HTMLParser):
    """Counts what a page is made of."""

    def __init__(self, answer: httpx.Response) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(answer.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(MemoryStore(), roots=("file:/allowed", tmp_path.as_uri()))


def end(house: House, id: str, line: str = "") -> None:
    lease = take(house.jobs, id, "driver")
    assert lease is not None
    assert lease.end(Ended(cause=Cause.GATE, exit_code=3, line=line))


def test_a_token_opens_pages_and_is_hidden_from_scripts(house: House) -> None:
    nobody = Browser(house, None)
    for path in ("/", "/batches", "/schedules", "/submit", "/jobs/x"):
        answer = nobody.get(path)
        assert (answer.status_code, answer.headers["location"]) == (303, "/sign-in")
    wrong = nobody.post("/sign-in", {"token": "guess"}, proof=False)
    assert wrong.status_code == 401
    assert "No such token" in wrong.text
    assert "set-cookie" not in wrong.headers
    right = nobody.post("/sign-in", {"token": "submitter-token"}, proof=False)
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(right.headers["set-cookie"].split("; "))
    assert nobody.get("/").status_code == 200
    assert nobody.post("/sign-out", {}).headers["location"] == "/sign-in"
    assert nobody.get("/").status_code == 303


def test_the_cookie_is_nothing_to_the_api(house: House) -> None:
    assert Browser(house).get("/v1/jobs").status_code == 401


@pytest.mark.parametrize(
    ("fields", "headers", "status"),
    [
        ({}, {}, 403),
        ({"csrf": "0" * 64}, {}, 403),
        ({"csrf": "ü"}, {}, 403),
        (None, {"Origin": "https://evil.example"}, 403),
        (None, {"Origin": "null"}, 403),
        (None, {"Sec-Fetch-Site": "cross-site"}, 403),
        (None, {"Content-Type": "text/plain"}, 415),
        (None, {"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({str(number): "" for number in range(50)}, {}, 400),
    ],
)
def test_only_our_own_pages_send_forms(
    house: House, fields: dict[str, str] | None, headers: dict[str, str], status: int
) -> None:
    id = house.submit()["id"]
    browser = Browser(house)
    sent = {} if fields is None else fields
    for path in (f"/jobs/{id}/cancel", "/submit", "/sign-out"):
        answer = browser.post(path, sent, proof=fields is None, **headers)
        assert answer.status_code == status, answer.text
        assert "text/html" in answer.headers["content-type"]
    assert [job.state.value for job in house.jobs.all()] == ["queued"]


def test_a_viewer_and_another_tenant_change_nothing(house: House) -> None:
    id = house.submit()["id"]
    viewer, other = Browser(house, "viewer"), Browser(house, "other")
    assert viewer.post(f"/jobs/{id}/cancel", {}).status_code == 403
    assert viewer.post("/submit", {"kind": "job", "manifest": yaml.safe_dump(document("x"))}).status_code == 403
    assert "Cancel" not in viewer.get(f"/jobs/{id}").text
    assert other.get(f"/jobs/{id}").status_code == 404
    assert other.post(f"/jobs/{id}/cancel", {}).status_code == 404
    assert id not in other.get("/").text
    assert [job.state.value for job in house.jobs.all()] == ["queued"]


def test_a_job_is_submitted_watched_and_cancelled(house: House, tmp_path: Path) -> None:
    browser = Browser(house)
    asked = yaml.safe_dump(document(output=tmp_path.as_uri()))
    assert browser.post("/submit", {"kind": "job", "manifest": asked.replace("\n", "\r\n")}).status_code == 303
    (job,) = house.jobs.all()
    run = tmp_path / "_work" / "events" / job.id / "20991231T000000Z-abcdef"
    run.mkdir(parents=True)
    told = ['{"kind": "planned", "blocks": 8, "reused": 0}', '{"kind": "block_done"}', '{"kind": "block_done"}']
    told += [
        f'{{"kind": "stage_entered", "stage": "{stage}", "time": {at}}}'
        for stage, at in (("blocks", 10), ("assemble", 12.5))
    ]
    (run / "00001.jsonl").write_text("\n".join(told) + "\n")
    house.store.write(f"_logs/{job.id}/0001/00001.log", b"<script>alert(1)</script>\n")
    page = browser.get(f"/jobs/{job.id}")
    assert "2 of 8 blocks" in page.text
    assert ">2.5<" in page.text
    assert "&lt;script&gt;alert(1)" in page.text
    assert [meta["content"] for meta in Page(page).all("meta") if meta.get("http-equiv") == "refresh"] == ["5"]
    assert job.id in browser.get("/").text
    assert browser.post(f"/jobs/{job.id}/cancel", {}).status_code == 303
    page = browser.get(f"/jobs/{job.id}")
    assert "cancelled" in page.text
    assert not [meta for meta in Page(page).all("meta") if "http-equiv" in meta]


def test_what_is_wrong_stands_at_its_line(house: House) -> None:
    text = (
        yaml.safe_dump(document(), sort_keys=False)
        .replace("bits: 4", "bits: 9")
        .replace("sequences: 12", "sequences: 0")
    )
    answer = Browser(house).post("/submit", {"kind": "job", "manifest": text})
    assert answer.status_code == 422
    lines = text.split("\n")
    for field, value in (("bits", "bits: 9"), ("sequences", "sequences: 0")):
        number = next(number for number, line in enumerate(lines, 1) if value in line)
        assert re.search(rf"line {number}: spec\.[a-z.]+\.{field}: ", answer.text)
    assert house.keys() == []


def test_lines_of_lists_of_what_is_missing_and_of_what_is_no_yaml() -> None:
    def at(text: str, field: str, detail: str = "") -> list[int]:
        return list(placed(text, [FieldProblem(field=field, detail=detail)]))

    text = "a:\n  b:\n  - x: 1\n  - x: 2\n"
    assert at(text, "a.b.1.x") == [4]
    assert at(text, "a.b.1.missing") == [4]
    assert at(text, "a.missing") == [1]
    assert at(text, "elsewhere") == [0]
    assert at("a: [", "manifest.yaml", "line 7, column 5: not YAML") == [7]


def test_batches_have_their_plots_and_schedules_their_firings(house: House) -> None:
    browser = Browser(house)
    nightly = bundle("nightly", schedule="0 2 * * *", timeZone="Europe/Zurich")
    for kind, asked in (("batch", bundle()), ("schedule", nightly)):
        assert browser.post("/submit", {"kind": kind, "manifest": yaml.safe_dump(asked)}).status_code == 303
    (batch,) = house.get("/v1/batches").json()["batches"]
    assert batch["id"] in browser.get("/batches").text
    page = browser.get(f"/batches/{batch['id']}").text
    assert "tiny-calibration-seed-2" in page
    assert "Perplexity against bits per weight" in page or "No job has measured it." in page
    first = '<time datetime="2026-01-01T01:00:00+00:00">2026-01-01 02:00:00 CET</time>'
    assert first in browser.get("/schedules").text


def test_an_artifact_has_the_commands_that_pull_and_serve_it(house: House, tmp_path: Path) -> None:
    id = house.submit()["id"]
    lease = take(house.jobs, id, "driver")
    assert lease is not None
    assert lease.end(Ended(cause=Cause.DONE, exit_code=0, artifact=f"{tmp_path.as_uri()}/tiny/0123456789abcdef"))
    page = Browser(house).get(f"/jobs/{id}").text
    assert f"counterweight pull {tmp_path.as_uri()}/tiny/0123456789abcdef tiny\n" in page
    assert "counterweight pull http://service/v1/artifacts/tiny/0123456789abcdef tiny\n" in page
    assert "vllm serve tiny\n" in page


def test_pages_run_no_scripts_load_nothing_and_are_labelled(house: House) -> None:
    browser = Browser(house)
    id = house.submit("failed")["id"]
    end(house, id, "<b>bits</b> & more")
    batch = house.post("/v1/batches", bundle()).json()["id"]
    paths = ["/", f"/jobs/{id}", "/batches", f"/batches/{batch}", "/schedules", "/submit", "/sign-in", "/nothing"]
    for path in paths:
        answer = browser.get(path)
        assert "default-src 'none'; style-src 'self'" in answer.headers["content-security-policy"]
        page = Page(answer)
        names = [name for name, _ in page.tags]
        assert not {"script", "style", "iframe", "img", "object"} & set(names), path
        assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on") or key == "style"]
        assert [link["href"] for link in page.all("link")] == ["data:,", "/style.css"]
        assert (names.count("main"), names.count("h1"), page.all("html")[0]["lang"]) == (1, 1, "en")
        labelled = {label["for"] for label in page.all("label")}
        for name in ("input", "select", "textarea", "progress"):
            assert all(one.get("type") == "hidden" or one["id"] in labelled for one in page.all(name)), path
        assert "<b>bits</b>" not in answer.text
    assert "prefers-color-scheme: dark" in browser.get("/style.css").text


def test_a_store_that_is_away_is_told(monkeypatch: pytest.MonkeyPatch, house: House) -> None:
    from counterweight.workers.errors import StorageError

    def away(prefix: str = "") -> None:
        raise StorageError("list: 503 SlowDown at s3://secret-bucket")

    browser = Browser(house)
    monkeypatch.setattr(house.store, "list", away)
    page, api = browser.get("/"), house.get("/v1/jobs")
    assert (page.status_code, api.status_code) == (503, 503)
    assert api.headers["retry-after"] == "5"
    assert "secret-bucket" not in page.text + api.text
