"""Dictionaries become dataclasses, or one clear line."""

import dataclasses
import json
from typing import Any, ClassVar, Literal, Protocol

import pytest
from ml_collections import ConfigDict

from vidar.config import build, differences, import_path, load, to_dict
from vidar.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Circle:
    kind: ClassVar[str] = "circle"
    radius: float = 1.0


@dataclasses.dataclass(frozen=True)
class Square:
    kind: ClassVar[str] = "square"
    side: int

    def __post_init__(self):
        if self.side < 0:
            raise ConfigError(f"side {self.side} is negative; give a length")


@dataclasses.dataclass(frozen=True)
class Triangle:
    """Not a member of any union below: reached by import path."""

    height: float = 2.0


class Shape(Protocol):
    def area(self) -> float: ...


@dataclasses.dataclass(frozen=True)
class Scene:
    shape: Circle | Square
    name: str = "scene"
    mode: Literal["fast", "slow"] = "fast"
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, str] = (0, "a")
    limit: float | None = None
    either: float | int = 0
    table: dict[str, Circle] = dataclasses.field(default_factory=dict)
    flag: bool = False
    other: Shape | None = None
    loose: Any = None


FULL = {
    "shape": {"kind": "square", "side": 3},
    "name": "x",
    "mode": "slow",
    "sizes": [4, 5, 6],
    "pair": [7, "b"],
    "limit": 2,
    "either": 5,
    "table": {"one": {"radius": 2}},
    "flag": True,
    "other": {"kind": f"{__name__}:Triangle", "height": 4},
    "loose": {"list": [1, [2]]},
}


@pytest.mark.parametrize("wrap", [dict, ConfigDict])
def test_build_converts_nested_fields(wrap):
    scene = build(Scene, wrap(FULL))
    assert scene == Scene(
        shape=Square(side=3),
        name="x",
        mode="slow",
        sizes=(4, 5, 6),
        pair=(7, "b"),
        limit=2.0,
        either=5,
        table={"one": Circle(2.0)},
        flag=True,
        other=Triangle(4.0),
        loose={"list": (1, (2,))},
    )
    assert isinstance(scene.limit, float)
    assert isinstance(scene.either, int)


def test_to_dict_is_the_inverse_and_survives_json():
    scene = build(Scene, FULL)
    plain = json.loads(json.dumps(to_dict(scene)))
    assert plain["shape"] == {"kind": "square", "side": 3}
    assert plain["sizes"] == [4, 5, 6]
    assert build(Scene, plain) == scene


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nam": "x"}, "config.nam: unknown key; did you mean 'name'?"),
        ({"shape": {"kind": "sqare", "side": 1}}, "config.shape.kind: unknown kind 'sqare'; did you mean 'square'?"),
        ({"shape": {"side": 1}}, "config.shape.kind: missing; one of circle, square"),
        ({"shape": {"kind": "square"}}, "config.shape.side: missing; Square needs it"),
        ({"shape": {"kind": "square", "sde": 1}}, "config.shape.sde: unknown key; did you mean 'side'?"),
        ({"shape": {"kind": "square", "side": -1}}, "config.shape: side -1 is negative; give a length"),
        ({"shape": {"kind": "square", "side": 1.5}}, "config.shape.side: 1.5 is a float, not an int"),
        ({"shape": {"kind": "square", "side": True}}, "config.shape.side: True is a bool, not an int"),
        ({"mode": "medium"}, "config.mode: 'medium' is none of 'fast', 'slow'"),
        ({"sizes": [1, "2"]}, "config.sizes[1]: '2' is a str, not an int"),
        ({"pair": [1]}, "config.pair: [1] has 1 entries, not 2"),
        ({"limit": "far"}, "config.limit: 'far' is a str, not a float"),
        ({"table": {"one": {"radus": 1}}}, "config.table.one.radus: unknown key; did you mean 'radius'?"),
        ({"table": 3}, "config.table: 3 is an int, not a dictionary"),
        ({"flag": 1}, "config.flag: 1 is an int, not a bool"),
        ({"shape": {"kind": ["square"]}}, "config.shape.kind: ['square'] is a list, not a str"),
        (
            {"other": {"kind": "no.such.module:Name"}},
            "config.other.kind: cannot import 'no.such.module' of 'no.such.module:Name': No module named 'no'; "
            "put its directory on PYTHONPATH",
        ),
        (
            {"shape": {"kind": "mine.Square"}},
            "config.shape.kind: unknown kind 'mine.Square'; a class of one's own is package.module:Name",
        ),
    ],
)
def test_mistakes_are_one_line_with_the_path(change, message):
    with pytest.raises(ConfigError) as caught:
        build(Scene, FULL | change)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_import_path():
    assert import_path("collections:OrderedDict.fromkeys")([1]) == {1: None}
    with pytest.raises(ConfigError, match="did you mean 'OrderedDict'"):
        import_path("collections:OrderdDict")
    with pytest.raises(ConfigError, match="not an import path"):
        import_path("collections.OrderedDict")


