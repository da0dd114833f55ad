"""Plugins: found by their entry points, loaded late, and each on its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sma
from sma.errors import PluginError, SpecError
from sma.plugins import Provider, Registry, isolated_registry, load_plugins
from sma.plugins import manager as plugin_manager
from sma.plugins.registrations import make_entry
from tests.core import spec_parts as parts

MODULE = """
from dataclasses import dataclass
import sma

class {cls}(sma.Module):
    @dataclass(kw_only=True, frozen=True)
    class Config(sma.Module.Config):
        size: int = 3
"""
HOOK = (
    MODULE
    + """
@sma.hookimpl
def sma_register(register):
    register("{name}", {cls})
"""
)
Install = Callable[..., None]


def source(name: str, cls: str = "Mine", template: str = HOOK) -> str:
    """A plugin module that registers one class."""
    return template.format(name=name, cls=cls)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a distribution with one plugin module, as files on the path: what pip leaves behind."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(module: str, text: str, *, points: dict[str, str] | None = None, version: str = "1.2") -> None:
        (tmp_path / f"{module}.py").write_text(text)
        info = tmp_path / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: {version}\n")
        lines = [f"{name} = {value}" for name, value in (points or {module: module}).items()]
        (info / "entry_points.txt").write_text("[sma.plugins]\n" + "\n".join(lines) + "\n")

    yield run
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def failure(registry: Registry, module: str) -> str:
    """The message of the one failure of a module."""
    (found,) = [each for each in registry.failures() if each.provider.module == module]
    return found.message


# finding


def test_an_installed_plugin_is_used(install: Install) -> None:
    install("acme_gau", source("acme", "AcmeGau"))
    registry = load_plugins()
    entry = registry.entry("module", "acme")
    assert entry.target.__name__ == "AcmeGau"
    assert entry.provider == Provider("acme_gau", "acme_gau", "acme-gau", "1.2")
    assert str(entry.provider) == "acme-gau 1.2 (acme_gau)"
    with isolated_registry(registry):
        built = sma.build({"type": "acme", "size": 5}, d_model=2)
        assert built.config.size == 5  # type: ignore[union-attr, attr-defined]
        assert sma.dump_spec(built.config) == {"type": "acme", "size": 5}  # type: ignore[arg-type]


def test_the_configurators_come_in_by_the_same_door() -> None:
    registry = load_plugins()
    entry = registry.entry("configurator", "tempered_softmax")
    assert entry.target is sma.configurators.TemperedSoftmax
    assert entry.provider.module == "sma.plugin"
    assert {"always", "sigmoid", "top_k"} <= set(registry.names("configurator"))


def test_two_points_of_one_module_load_it_once(install: Install) -> None:
    install("acme", source("acme"), points={"one": "acme", "two": "acme"})
    registry = load_plugins()
    assert registry.has("module", "acme")
    assert [str(each) for each in registry.failures() if each.provider.module == "acme"] == []


def test_a_spec_file_is_registered_by_its_path(install: Install, tmp_path: Path) -> None:
    head = "import pathlib, sma\n\n@sma.hookimpl\ndef sma_register(register):\n"
    install("acme", head + "    register('mine', pathlib.Path(__file__).with_name('m.yaml'))\n")
    with isolated_registry(load_plugins()) as registry:
        assert registry.names("spec").count("mine") == 1
        with pytest.raises(SpecError, match=r"m.yaml: cannot be read"):
            sma.load_spec("mine")
        (tmp_path / "m.yaml").write_text("type: sigmoid\nthreshold: 0.25\n")
        assert sma.dump_spec(sma.load_spec("mine"))["threshold"] == 0.25


# failing


BROKEN = {
    "import": ("import acme_nowhere\n", "ModuleNotFoundError: No module named 'acme_nowhere'"),
    "syntax": ("def broken(:\n", "SyntaxError: invalid syntax"),
    "exit": ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
    "hook raises": (
        source("acme") + "    raise KeyError('oh')\n",
        "KeyError: 'oh'",
    ),
    "misspelt hook": (
        source("acme").replace("sma_register", "sma_registre"),
        "there is no hook 'sma_registre'; did you mean 'sma_register'? (hooks: sma_register)",
    ),
    "misspelt second hook": (
        source("acme") + "\n@sma.hookimpl\ndef sma_registers(register):\n    pass\n",
        "there is no hook 'sma_registers'; did you mean 'sma_register'?",
    ),
    "unmarked hook": (
        source("acme").replace("@sma.hookimpl", ""),
        "it implements no hook: broken needs '@sma.hookimpl def sma_register(register)'",
    ),
    "wrong argument": (source("acme").replace("register)", "registrar)"), "a hook does not fit its specification: "),
    "no plugin class": (
        source("acme") + "    register('number', int)\n",
        "'number': <class 'int'>: a plugin class derives from one of block, configurator, ",
    ),
    "an instance": (source("acme") + "    register('number', 3)\n", "'number': 3: a plugin class derives from one of"),
    "abstract": (
        source("acme") + "    register('module', sma.Module)\n",
        "'module': Module is the abstract base of its kind",
    ),
    "bad name": (source("acme") + "    register('a.b', Mine)\n", "'a.b': a name is a letter followed by letters"),
    "not a dataclass": (
        source("acme").replace("    @dataclass(kw_only=True, frozen=True)\n", ""),
        "'acme': Mine.Config lacks @dataclass(kw_only=True, frozen=True)",
    ),
    "reserved key": (
        source("acme").replace("size: int", "type: int"),
        "'acme': Mine.Config: the key 'type' is reserved",
    ),
    "twice": (
        source("acme") + "    register('acme', Mine)\n",
        "the module 'acme' is registered twice: by broken 1.2 (broken) and by broken 1.2 (broken)",
    ),
    "an object": (source("acme"), "ModuleNotFoundError"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_left_out_whole_and_alone(case: str, install: Install) -> None:
    text, message = BROKEN[case]
    install("aardvark", source("first", "First"))
    install("broken", text, points={"broken": "broken:sma_register" if case == "an object" else "broken"})
    install("zebra", source("last", "Last"))
    registry = load_plugins()
    assert registry.has("module", "first")
    assert registry.has("module", "last")
    assert registry.has("configurator", "sigmoid")
    assert not registry.has("module", "acme"), "what it registered before it failed is taken back"
    assert message in failure(registry, "broken:sma_register" if case == "an object" else "broken")


@pytest.mark.parametrize("case", ["import", "misspelt hook", "twice"])
def test_strict_raises(case: str, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    text, message = BROKEN[case]
    monkeypatch.setattr(plugin_manager, "BUILT_IN", {"sma": "sma.plugin"})
    install("broken", text)
    monkeypatch.setenv("SMA_STRICT_PLUGINS", "0")
    assert message in failure(load_plugins(), "broken")
    sys.modules.pop("broken", None)
    monkeypatch.setenv("SMA_STRICT_PLUGINS", "1")
    with pytest.raises(PluginError) as caught:
        load_plugins()
    assert str(caught.value).startswith("broken 1.2 (broken): ")
    assert message in str(caught.value)


def test_a_duplicate_names_both_providers_and_the_first_stays(install: Install) -> None:
    install("aardvark", source("same", "First"))
    install("zebra", source("same", "Last") + "    register('other', Last)\n", version="2.0")
    registry = load_plugins()
    assert registry.get("module", "same").__name__ == "First"
    assert not registry.has("module", "other")
    assert failure(registry, "zebra") == (
        "the module 'same' is registered twice: by aardvark 1.2 (aardvark) and by zebra 2.0 (zebra)"
    )


def test_nobody_takes_a_name_of_ours(install: Install) -> None:
    install("aardvark", source("sigmoid", "Sigmoid", HOOK.replace("sma.Module", "sma.Configurator")))
    registry = load_plugins()
    assert registry.get("configurator", "sigmoid") is sma.configurators.Sigmoid
    assert "the configurator 'sigmoid' is registered twice: by " in failure(registry, "aardvark")


@pytest.mark.parametrize("name", ["zebra", "zebra-dist", "zebra_point"])
def test_blocked(name: str, install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install("zebra", source("striped"), points={"zebra_point": "zebra"})
    metadata = tmp_path / "zebra-1.2.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("Name: zebra", "Name: zebra-dist"))
    assert load_plugins().has("module", "striped")
    monkeypatch.setenv("SMA_BLOCK_PLUGINS", f" other, {name} ")
    registry = load_plugins()
    assert not registry.has("module", "striped")
    assert [each for each in registry.failures() if each.provider.module == "zebra"] == []


def test_a_plugin_that_uses_the_registry_while_loading_fails_alone(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("eager", source("eager") + "\nsma.register('early', Mine)\n")
    monkeypatch.setattr(plugin_manager._Process, "registry", None)
    registry = sma.plugins.registry()
    assert "the registry was used while plugins are loading" in failure(registry, "eager")
    assert registry.has("configurator", "sigmoid")
    assert sma.plugins.registry() is registry


def test_a_missing_name_points_at_failed_plugins(install: Install) -> None:
    install("broken", "import acme_nowhere\n")
    with isolated_registry(load_plugins()), pytest.raises(SpecError) as caught:
        sma.load_spec({"type": "acme_gau"})
    assert "nothing is registered as 'acme_gau'" in str(caught.value)
    assert "plugins that failed to load: " in str(caught.value)
    assert "broken 1.2 (broken): ModuleNotFoundError: No module named 'acme_nowhere'" in str(caught.value)


# registering by hand


def test_register_from_ones_own_code() -> None:
    with isolated_registry(Registry()) as registry:
        sma.register("mine", parts.Gau)
        sma.register("mine", parts.Gau)
        assert registry.names("module") == ["mine"]
        assert registry.name_of(parts.Gau) == "mine"
        assert registry.entry("module", "mine").provider.module == "tests.core.spec_parts"
        with pytest.raises(
            PluginError, match=r"the module 'mine' is registered twice: by tests.core.spec_parts and by"
        ):
            sma.register("mine", parts.Ffn)
        assert registry.get("module", "mine") is parts.Gau
        sma.register("mine", parts.Ema)
        assert registry.kinds_of("mine") == ["mixer", "module"], "names are per kind"


def test_commit_is_all_or_nothing() -> None:
    registry = parts.filled()
    before = registry.entries()
    provider = Provider("x", "x")
    entries = [make_entry("fresh", parts.Gau, provider), make_entry("gau", parts.Ffn, provider)]
    with pytest.raises(PluginError, match="'gau' is registered twice"):
        registry.commit(entries)
    assert registry.entries() == before


def test_get_explains() -> None:
    registry = parts.filled()
    assert registry.get("module", "gau") is parts.Gau
    with pytest.raises(
        PluginError, match=r"^no module named 'gao'; did you mean 'gau'\? \(known: ffn, gau, wide_gau\)$"
    ):
        registry.get("module", "gao")
    with pytest.raises(PluginError, match=r"^'ema' is a mixer, not a module$"):
        registry.get("module", "ema")
    assert [(each.kind, each.name) for each in registry.entries()] == sorted(
        (cls.kind, name) for name, cls in parts.CLASSES.items()
    )


def test_isolation_leaves_no_trace() -> None:
    outer = sma.plugins.registry()
    with isolated_registry() as inner:
        sma.register("only_here", parts.Gau)
        assert inner.has("module", "only_here")
        assert inner.has("configurator", "sigmoid")
    assert sma.plugins.registry() is outer
    assert not outer.has("module", "only_here")
    with pytest.raises(RuntimeError, match="inside"), isolated_registry(Registry()):
        raise RuntimeError("inside")
    assert sma.plugins.registry() is outer


def test_threads_get_one_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_manager._Process, "registry", None)
    found: list[Registry] = []
    threads = [threading.Thread(target=lambda: found.append(sma.plugins.registry())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(each is found[0] for each in found)


# the cost of an import


def test_import_loads_no_plugin(tmp_path: Path) -> None:
    (tmp_path / "spy.py").write_text("raise SystemExit('the plugin was imported')\n")
    info = tmp_path / "spy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: spy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sma.plugins]\nspy = spy\n")
    script = """
        import sys
        import sma
        costly = {"sma_modules", "sma_models", "sma.plugin", "spy", "omegaconf", "lightning", "triton.language"}
        loaded = sorted(costly.intersection(sys.modules))
        assert loaded == [], loaded
        from sma.plugins.manager import _Process
        assert _Process.registry is None
        failures = [str(each) for each in sma.plugins.registry().failures()]
        assert "spy 1.0 (spy): SystemExit: the plugin was imported" in failures, failures
        assert "sma.plugin" in sys.modules
        print("fine")
    """
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fine\n"


def test_a_source_tree_without_one_of_our_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        plugin_manager, "BUILT_IN", {"sma": "sma.plugin", "gone": "sma_gone.plugin", "half": "sma.no_plugin"}
    )
    registry = load_plugins()
    assert registry.has("configurator", "sigmoid")
    ours = {each.provider.module: each.message for each in registry.failures()}
    assert "sma_gone.plugin" not in ours
    assert ours["sma.no_plugin"] == "ModuleNotFoundError: No module named 'sma.no_plugin'"
