"""Which suites cover which registered plugin; a plugin without a suite fails the tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sma.plugins import registry


def covers(kind: str, namespace: Mapping[str, Any]) -> Callable[[], None]:
    """A test that the suites in ``namespace`` cover every registered plugin of ``kind`` of any provider."""

    def test_every_plugin_has_a_suite() -> None:
        suites = [value for name, value in namespace.items() if name.startswith("Test")]
        assert suites
        covered = {type(suite.config).owner for suite in suites if hasattr(suite, "config")}
        covered |= {target for suite in suites for target in getattr(suite, "covers", ())}
        assert not registry().failures(), "a plugin that fails to load would go untested"
        missing = [
            f"{entry.name} ({entry.provider})"
            for entry in registry().entries()
            if entry.kind == kind and entry.target not in covered
        ]
        assert not missing, f"no suite in tests/laws covers {kind} {', '.join(missing)}"

    return test_every_plugin_has_a_suite
