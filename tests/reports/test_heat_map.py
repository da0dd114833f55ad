"""The text heat map: structure of the page for any bytes, and its behaviour in a browser where there is one."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sma.errors import DataError, RoutingError
from sma.routing import Routing
from sma_models.reports import text_heat_map
from sma_models.reports.heat_map import level
from tests.browser import browser  # noqa: F401  # a fixture, used by its name
from tests.reports.conftest import MakeRoutings

NASTY = b"<b>&amp;\"'</pre></script><script>alert(1)</script>\n\t\x00\x1b\xff\xe2\x80\xae" + "é日".encode()


class Page(HTMLParser):
    """What the tests look for in the page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.spans: list[tuple[str, str]] = []
        self.content: dict[str, str] = {}
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)
        if self.open[-2:] == ["pre", "span"]:
            self.spans.append((dict(attrs)["class"] or "", ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "elements must nest"

    def handle_data(self, data: str) -> None:
        if self.open[-2:] == ["pre", "span"]:
            self.spans[-1] = (self.spans[-1][0], self.spans[-1][1] + data)
        elif self.open:
            key = self.open[-1] if self.tags[-1][0] != "script" else str(self.tags[-1][1].get("id", "script"))
            self.content[key] = self.content.get(key, "") + data


def page_of(data: bytes, routings: dict[str, Routing], folder: Path, **options: Any) -> Page:
    return Page(text_heat_map(data, routings, folder / "sub" / "page.html", **options).read_text(encoding="utf-8"))


def test_structure(tmp_path: Path, make_routings: MakeRoutings) -> None:
    routings = make_routings(len(NASTY), n_layers=4, padding=3)
    page = page_of(NASTY, routings, tmp_path, title="a <title> & more")
    assert page.open == []
    assert page.content["title"] == page.content["h1"] == "a <title> & more"
    assert len(page.spans) == len(NASTY)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert [tag for tag, _ in page.tags].count("pre") == 1
    radios = [attrs for tag, attrs in page.tags if tag == "input"]
    assert [(radio["type"], radio["name"], radio["value"]) for radio in radios] == [
        ("radio", "layer", str(n)) for n in range(-1, 4)
    ]
    assert {attrs["for"] for tag, attrs in page.tags if tag == "label"} == {radio["id"] for radio in radios}


def test_nothing_comes_from_elsewhere(tmp_path: Path, make_routings: MakeRoutings) -> None:
    path = text_heat_map(NASTY, make_routings(len(NASTY)), tmp_path / "page.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert not {"src", "href", "srcset", "action", "onclick"} & {name for _, attrs in page.tags for name in attrs}
    assert not {"link", "iframe", "img", "base", "object"} & {tag for tag, _ in page.tags}
    assert "url(" not in page.content["style"]
    assert "@import" not in page.content["style"]
    assert re.search(r"https?://", path.read_text(encoding="utf-8")) is None
    policy = next(attrs for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none'")


def test_dark_mode_and_keyboard(tmp_path: Path, make_routings: MakeRoutings) -> None:
    page = page_of(b"abc", make_routings(3), tmp_path)
    assert "prefers-color-scheme: dark" in page.content["style"]
    assert "focus-visible" in page.content["style"]
    assert next(attrs for tag, attrs in page.tags if tag == "pre")["tabindex"] == "0"


def test_colours_and_numbers_are_those_of_the_routing(tmp_path: Path, make_routings: MakeRoutings) -> None:
    data = b"hello\tworld\n"
    routings = make_routings(len(data), n_layers=5, padding=2)
    page = page_of(data, routings, tmp_path)
    content = json.loads(page.content["data"])
    assert content["hex"] == data.hex()
    assert [layer["label"] for layer in content["layers"]] == [f"layer {i}" for i in range(5)]
    for layer, routing in zip(content["layers"], routings.values(), strict=True):
        assert [c == "1" for c in layer["active"]] == routing.active[0, 2:, 0].tolist()
        assert layer["confidence"] == pytest.approx(routing.confidence[0, 2:, 0].tolist(), abs=0.0051)
    count = torch.stack([routing.active[0, 2:, 0] for routing in routings.values()]).sum(0).tolist()
    assert [text_class.split()[-1] for text_class, _ in page.spans] == [f"h{math.ceil(10 * n / 5)}" for n in count]
    assert [text for _, text in page.spans] == [*"hello", "→\t", *"world", "↵\n"]


def test_level_is_zero_only_for_nothing() -> None:
    assert [level(share) for share in (0, 0.001, 0.5, 1)] == [0, 1, 5, 10]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=1, max_size=60), title=st.text(max_size=20))
def test_any_bytes_and_any_title(data: bytes, title: str, tmp_path: Path, make_routings: MakeRoutings) -> None:
    page = page_of(data, make_routings(len(data)), tmp_path, title=title)
    assert page.open == []
    assert len(page.spans) == len(data)
    assert all(text for _, text in page.spans)
    assert json.loads(page.content["data"])["hex"] == data.hex()


def test_confidence_without_a_number_is_left_out(tmp_path: Path) -> None:
    shape = torch.ones(1, 3, 1)
    confidence = torch.tensor([0.25, float("nan"), float("inf")]).view(1, 3, 1).bfloat16()
    routing = Routing(shape.bool(), confidence, shape[..., 0].bool(), torch.arange(3)[None])
    page = page_of(b"abc", {"only": routing}, tmp_path)
    assert json.loads(page.content["data"])["layers"][0]["confidence"] == [0.25, None, None]


def test_refuses_what_does_not_fit(tmp_path: Path, make_routings: MakeRoutings) -> None:
    with pytest.raises(DataError, match="at least one byte"):
        text_heat_map(b"", make_routings(0), tmp_path / "page.html")
    with pytest.raises(RoutingError, match="4 real tokens, the text has 3 bytes"):
        text_heat_map(b"abc", make_routings(4), tmp_path / "page.html")
    with pytest.raises(RoutingError, match="at least one layer"):
        text_heat_map(b"abc", {}, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def backgrounds(page: Any) -> list[str]:
    script = "spans => spans.map(span => getComputedStyle(span).backgroundColor)"
    return list(page.eval_on_selector_all("#text > span", script))


@pytest.mark.browser
def test_in_a_browser(browser: Any, tmp_path: Path, make_routings: MakeRoutings) -> None:  # noqa: F811
    routings = make_routings(len(NASTY), n_layers=3)
    path = text_heat_map(NASTY, routings, tmp_path / "page.html")
    trouble: list[str] = []
    page = browser.new_page(color_scheme="light")
    for event in ("pageerror", "dialog", "console", "request"):
        page.on(event, lambda what, event=event: trouble.append(f"{event}: {what}"))
    page.goto(path.as_uri())
    assert len(trouble) == 1, trouble  # the page itself was requested, and nothing else happened
    together = backgrounds(page)

    page.get_by_role("radio", name="layer 1").click(timeout=5000)
    single = backgrounds(page)
    assert single != together
    assert [colour != "rgba(0, 0, 0, 0)" for colour in single] == routings["layers.1.activate"].active[0, :, 0].tolist()
    page.keyboard.press("ArrowRight")
    other = backgrounds(page)
    assert [colour != "rgba(0, 0, 0, 0)" for colour in other] == routings["layers.2.activate"].active[0, :, 0].tolist()
    page.get_by_role("radio", name="All layers").click(timeout=5000)
    assert backgrounds(page) == together

    page.hover("#text > span:nth-child(3)")
    confidence = float(routings["layers.0.activate"].confidence[0, 2, 0])
    assert "byte 2 " in page.inner_text("#where")
    assert "0x3e" in page.inner_text("#where")
    assert f"confidence {confidence:.2f}" in page.inner_text("#layers li:first-child")
    page.focus("#text")
    page.keyboard.press("ArrowRight")
    assert "byte 3 " in page.inner_text("#where")

    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != paper
    assert len(trouble) == 1, trouble
    page.close()
