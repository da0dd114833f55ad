"""Specs: what is accepted, what comes out, and that dumping and loading are inverse."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import sma
from sma.errors import ConfigError, SpecError
from sma.plugins import Registry, isolated_registry
from sma.spec import dump, load, load_as, loads, to_yaml
from tests.core import spec_parts as parts
from tests.core.spec_parts import Activate, Colour, Ema, Ffn, Gate, Gau, LayerNorm, Net, ScaleNorm, WideGau


@pytest.fixture(autouse=True)
def registry() -> Iterator[Registry]:
    """Only the parts of the tests are registered."""
    with isolated_registry(parts.filled()) as registry:
        yield registry


def net(**keys: Any) -> Any:
    """The configuration of a ``net`` with these keys."""
    return load({"type": "net", **keys})


def write(path: Path, text: str) -> Path:
    """A file with this text."""
    path.write_text(text, encoding="utf-8")
    return path


# sources


def test_the_same_spec_from_every_source(tmp_path: Path, registry: Registry) -> None:
    tree = {"type": "net", "d_model": 16, "layers": [{"mixer": {"type": "ema", "n_state": 4}}]}
    file = write(tmp_path / "small.yaml", "type: net\nd_model: 16\nlayers:\n  - mixer: {type: ema, n_state: 4}\n")
    registry.register("small", file)
    expected = Net.Config(d_model=16, layers=(parts.Layer(mixer=Ema.Config(n_state=4)),))
    for source in (tree, OmegaConf.create(tree), str(file), file, "small", expected):
        assert load(source) == expected
    assert loads(file.read_text()) == expected


def test_a_class_can_be_built_by_its_name() -> None:
    assert load("gau") == Gau.Config()
    built = sma.build("gau", "window=3", d_model=4)
    assert isinstance(built, Gau)
    assert (built.config.window, built.d_model) == (3, 4)


def test_build_a_model_takes_no_context() -> None:
    assert isinstance(sma.build({"type": "net"}), Net)
    with pytest.raises(
        ConfigError, match=r"net \(model\): got an unexpected keyword argument 'd_model'; .* 'n_layers=6'"
    ):
        sma.build({"type": "net"}, d_model=4)
    with pytest.raises(ConfigError, match=r"gau \(module\): missing a required .*'d_model'"):
        sma.build("gau")


def test_objects_within_a_mapping_are_taken_as_they_are() -> None:
    config = net(layers=[{"activate": {"module": Gau.Config(window=7)}}], colour=Colour.BLUE)
    assert config.layers[0].activate.module == Gau.Config(window=7)
    assert config.colour is Colour.BLUE


def test_omegaconf_missing_value_is_missing() -> None:
    node = OmegaConf.create({"type": "strict", "first": "???", "second": "x", "third": "layernorm"})
    with pytest.raises(SpecError, match=r"^spec \(strict\): missing key 'first'$"):
        load(node)


# types


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("d_model", 3, 3),
        ("lr", 3, 3.0),
        ("lr", 1e-3, 1e-3),
        ("limit", math.inf, math.inf),
        ("flag", True, True),
        ("name", "x", "x"),
        ("pool", "first", "first"),
        ("pool", 3, 3),
        ("colour", "blue", Colour.BLUE),
        ("size", None, None),
        ("size", 3, 3),
        ("size", 3.5, 3.5),
        ("steps", [1, 2], (1, 2)),
        ("steps", (1, 2), (1, 2)),
        ("pair", [3, "b"], (3, "b")),
        ("several", [1, 2.5], [1.0, 2.5]),
        ("table", {"a": 1, "b c": 2.0}, {"a": 1.0, "b c": 2.0}),
        ("anything", {"a": [1, "x", None]}, {"a": [1, "x", None]}),
        ("noted", 4, 4),
    ],
)
def test_field_types(key: str, given: Any, expected: Any) -> None:
    found = getattr(net(**{key: given}), key)
    assert found == expected
    assert type(found) is type(expected)


def test_a_string_is_short_for_a_type() -> None:
    config = net(layers=[{"mixer": "ema", "norm": "scalenorm", "activate": {"module": "gau", "configurator": "gate"}}])
    layer = config.layers[0]
    assert layer.mixer == Ema.Config()
    assert layer.norm == ScaleNorm.Config()
    assert layer.activate == Activate(module=Gau.Config(), configurator=Gate.Config())


def test_union_of_kinds() -> None:
    layers = net(layers=[{"either": "ema"}, {"either": {"type": "gau", "window": 2}}, {"either": None}]).layers
    assert [layer.either for layer in layers] == [Ema.Config(), Gau.Config(window=2), None]


def test_concrete_class_needs_no_type_but_takes_a_subclass() -> None:
    def only_gau(value: Any) -> Any:
        return net(layers=[{"activate": {"module": "gau", "only_gau": value}}]).layers[0].activate.only_gau

    assert only_gau({"type": "gau", "window": 5}) == Gau.Config(window=5)
    assert only_gau({"type": "wide_gau", "width": 5}) == WideGau.Config(width=5)
    assert load_as({"window": 5}, Gau.Config) == Gau.Config(window=5)


def test_a_mapping_without_type_changes_the_default() -> None:
    layer = net(
        layers=[{"activate": {"module": "gau", "configurator": {}, "only_gau": {"d_qk": 2}}, "norm": {}}]
    ).layers[0]
    assert layer.activate.configurator == Gate.Config(rate=0.25)
    assert layer.activate.only_gau == Gau.Config(window=3, d_qk=2)
    assert layer.norm == LayerNorm.Config(eps=0.5)
    fresh = net(layers=[{"norm": {"type": "layernorm"}}]).layers[0].norm
    assert fresh == LayerNorm.Config(eps=1e-5), "naming the type starts from the defaults of the class"


def test_kind_decides_between_equal_names(registry: Registry) -> None:
    registry.register("ema", Gau)
    with pytest.raises(SpecError, match="'ema' may be a mixer or a module: say which with kind="):
        load("ema")
    assert load("ema", kind="module") == Gau.Config()
    assert load("ema", kind="mixer") == Ema.Config()
    with pytest.raises(SpecError, match=r"no kind of plugin is named 'modul'; did you mean 'module'\?"):
        load("ema", kind="modul")
    with pytest.raises(SpecError, match="expected mixer, got module"):
        load(Gau.Config(), kind="mixer")


@dataclass(kw_only=True, frozen=True)
class Recipe:
    """A dataclass that is no plugin."""

    model: sma.Model.Config
    batch: int = 1
    steps: tuple[int, ...] = field(default=())


def test_load_as_a_plain_dataclass(registry: Registry, tmp_path: Path) -> None:
    registry.register("base_net", write(tmp_path / "base.yaml", "type: net\nd_model: 3\nlayers: [{mixer: ema}]\n"))
    assert load_as({"model": "net", "batch": 4}, Recipe) == Recipe(model=Net.Config(), batch=4)
    by_name = load_as({"model": "base_net"}, Recipe)
    assert by_name.model.d_model == 3  # type: ignore[attr-defined]
    changed = load_as({"model": "base_net"}, Recipe, "model.layers[0].mixer.n_state=2", "batch=2")
    assert changed.model.layers[0].mixer == Ema.Config(n_state=2)  # type: ignore[attr-defined]
    assert (changed.model.d_model, changed.batch) == (3, 2)  # type: ignore[attr-defined]
    with pytest.raises(SpecError, match=r"^model: 'gau' is a module, not a model$"):
        load_as({"model": "gau"}, Recipe)
    with pytest.raises(
        SpecError, match="model: 'base_net' is a spec: to change parts of it write 'extends', not 'type'"
    ):
        load_as({"model": {"type": "base_net", "d_model": 2}}, Recipe)


# overrides


def test_overrides() -> None:
    base = {"type": "net", "layers": [{"mixer": "ema"}, {"activate": {"module": "gau"}}]}
    config: Any = load(
        base,
        "d_model=32",
        "lr=1e-3",
        "steps=[1, 2]",
        "layers[0].mixer.n_state=4",
        "layers.1.activate.module.window=32",
        "layers[1].norm=scalenorm",
        "layers[1].activate.only_gau={d_qk: 1}",
        "name=a b",
        "size=",
        "table.x=2",
    )
    assert (config.d_model, config.lr, config.steps, config.name) == (32, 1e-3, (1, 2), "a b")
    assert (config.size, config.table) == (None, {"x": 2.0})
    assert config.layers[0].mixer == Ema.Config(n_state=4)
    assert config.layers[1].activate.module == Gau.Config(window=32)
    assert config.layers[1].activate.only_gau == Gau.Config(window=3, d_qk=1)
    assert config.layers[1].norm == ScaleNorm.Config()
    assert base["layers"][0] == {"mixer": "ema"}, "the source is left as it was"  # type: ignore[index]


@pytest.mark.parametrize(
    "text",
    [
        "run #3",
        "#",
        "2024",
        "1e3",
        "null",
        "~",
        "true",
        "",
        " ",
        "run ",
        "a: b",
        "*.py",
        "&a",
        "- x",
        "a\nb",
        "x]",
        "%",
    ],
)
def test_the_string_of_an_override_is_taken_literally(text: str) -> None:
    assert load({"type": "net"}, f"name={text}") == Net.Config(name=text)
    assert load({"type": "net", "anything": "${name}!"}, f"name={text}") == Net.Config(name=text, anything=text + "!")
    quoted = '"' + text.replace("\n", "\\n") + '"'
    assert load({"type": "net"}, f"name={quoted}") == Net.Config(name=text)


def test_an_override_of_an_optional_string() -> None:
    @dataclass(frozen=True)
    class Place:
        root: str | None = "before"
        names: tuple[str, ...] = ()

    def root(override: str) -> str | None:
        return load_as({}, Place, override).root

    assert [root(f"root={each}") for each in ("", "null", "2024", "'null'", "false")] == [
        *("", None, "2024", "null", "false")
    ]
    assert load_as({"names": ["a", "b"]}, Place, "names[1]=07").names == ("a", "07")
    with pytest.raises(SpecError, match=r"names: expected a list of str, got '\*.py'"):
        load_as({}, Place, "names=*.py")


@pytest.mark.parametrize("text", ["'run' #3", "[a] #b", '{x: 1} "', "[run #3]"])
def test_nothing_is_cut_off_an_override(text: str) -> None:
    with pytest.raises(SpecError, match=r"nothing may follow the closing bracket or quote, got|not valid YAML"):
        load({"type": "net"}, f"anything={text}")


def test_blanks_around_the_equals_sign() -> None:
    assert load({"type": "net"}, "name = x", "d_model = 16") == Net.Config(name="x", d_model=16)
    assert load({"type": "net"}, "anything=3", "anything={a: 1}", "anything.b=null", "table={}") == Net.Config(
        anything={"a": 1, "b": None}
    )


def test_integers_have_64_bits() -> None:
    assert load({"type": "net", "d_model": 2**63 - 1}) == Net.Config(d_model=2**63 - 1)
    for value in (2**63, -(2**63) - 1, 2**70):
        with pytest.raises(SpecError, match=rf"^steps\[1\]: expected an integer of 64 bits, got {value}$"):
            load({"type": "net", "steps": [1, value]})
        with pytest.raises(SpecError, match="d_model: expected an integer of 64 bits"):
            load({"type": "net"}, f"d_model={value}")


def test_overriding_a_type_starts_afresh() -> None:
    base = {"type": "net", "layers": [{"either": {"type": "gau", "window": 4}}]}
    assert load(base, "layers[0].either.type=ema").layers[0].either == Ema.Config()  # type: ignore[attr-defined]
    kept = load(base, "layers[0].either.type=gau").layers[0].either  # type: ignore[attr-defined]
    assert kept == Gau.Config(window=4)


def test_overrides_of_a_configuration() -> None:
    config = Net.Config(layers=(parts.Layer(mixer=Ema.Config(n_state=3)),), name="${x}")
    changed: Any = load(config, "layers[0].mixer.scale=2")
    assert changed.layers[0].mixer == Ema.Config(n_state=3, scale=2.0)
    assert changed.name == "${x}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("d_model", "override 'd_model': must be of the form key=value"),
        ("=3", "override '=3': must be of the form key=value"),
        (".a=3", "must be of the form key=value"),
        ("a b=3", "must be of the form key=value"),
        ("layers[1].mixer=ema", r"layers is a list of 1, there is no layers\[1\]"),
        ("layers.x=ema", r"layers is a list of 1, there is no layers.x"),
        ("name[0]=ema", "name is no list"),
        ("d_modle=3", r"spec \(net\): unknown key 'd_modle'; did you mean 'd_model'\?"),
        ("steps=[1", r"override 'steps=\[1', line 1, column 3: not valid YAML"),
        ("d_model=!!python/object:os.system x", "tags are not allowed"),
        ("name=${oc.env:HOME}", "name: resolvers are not allowed"),
    ],
)
def test_bad_overrides(override: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load({"type": "net", "layers": [{}]}, override)


# extends


def test_extends_by_name_and_by_file(tmp_path: Path, registry: Registry) -> None:
    write(tmp_path / "base.yaml", "type: net\nd_model: 4\nsteps: [1, 2]\nlayers:\n- mixer: {type: ema, n_state: 2}\n")
    write(tmp_path / "sub.yml", "extends: base.yaml\nlr: 0.5\n")
    top = write(tmp_path / "top.yaml", "extends: sub.yml\nsteps: [3]\nd_model: 5\n")
    expected = Net.Config(d_model=5, lr=0.5, steps=(3,), layers=(parts.Layer(mixer=Ema.Config(n_state=2)),))
    assert load(top) == expected
    registry.register("top", top)
    assert load({"extends": "top", "name": "x"}) == load(expected, "name=x")
    assert load({"extends": str(top)}, "extends=top") == expected


def test_merging_of_children() -> None:
    base = {"norm": "layernorm", "either": {"type": "gau", "window": 2}}
    from sma.spec.tree import merge

    assert merge(base, {"norm": {"eps": 1.0}})["norm"] == {"type": "layernorm", "eps": 1.0}
    assert merge(base, {"either": {"d_qk": 1}})["either"] == {"type": "gau", "window": 2, "d_qk": 1}
    assert merge(base, {"either": {"type": "ema"}})["either"] == {"type": "ema"}
    assert merge({"a": [1, 2]}, {"a": [3]}) == {"a": [3]}
    assert merge({"type": "x", "a": 1}, {"type": "y"}, keep=True) == {"type": "y", "a": 1}


def test_extends_for_a_child_keeps_its_references(tmp_path: Path, registry: Registry) -> None:
    text = "type: net\nd_model: 4\nnoted: ${d_model}\nname: \\${d_model} ${.noted}\n"
    registry.register("inner", write(tmp_path / "inner.yaml", text))
    recipe: Any = load_as({"batch": 7, "model": {"extends": "inner", "d_model": "${batch}"}}, Recipe)
    assert (recipe.model.d_model, recipe.model.noted, recipe.model.name) == (7, 7, "${d_model} 7")


def test_extends_circle(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    with pytest.raises(SpecError, match=r"specs extend one another in a circle: .*a.yaml -> .*b.yaml -> .*a.yaml"):
        load(tmp_path / "a.yaml")


def test_specs_that_contain_one_another(tmp_path: Path, registry: Registry) -> None:
    registry.register("loop", write(tmp_path / "loop.yaml", "type: wrapper\ninner: {type: wrapper, inner: loop}\n"))
    with pytest.raises(SpecError, match=r"inner.inner.inner.inner: specs contain one another: loop -> loop"):
        load("loop")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"extends": "nosuch"}, "spec: extends 'nosuch': no spec named 'nosuch'"),
        ({"extends": "nosuch.yaml"}, "spec: extends 'nosuch.yaml': nosuch.yaml: cannot be read: No such file"),
        ({"extends": 3}, r"spec: 'extends' names one spec or file, got 3 \(int\)"),
        ({"type": "net", "layers": [{"extends": "x"}]}, r"layers\[0\]: extends 'x': no spec named 'x'"),
    ],
)
def test_bad_extends(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load(tree)


# references


def test_references_mean_what_they_mean_to_omegaconf() -> None:
    tree = {
        "a": 3,
        "b": "${a}",
        "c": {"d": "${.e}", "e": "${..a}", "f": ["${a}", "${.0}", "${..e}", "${c.f[0]}"], "g": "${c.f.1}"},
        "text": "x${a}y${b}z",
        "whole": "${c}",
        "none": None,
        "escaped": r"\${a} \\${a} $ {a} \n",
        "join": "${none}-${flag}",
        "flag": True,
        "through": "${whole.f[2]}",
    }
    from sma.spec.tree import Budget, resolve

    expected = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    assert resolve(tree, Budget()) == expected


def test_references_in_a_spec() -> None:
    config = net(
        d_model="${noted}", noted=5, name="n${d_model}", layers=[{"mixer": {"type": "ema", "n_state": "${d_model}"}}]
    )
    assert (config.d_model, config.name, config.layers[0].mixer.n_state) == (5, "n5", 5)


# round trip

INTEGERS = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(max_size=12).filter(lambda text: text != "???")
NORMS = st.one_of(st.builds(LayerNorm.Config, eps=FLOATS), st.builds(ScaleNorm.Config))
GAUS = st.builds(
    Gau.Config,
    d_qk=INTEGERS,
    window=INTEGERS,
    activation=st.sampled_from(["softmax", "relu2"]),
    norm=st.none() | NORMS,
)
MODULES = (
    GAUS | st.builds(WideGau.Config, width=INTEGERS) | st.builds(Ffn.Config, d_hidden=INTEGERS, bias=st.booleans())
)
MIXERS = st.builds(Ema.Config, n_state=INTEGERS, scale=st.none() | FLOATS)
ACTIVATES = st.builds(
    Activate, module=MODULES, configurator=st.builds(Gate.Config, rate=st.floats(0, 1)), only_gau=GAUS
)
LAYERS = st.builds(
    parts.Layer,
    mixer=st.none() | MIXERS,
    activate=st.none() | ACTIVATES,
    either=st.none() | MIXERS | MODULES,
    norm=NORMS,
)
NETS = st.builds(
    Net.Config,
    d_model=INTEGERS,
    lr=FLOATS,
    limit=st.floats(allow_nan=False),
    name=TEXTS,
    flag=st.booleans(),
    pool=st.sampled_from(["mean", "first", 3]),
    colour=st.sampled_from(Colour),
    size=st.none() | INTEGERS | FLOATS,
    steps=st.lists(INTEGERS, max_size=3).map(tuple),
    pair=st.tuples(st.integers(-9, 9), TEXTS),
    several=st.lists(FLOATS, max_size=3),
    table=st.dictionaries(TEXTS, FLOATS, max_size=3),
    layers=st.lists(LAYERS, max_size=2).map(tuple),
)
PROPERTY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@PROPERTY
@given(config=NETS)
def test_dump_and_load_are_inverse(config: Net.Config) -> None:
    assert load(dump(config)) == config
    assert loads(to_yaml(config)) == config
    assert load(OmegaConf.create(dump(config))) == config


@PROPERTY
@given(
    text=TEXTS
    | st.sampled_from(
        ["1e3", "1_0", "010", "0x1", "yes", "on", "null", "~", "1:30", ".5", "-", "<<", "=", "2001-01-01"]
    )
)
def test_every_string_survives_yaml(text: str) -> None:
    config = Net.Config(name=text)
    assert loads(to_yaml(config)) == config


def test_dump_says_everything_and_types() -> None:
    tree = dump(Gau.Config(norm=LayerNorm.Config()))
    assert tree == {
        "type": "gau",
        "d_qk": 64,
        "window": 128,
        "activation": "softmax",
        "norm": {"type": "layernorm", "eps": 1e-5},
    }
    assert next(iter(tree)) == "type"


def test_unregistered_class_cannot_be_dumped(registry: Registry) -> None:
    class Unknown(sma.Norm):
        """Not registered."""

    with pytest.raises(SpecError, match=r"Unknown.Config: its class is not registered"):
        dump(Gau.Config(norm=Unknown.Config()))
    with pytest.raises(SpecError, match="only a configuration can be dumped, got 3"):
        dump(3)  # type: ignore[arg-type]