CARD = '''
"""A card."""
import ml_collections

def get_config(size="1"):
    config = ml_collections.ConfigDict()
    config.training = dict(steps=int(size), name="a")
    return config
'''


@pytest.fixture
def card(tmp_path):
    path = tmp_path / "card.py"
    path.write_text(CARD)
    return path


def test_load_applies_overrides_and_locks(card):
    config = load(card, ["--config.training.steps=7"])
    assert config.training.steps == 7
    assert config.training.name == "a"
    with pytest.raises(AttributeError):
        config.training.stps = 1
    assert load(f"{card}:5").training.steps == 5


def test_load_adds_keys_that_the_card_leaves_to_their_defaults(card):
    config = load(card, ["--config.mesh.fsdp=8", "--config.training.stps=7", "--config.mesh.name=a-b"])
    assert config.mesh.to_dict() == {"fsdp": 8, "name": "a-b"}
    # Whether such a key exists is for `build` to say, which knows the dataclass.
    assert config.training.stps == 7


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.training.steps=many"], "--config.training.steps=many: should be a number, as the card's 1 is"),
        (["--config.training.steps="], "--config.training.steps=: should be a number"),
        (["--training.steps=7"], "write --config.key=value"),
        (["--config.training.steps"], "write --config.key=value"),
        (["--config.training.steps.x=3"], "--config.training.steps is 1, not a section"),
        (["--config.training=3"], r"--config.training=3: a section; set one of its keys \(name, steps\)"),
    ],
)
def test_load_refuses_bad_overrides(card, overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(card, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("steps=None", {"steps": None, "name": "a"}),
        ("flag=true", {"steps": 1, "name": "a", "flag": True}),
        ("flag=false", {"steps": 1, "name": "a", "flag": False}),
        ("name=true", {"steps": 1, "name": "true"}),
        ("steps=0.5", {"steps": 0.5, "name": "a"}),
        ("steps=1e-4", {"steps": 1e-4, "name": "a"}),
    ],
)
def test_none_and_booleans_are_read(card, override, value):
    assert load(card, [f"--config.training.{override}"]).training.to_dict() == value
    assert load(card, ["--config.training=None"]).training is None
    assert load(card, ["--config.training={'steps': 3}"]).training.to_dict() == {"steps": 3}


def test_the_last_override_of_a_key_counts(card):
    for order, steps in (("None", "7"), 7), (("7", "None"), None):
        assert load(card, [f"--config.training.steps={value}" for value in order]).training.steps == steps


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise RuntimeError('broken\\ncard')", "RuntimeError: broken"),
        ("return nothing", "NameError: name 'nothing' is not defined"),
        ("1 / 0", "ZeroDivisionError"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("open('/nothing')", "No such file or directory: '/nothing'"),
        ("raise ValueError('never \\'None\\'')", "ValueError: never 'None'"),
        ("return {'a': 1}", "must return a ConfigDict, not dict"),
    ],
)
def test_whatever_a_card_raises_is_one_line(tmp_path, body, message):
    path = tmp_path / "bad.py"
    path.write_text(f"def get_config():\n    {body}\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load_refuses_what_is_not_a_card(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "none.py")
    for text in ("def get_config(): return 3", "x = 1", "import nothing_of_that_name", "def get_config(:"):
        path = tmp_path / "bad.py"
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert "bad.py" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_differences_name_every_place_and_both_values():
    saved = {"model": {"width": 8, "heads": 2}, "times": [1, 2], "old": 3, "none": None}
    given = {"model": {"width": 16, "heads": 2}, "times": [1, 3], "new": {"a": 4}}
    assert sorted(differences(saved, given)) == [
        ("model.width", 8, 16), ("new", None, {"a": 4}), ("old", 3, None), ("times", [1, 2], [1, 3])
    ]  # fmt: skip
    assert list(differences(saved, saved)) == []
    assert list(differences(1, 2)) == [("everything", 1, 2)]
