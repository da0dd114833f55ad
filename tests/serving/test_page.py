"""The page in a real browser: what it shows is what the model did, while it does it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sma_models.language_model import LanguageModel
from sma_models.serving.limits import Limits
from tests.browser import browser  # noqa: F401  # a fixture, used by its name
from tests.inference.engines import continued, tokens_of, until
from tests.serving.conftest import Running, running

pytestmark = pytest.mark.browser

LIMITS = Limits(slots=2, queue=4, prefill_chunk=16, max_tokens=5000)
PROMPT = "é日 a\n<b>\t&"
KEY = "sk-9"


@pytest.fixture(scope="module")
def open_server(model: LanguageModel) -> Iterator[Running]:
    with running(model, LIMITS) as one:
        yield one


@pytest.fixture
def page(browser: Any, open_server: Running) -> Iterator[Any]:  # noqa: F811
    """The page, from which nothing went wrong and nothing was asked of anyone else when it is closed."""
    page = browser.new_page(color_scheme="light")
    trouble: list[str] = []
    for event in ("pageerror", "dialog"):
        page.on(event, lambda what, event=event: trouble.append(f"{event}: {what}"))
    # Chromium writes a line about every answer that is an error.
    page.on("console", lambda line: "the server responded with" in line.text or trouble.append(f"console: {line.text}"))
    page.on("request", lambda request: request.url.startswith(open_server.url) or trouble.append(request.url))
    page.goto(open_server.url)
    page.wait_for_selector("#layer1", state="attached")
    page.set_default_timeout(15_000)
    yield page
    page.close()
    assert trouble == []


def write(page: Any, prompt: str, max_tokens: int, temperature: float = 0.0) -> None:
    page.fill("#prompt", prompt)
    page.fill("#max_tokens", str(max_tokens))
    page.fill("#temperature", str(temperature))
    page.click("#write")


def done(page: Any) -> str:
    """What the page says in the end."""
    page.wait_for_selector("#write:enabled")
    return str(page.inner_text("#status"))


def shares(page: Any) -> list[bool]:
    return list(page.eval_on_selector_all("#text > span", "spans => spans.map(span => span.classList.contains('lit'))"))


def bars(page: Any) -> list[int]:
    script = "spans => spans.map(span => (span.style.backgroundImage.match(/linear-gradient/g) ?? []).length)"
    return list(page.eval_on_selector_all("#text > span", script))


def test_what_it_shows_is_what_the_model_did(page: Any, model: LanguageModel) -> None:
    write(page, PROMPT, 20)
    assert done(page) == "20 bytes, ended by length"
    data = PROMPT.encode() + continued(model, PROMPT.encode(), 20)
    with torch.no_grad():
        routings = list(model(tokens_of(data)).routings.values())
    active = [routing.active[0, :, 0].tolist() for routing in routings]
    assert bars(page) == [sum(each) for each in zip(*active, strict=True)]
    assert len(set(bars(page))) > 1
    for layer, expected in enumerate(active):
        page.get_by_role("radio", name=f"layer {layer}").click()
        assert shares(page) == expected
        rate = page.inner_text(f".choice:has(#layer{layer}) small")
        assert rate == f"{int(100 * sum(expected) / len(expected) + 0.5)} %"
    page.get_by_role("radio", name="no layer").click()
    assert not any(shares(page))
    spans = page.eval_on_selector_all("#text > span", "spans => spans.map(span => span.textContent)")
    assert spans[:13] == ["é", "·", "日", "·", "·", " ", "a", "↵\n", "<", "b", ">", "→\t", "&"]
    assert len(spans) == len(data)
    assert "…" not in spans
    prompts = page.eval_on_selector_all("#text > .prompt", "spans => spans.length")
    assert prompts == len(PROMPT.encode())


def test_single_bytes_can_be_read(page: Any, model: LanguageModel) -> None:
    write(page, "abc", 3)
    done(page)
    with torch.no_grad():
        routings = list(model(tokens_of(b"abc")).routings.values())
    page.hover("#text > span:nth-child(2)")
    assert page.inner_text("#where").startswith("byte 1: 0x62, active in ")
    said = page.inner_text("#layers li:first-child")
    assert said == (
        f"layer 0: {'active' if routings[0].active[0, 1, 0] else 'inactive'}, "
        f"confidence {float(routings[0].confidence[0, 1, 0]):.2f}"
    )
    page.focus("#text")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#where").startswith("byte 2: 0x63")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#where").startswith("byte 0: 0x61")


def test_text_appears_while_it_is_written_and_stop_frees_the_slot(page: Any, open_server: Running) -> None:
    write(page, "a", 5000, temperature=1.0)
    page.wait_for_selector("#text > span:nth-child(21)")
    assert open_server.service.engine.running == 1
    page.click("#stop")
    assert done(page).startswith("stopped after ")
    assert open_server.idle()
    write(page, "b", 2)  # and it goes on
    assert done(page) == "2 bytes, ended by length"


def test_errors_are_told(page: Any) -> None:
    page.evaluate("document.getElementById('form').noValidate = true")
    write(page, "", 2)
    assert "prompt: must hold at least one token" in done(page)
    assert page.get_attribute("#status", "class") == "trouble"


def test_a_key(browser: Any, model: LanguageModel) -> None:  # noqa: F811
    with running(model, LIMITS, KEY) as own:
        page = browser.new_page(color_scheme="dark")
        page.goto(own.url)
        page.wait_for_selector("#model:has-text('A key may be given below')")
        write(page, "a", 2)
        assert "the key of this server" in done(page)
        page.fill("#key", KEY)
        page.click("#write")
        assert done(page) == "2 bytes, ended by length"
        assert page.inner_text("#model").startswith("tiny: 2 layers decide")
        assert KEY not in page.url
        page.close()
    assert until(lambda: not own.service.engine.alive)
