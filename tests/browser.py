"""A real browser for the tests of pages: Debian's Chromium (or another one on the PATH) through Playwright."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

ARGUMENTS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; a test is skipped where there is none, or fails where ``SMA_REQUIRE_BROWSER=1`` asks for it."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None or importlib.util.find_spec("playwright") is None:
        _without("the browser tests need chromium on the PATH and the package playwright")
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        except Error as error:
            _without(f"chromium does not start here: {error.message.splitlines()[0]}")
        yield started
        started.close()


def _without(reason: str) -> None:
    if os.environ.get("SMA_REQUIRE_BROWSER") == "1":
        pytest.fail(f"{reason}, and SMA_REQUIRE_BROWSER=1 asks for it", pytrace=False)
    pytest.skip(reason)
