"""Bad specs: each gives one SpecError that names the place, the rule and the value, and none hangs or grows."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import sma
from sma.errors import PluginError, SpecError
from sma.plugins import Registry, isolated_registry
from sma.spec import load, loads, to_yaml
from tests.core import spec_parts as parts


@pytest.fixture(autouse=True)
def registry() -> Iterator[Registry]:
    """Only the parts of the tests are registered."""
    with isolated_registry(parts.filled()) as registry:
        yield registry


def layer(**keys: Any) -> dict[str, Any]:
    """A net of one layer."""
    return {"type": "net", "layers": [keys]}


TYPED = [
    (
        layer(activate={"module": {"type": "gau", "widow": 3}}),
        "layers[0].activate.module (gau): unknown key 'widow'; did you mean 'window'?",
    ),
    (
        layer(activate={"module": {"type": "gau", "zzz": 3}}),
        "(gau): unknown key 'zzz' (known: d_qk, window, activation, norm)",
    ),
    (
        layer(activate={"module": {"type": "gau", "d_qk": "abc"}}),
        "layers[0].activate.module.d_qk: expected int, got 'abc' (str)",
    ),
    (
        layer(activate={"module": {"type": "gau", "d_qk": True}}),
        "layers[0].activate.module.d_qk: expected int, got True (bool)",
    ),
    (
        layer(activate={"module": {"type": "gau", "d_qk": 3.0}}),
        "layers[0].activate.module.d_qk: expected int, got 3.0 (float)",
    ),
    (
        layer(activate={"module": {"type": "gau", "d_qk": None}}),
        "layers[0].activate.module.d_qk: expected int, got null",
    ),
    (
        layer(activate={"module": {"type": "gau", "d_qk": [1]}}),
        "layers[0].activate.module.d_qk: expected int, got [1] (list)",
    ),
    (
        layer(activate={"module": {"type": "gau", "activation": "softmix"}}),
        "module.activation: expected one of 'softmax', 'relu2', got 'softmix' (str); did you mean 'softmax'?",
    ),
    (layer(activate={"module": {"type": "ffn"}}), "layers[0].activate.module (ffn): missing keys 'd_hidden', 'bias'"),
    (layer(activate={}), "layers[0].activate: missing key 'module'"),
    (
        layer(activate={"module": {"d_qk": 3}}),
        "layers[0].activate.module: missing key 'type', the name of a module (known: ffn, gau, wide_gau)",
    ),
    (
        layer(activate={"module": {"type": 3}}),
        "layers[0].activate.module.type: expected the name of a module, got 3 (int)",
    ),
    (layer(activate={"module": None}), "layers[0].activate.module: expected a module, got null"),
    (layer(activate={"module": ["gau"]}), "layers[0].activate.module: expected a module, got ['gau'] (list)"),
    (layer(activate="gau"), "layers[0].activate: expected Activate or null, got 'gau' (str)"),
    (layer(mixer="gau"), "layers[0].mixer: 'gau' is a module, not a mixer"),
    (layer(mixer={"type": "gau"}), "layers[0].mixer: 'gau' is a module, not a mixer"),
    (layer(mixer="emma"), "layers[0].mixer: no mixer named 'emma'; did you mean 'ema'? (known: ema)"),
    (layer(either="layernorm"), "layers[0].either: 'layernorm' is a norm, not a mixer or a module"),
    (layer(either="nothing"), "layers[0].either: no mixer or module named 'nothing' (known: ema, ffn, gau, wide_gau)"),
    (layer(either=3), "layers[0].either: expected a mixer or a module or null, got 3 (int)"),
    (layer(either={"type": "gau", "windo": 1}), "layers[0].either (gau): unknown key 'windo'; did you mean 'window'?"),
    (
        layer(activate={"module": "gau", "configurator": {"type": "gate", "rate": 2}}),
        "layers[0].activate.configurator (gate): rate: must lie in [0, 1], got 2.0",
    ),
    (
        layer(activate={"module": "gau", "configurator": {"rate": 2}}),
        "layers[0].activate.configurator (gate): rate: must lie in [0, 1], got 2.0",
    ),
    (
        layer(activate={"module": "gau", "only_gau": "ffn"}),
        "only_gau: expected a module of class Gau, got 'ffn' of class Ffn",
    ),
    ({"type": "net", "layers": {}}, "layers: expected a list of Layer, got {} (dict)"),
    ({"type": "net", "layers": "ema"}, "layers: expected a list of Layer, got 'ema' (str)"),
    ({"type": "net", "layers": ["ema"]}, "layers[0]: expected a mapping, got 'ema' (str)"),
    ({"type": "net", "steps": [1, "2"]}, "steps[1]: expected int, got '2' (str)"),
    ({"type": "net", "pair": [1]}, "pair: expected 2 items (a list of int, str), got 1"),
    ({"type": "net", "table": [1]}, "table: expected a mapping to float, got [1] (list)"),
    ({"type": "net", "table": {"a": "b"}}, "table.a: expected float, got 'b' (str)"),
    ({"type": "net", "lr": float("nan")}, "lr: expected a finite number, got nan"),
    ({"type": "net", "lr": float("inf")}, "lr: expected a finite number, got inf"),
    ({"type": "net", "several": [1.0, float("inf")]}, "several[1]: expected a finite number, got inf"),
    ({"type": "net", "lr": True}, "lr: expected float, got True (bool)"),
    ({"type": "net", "flag": 1}, "flag: expected bool, got 1 (int)"),
    ({"type": "net", "name": 1}, "name: expected str, got 1 (int)"),
    ({"type": "net", "pool": True}, "pool: expected one of 'mean', 'first', 3, got True (bool)"),
    ({"type": "net", "colour": "green"}, "colour: expected one of 'red', 'blue', got 'green' (str)"),
    ({"type": "net", "size": "big"}, "size: expected int or float or null, got 'big' (str)"),
    ({"type": "strict"}, "spec (strict): missing keys 'first', 'second', 'third'"),
    ({"type": "nets"}, "spec: nothing is registered as 'nets'; did you mean 'net'?"),
    ({"type": "collections.OrderedDict"}, "spec: nothing is registered as 'collections.OrderedDict'"),
    ({"d_model": 3}, "spec: missing key 'type', the name of a model (known: net, strict, wrapper)"),
    ({"type": None}, "spec: missing key 'type'"),
    ({"type": "net", "_target_": "os.system"}, "spec (net): unknown key '_target_'"),
    ({"type": "net", "table": {1: 2.0}}, "table: a key is a string, got 1 (int)"),
    (
        3,
        "a spec is a registered name, a path of a .yaml file, a mapping, an OmegaConf node or a configuration, "
        "got 3 (int)",
    ),
    ("nott", "no spec named 'nott' (known: none)"),
    ("folder/net", "no spec named 'folder/net' (known: none); a file ends in .yaml or .yml"),
    ("nosuch.yaml", "nosuch.yaml: cannot be read: No such file or directory"),
    ("nul\0.yaml", "cannot be read"),
]


@pytest.mark.parametrize(("source", "message"), TYPED, ids=[message[:60].replace("\0", "") for _, message in TYPED])
def test_bad_values(source: Any, message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)):
        load(source)


def bomb(width: int, depth: int) -> str:
    """YAML whose aliases write out to ``width ** depth`` values."""
    lines = ["type: net", f"a0: &a0 [{', '.join(['x'] * width)}]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, depth)]
    return "\n".join(lines)


TEXT = [
    ("", "text: a spec is a mapping, got nothing"),
    ("- 1\n- 2", "text: a spec is a mapping, got [1, 2] (list)"),
    ("type: net\nlr: [1", "text, line 2, column 7: not valid YAML"),
    ("type: net\n\tlr: 1", "text, line 2, column 1: not valid YAML: found character '\\t' that cannot start any token"),
    ("type: net\nlr: 1\n---\ntype: net", "text, line 3: a spec is one document, found a second"),
    ("type: net\nlr: 1\nlr: 2", "text, line 3: duplicate key 'lr'"),
    ("type: net\nlayers:\n- {mixer: ema, mixer: ema}", "text, line 3: duplicate key 'mixer'"),
    ("type: net\nlr: !!python/object/apply:os.system [ls]", "text, line 2: tags are not allowed"),
    ("type: net\n1: 2", "text, line 2: a key is a string, got 1 (int)"),
    ("type: net\n[a]: 2", "text, line 2: a key is a string, got ['a'] (list)"),
    ("type: net\nlr: *nowhere", "text, line 2: unknown alias '*nowhere'"),
    ("type: net\nsteps: &a [*a]", "text, line 2: the alias '*a' contains itself"),
    (f"type: net\nd_model: {'9' * 5000}", "text, line 2: an integer of 5000 digits is too long"),
    ("type: net\nname: a\x07b", "text: not valid YAML"),
    ("type: net\n<<: {lr: 1.0}", "spec (net): unknown key '<<'"),
    ("type: net\nsteps: " + "[" * 100 + "]" * 100, "text, line 2: nested more than 64 levels deep"),
    (bomb(9, 9), "more than 20000 values, aliases written out"),
    ("type: net\nsteps: [" + "1, " * 30_000 + "]", "text, line 2: more than 20000 values"),
    ("extends: other.yaml", "spec: extends 'other.yaml': a spec given as text may extend registered specs only"),
    ("type: net\nlayers: [{extends: /tmp/x.yml}]", "layers[0]: extends '/tmp/x.yml': a spec given as text may"),
    ("#" * 300_000, "text: a spec has at most 262144 bytes, got 300000"),
]


@pytest.mark.parametrize(("text", "message"), TEXT, ids=[message[:60] for _, message in TEXT])
def test_bad_text(text: str, message: str) -> None:
    started = time.process_time()
    with pytest.raises(SpecError, match=re.escape(message)):
        loads(text)
    assert time.process_time() - started < 5


def chain(length: int, text: str) -> dict[str, Any]:
    """``a0 -> a1 -> ...``, each made from the next by ``text`` with X for the reference."""
    tree: dict[str, Any] = {f"a{i}": text.replace("X", f"${{anything.a{i + 1}}}") for i in range(length)}
    return {"type": "net", "anything": {**tree, f"a{length}": "x" * 16}}


REFERENCES = [
    ({"name": "${name}"}, "name: references go in a circle: name -> name"),
    ({"name": "${anything}", "anything": "x${name}"}, "references go in a circle: name -> anything -> name"),
    ({"anything": {"a": "${anything}"}}, "references go in a circle: anything.a -> anything.a"),
    ({"name": "${nosuch}"}, "name: '${nosuch}' refers to nothing: there is no nosuch"),
    ({"name": "${steps[3]}", "steps": [1]}, "name: '${steps[3]}' refers to nothing: there is no steps[3]"),
    (
        {"name": "${anything.deep}", "anything": 3},
        "name: '${anything.deep}' refers to nothing: there is no anything.deep",
    ),
    ({"name": "${...x}"}, "name: '${...x}' leads out of the spec"),
    (
        {"name": "${oc.env:HOME}"},
        "name: resolvers are not allowed, a reference names another value of the spec (${a.b[0].c}), "
        "got '${oc.env:HOME}'",
    ),
    ({"name": "${oc.decode:'1'}"}, "name: resolvers are not allowed"),
    ({"name": "${a.${b}}"}, "name: only plain references such as ${a.b[0].c} are allowed, got '${a.${b}}'"),
    ({"name": "${unclosed"}, "name: only plain references"),
    ({"name": "${}"}, "name: a reference names another value"),
    ({"name": "x${steps}", "steps": [1]}, "name: ${steps} is list and cannot be part of a string"),
    ({"d_model": "${name}", "name": "x"}, "d_model: expected int, got 'x' (str)"),
]


@pytest.mark.parametrize(("keys", "message"), REFERENCES, ids=[message[:60] for _, message in REFERENCES])
def test_bad_references(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)):
        load({"type": "net", **keys})
    with pytest.raises(SpecError, match=re.escape(message)):
        load(
            OmegaConf.create({"type": "net", **keys})
            if "unclosed" not in str(keys) and "${}" not in str(keys)
            else {"type": "net", **keys}
        )


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (chain(40, "XX"), r"grows to more than"),
        (chain(100, "X"), r"more than 64 references lead to one another"),
        (
            {
                "type": "net",
                "anything": {"a0": ["x"] * 9} | {f"a{i}": [f"${{anything.a{i - 1}}}"] * 9 for i in range(1, 12)},
            },
            "the spec grows to more than 20000 values",
        ),
    ],
)
def test_reference_bombs(tree: dict[str, Any], message: str) -> None:
    started = time.process_time()
    with pytest.raises(SpecError, match=message):
        load(tree)
    assert time.process_time() - started < 5


def test_extends_bomb(tmp_path: Path) -> None:
    for i in range(12):
        items = ", ".join([f"{{extends: f{i + 1}.yaml}}"] * 9)
        (tmp_path / f"f{i}.yaml").write_text(f"anything: [{items}]\n")
    (tmp_path / "f12.yaml").write_text("anything: x\n")
    started = time.process_time()
    with pytest.raises(SpecError, match="the spec grows to more than 20000 values"):
        load(tmp_path / "f0.yaml")
    assert time.process_time() - started < 5


def test_mapping_that_contains_itself() -> None:
    tree: dict[str, Any] = {"type": "net"}
    tree["anything"] = tree
    with pytest.raises(SpecError, match="nested more than 64 levels deep"):
        load(tree)


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_bytes(b"type: net\nname: \xff\xfe")
    with pytest.raises(SpecError, match=r"s.yaml: a spec is UTF-8 text, byte 16 is not"):
        load(file)
    file.write_bytes(b"\xef\xbb\xbftype: net\nname: ok")
    assert load(file) == parts.Net.Config(name="ok")
    file.write_text("type: net\nlr: x")
    with pytest.raises(SpecError, match=r"^lr: expected float, got 'x' \(str\) \[in .*s.yaml\]$"):
        load(file)
    file.write_bytes(b"#" * 300_000)
    with pytest.raises(SpecError, match=r"s.yaml: a spec has at most 262144 bytes"):
        load(file)
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(SpecError, match="cannot be read: Is a directory"):
        load(tmp_path / "folder.yaml")


def test_any_value_error_of_a_strangers_post_init_gets_the_path(registry: Registry) -> None:
    class Fussy(sma.Norm):
        """Raises what it likes."""

        @dataclass(kw_only=True, frozen=True)
        class Config(sma.Norm.Config):
            size: int = 1

            def __post_init__(self) -> None:
                raise ValueError("I do not like this")

    registry.register("fussy", Fussy)
    with pytest.raises(SpecError, match=r"layers\[0\].norm \(fussy\): I do not like this") as caught:
        load(layer(norm="fussy"))
    assert isinstance(caught.value.__cause__, ValueError)


def test_annotation_that_cannot_be_resolved(registry: Registry) -> None:
    class Broken(sma.Norm):
        """Its annotation names nothing."""

        @dataclass(kw_only=True, frozen=True)
        class Config(sma.Norm.Config):
            size: Nowhere = 1  # type: ignore[name-defined]

    registry.register("broken", Broken)
    with pytest.raises(PluginError, match=r"Broken.Config: an annotation cannot be resolved: name 'Nowhere'"):
        load("broken")


PIECES = st.sampled_from(
    [
        "type: ",
        "net",
        "gau",
        "\n",
        "  ",
        "- ",
        "layers:",
        "steps: ",
        "[",
        "]",
        "{",
        "}",
        ",",
        ": ",
        "&a ",
        "*a",
        "!!int ",
        "'",
        '"',
        "#",
        "extends: ",
        "${",
        "name",
        ".",
        "..",
        "[0]",
        "\\",
        "null",
        "1e3",
        "0",
        "???",
        "\t",
        ">",
        "---",
        "%",
        "\x00",
        "\ud7ff",
        "é",
    ]
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(PIECES, max_size=14), override=st.lists(PIECES, max_size=5))
def test_whatever_comes_in_is_loaded_or_refused(pieces: list[str], override: list[str]) -> None:
    for text, overrides in (
        ("".join(pieces), ()),
        ("type: net", ("name=" + "".join(pieces), "".join(override) + "=1")),
    ):
        try:
            config = loads(text, *overrides)
        except SpecError:  # any other exception fails the test
            continue
        assert loads(to_yaml(config)) == config
