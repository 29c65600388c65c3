"""From nested dictionaries to nested frozen dataclasses, and back.

Experiment cards (`configs/*.py`) return a locked `ConfigDict`; `build` turns it into the typed dataclasses that the
rest of vidar sees. This module is generic: it must not know which dataclasses exist, nor what their fields mean.
"""

import ast
import dataclasses
import difflib
import importlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from vidar.errors import ConfigError, VidarError

T = TypeVar("T")


def build(cls: type[T], mapping: Any, where: str = "config") -> T:
    """Builds a frozen dataclass, and all dataclasses nested in it, from a dictionary.

    A field annotated as a union of dataclasses is built as the member whose class variable `kind` equals the
    dictionary's `kind`; a `kind` of the form `package.module:Name` imports a class defined elsewhere. Lists become
    tuples.

    Args:
        cls: Dataclass to build.
        mapping: Dictionary or `ConfigDict` of its fields (or an instance of `cls`, which is returned as it is).
        where: Path of `mapping` inside the whole configuration, for error messages.

    Returns:
        An instance of `cls`.

    Raises:
        ConfigError: Unknown or missing key, wrong type, or unknown `kind`; the message names the path.
    """
    if isinstance(mapping, cls):
        return mapping
    entries = _entries(mapping, where, f"a dictionary for {cls.__name__}")
    kind = getattr(cls, "kind", None)
    if kind is not None and "kind" in entries:
        given = entries.pop("kind")
        if given not in (kind, _qualified_name(cls)):
            raise ConfigError(f"{where}.kind: {given!r} is not {kind!r}, the only choice here")
    fields = _fields(cls)
    for key in entries:
        if key not in fields:
            raise ConfigError(f"{where}.{key}: unknown key{_nearest(key, fields)}")
    hints = typing.get_type_hints(cls)
    values = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in entries.items()}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{where}.{name}: missing; {cls.__name__} needs it")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except (TypeError, ValueError) as error:  # what a class of a person's own says of its values
        raise ConfigError(f"{where}: {_named(error)}") from error


def to_dict(value: Any) -> Any:
    """Turns a dataclass into dictionaries, lists and plain values that JSON can hold; the inverse of `build`.

    Args:
        value: A dataclass instance, mapping, sequence, string, number, boolean or None.

    Returns:
        The same with dataclasses as dictionaries (including `kind` where their class has one) and tuples as lists.

    Raises:
        ConfigError: Something inside is none of these.
    """
    if _is_instance(value):
        kind = {"kind": value.kind} if hasattr(type(value), "kind") else {}
        hints = typing.get_type_hints(type(value))
        return kind | {name: _field_to_dict(hints[name], getattr(value, name)) for name in _fields(type(value))}
    if hasattr(value, "items"):
        return {str(key): to_dict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(entry) for entry in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(f"a configuration holds plain values only, not {type(value).__name__} {value!r}")


def differences(saved: Any, given: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Compares two values made of dictionaries and what JSON can say.

    Args:
        saved: One of them.
        given: The other; a key that either lacks counts as None.
        path: Path of both inside the whole.

    Yields:
        Path of a place where they differ, such as `"model.width"`, and what each has there.
    """
    if isinstance(saved, dict) and isinstance(given, dict):
        for key in dict.fromkeys([*saved, *given]):
            yield from differences(saved.get(key), given.get(key), f"{path}.{key}" if path else key)
    elif saved != given:
        yield path or "everything", saved, given


def import_path(path: str, where: str = "config") -> Any:
    """Imports an object named by `package.module:Name`.

    Args:
        path: Import path with a colon before the object's (possibly dotted) name.
        where: Path inside the configuration, for error messages.

    Returns:
        The object.

    Raises:
        ConfigError: The path is malformed, or nothing is there.
    """
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise ConfigError(f"{where}: {path!r} is not an import path; write package.module:Name")
    try:
        found = importlib.import_module(module_name)
    except ImportError as error:
        hint = "; put its directory on PYTHONPATH" if error.name == module_name.partition(".")[0] else ""
        raise ConfigError(f"{where}: cannot import {module_name!r} of {path!r}: {error}{hint}") from error
    # A module is a person's own code, which can fail in any way.
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{where}: cannot import {module_name!r} of {path!r}: {_named(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            public = [entry for entry in vars(found) if not entry.startswith("_")]
            raise ConfigError(f"{where}: {module_name!r} has no {name!r}{_nearest(part, public)}")
        found = getattr(found, part)
    return found


def load(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """Runs an experiment card and applies command-line overrides.

    Args:
        path: Python file with `get_config()`; `file.py:text` calls `get_config("text")`.
        overrides: Flags such as `--config.training.steps=10`. Texts and booleans of the card stay such; all else is
            read as a Python literal, for `build` to check. The last one of a key counts.

    Returns:
        The `ConfigDict`.

    Raises:
        ConfigError: No such file, the file is not a card, or an override has the wrong type.
    """
    file = Path(str(path).partition(":")[0])
    if not file.is_file():
        # A base of a card is a directory beside others with the same files.
        others = sorted(file.parent.parent.glob(f"*/{file.name}")) or sorted(file.parent.glob("*.py"))
        known = ", ".join(map(str, others[:8])) or "none beside it; a card is a Python file with get_config()"
        raise ConfigError(f"card {path}: no such file; there are {known}")
    for override in overrides:
        if not override.startswith("--config.") or "=" not in override:
            raise ConfigError(f"{override}: not an override; write --config.key=value")
    card = _card(path, ())
    last = {override.partition("=")[0]: override for override in overrides}.values()
    known = [override for override in last if _is_set(card, *_override(override))]
    config = _card(path, known)
    with config.unlocked(), config.ignore_type():
        for override in last:
            if override not in known:
                _add(config, *_override(override))
    return config


def _card(path: str | Path, overrides: Sequence[str]) -> Any:
    """Runs a card through ml_collections, with overrides of keys that it sets."""
    from absl import flags
    from ml_collections import ConfigDict, config_flags

    arguments = ["vidar", f"--config={path}", *overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True, sys_argv=arguments)
    try:
        values(arguments)
        config = values["config"].value
        getattr(config, "items", None)  # a card that could not read a file says so only when it is looked into
    except VidarError as error:
        raise ConfigError(f"card {path}: {error}") from error
    except flags.Error as error:
        # What a card raised may come as a traceback, whose last line says it.
        raise ConfigError(f"card {path}: {str(error).strip().splitlines()[-1]}") from error
    # A card is a person's own code, which can fail in any way.
    except (Exception, SystemExit) as error:
        raise ConfigError(f"card {path}: {_named(error)}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"card {path}: get_config() must return a ConfigDict, not {type(config).__name__}")
    return config


def _override(flag: str) -> tuple[list[str], str]:
    """Splits `--config.a.b=value` into its keys and its value."""
    path, _, value = flag.partition("=")
    return path.removeprefix("--config.").split("."), value


def _is_set(config: Any, keys: Sequence[str], value: str) -> bool:
    """Whether a card sets a key to what an override must keep the type of: a text or a boolean."""
    for key in keys:
        if not hasattr(config, "items") or key not in config:
            return False
        config = config[key]
    return isinstance(config, str | bool) and value != "None"


def _add(config: Any, keys: Sequence[str], value: str) -> None:
    """Sets a key to its value read as a Python literal, or else as text."""
    names = ["--config", *keys]
    for depth, key in enumerate(keys[:-1], start=1):
        if config.get(key) is None:
            config[key] = {}
        if not hasattr(config[key], "items"):
            place = ".".join(names[: depth + 1])
            raise ConfigError(f"{'.'.join(names)}: {place} is {config[key]!r}, not a section; write {place}=value")
        config = config[key]
    parsed, before = _literal(value), config.get(keys[-1])
    if isinstance(before, int | float) and not isinstance(parsed, int | float | None):
        raise ConfigError(f"{'.'.join(names)}={value}: should be a number, as the card's {before!r} is")
    if hasattr(config.get(keys[-1]), "items") and not isinstance(parsed, dict | None):
        known = ", ".join(sorted(config[keys[-1]])) or "none"
        raise ConfigError(
            f"{'.'.join(names)}={value}: a section; set one of its keys ({known}), or the section to None"
        )
    config[keys[-1]] = parsed


def _literal(value: str) -> Any:
    """Reads a Python literal, `true` or `false`, or else text."""
    if value in ("true", "false"):
        return value == "true"
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _field_to_dict(hint: Any, value: Any) -> Any:
    """Converts one field; a class that its annotation does not list is named by import path."""
    entries = to_dict(value)
    if _is_instance(value) and type(value) not in (hint, *typing.get_args(hint)):
        entries["kind"] = _qualified_name(type(value))
    return entries


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Checks one value against its annotation, builds what is nested in it, and returns it."""
    if hint is Any:
        return _frozen(value)
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(f"{where}: {value!r} is none of {', '.join(map(repr, choices))}")
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(typing.get_args(hint), value, where)
    if origin is tuple or hint is tuple:
        return _convert_tuple(typing.get_args(hint), value, where)
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        return _convert_mapping(typing.get_args(hint), value, where)
    if _is_dataclass(hint):
        return _build_member((hint,), value, where) if _is_imported(value) else build(hint, value, where)
    if getattr(hint, "_is_protocol", False):
        return _build_member((), value, where)
    return _convert_plain(hint, value, where)


def _convert_plain(hint: Any, value: Any, where: str) -> Any:
    """Checks a value against bool, int, float, str, None or any other class."""
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is None or hint is type(None):
        matches = value is None
    elif hint is int:
        matches = isinstance(value, int) and not isinstance(value, bool)
    elif typing.get_origin(hint) is Callable or hint is Callable:
        matches = callable(value)
    else:
        matches = isinstance(value, typing.get_origin(hint) or hint)
    if not matches:
        name = getattr(hint, "__name__", str(hint))
        raise ConfigError(f"{where}: {value!r} is {_article(type(value).__name__)}, not {_article(name)}")
    return value


def _convert_union(members: tuple[Any, ...], value: Any, where: str) -> Any:
    """Converts to the member that `kind` names, or else to the first member that accepts the value."""
    if value is None and type(None) in members:
        return None
    if hasattr(value, "items"):
        classes = tuple(member for member in members if _is_dataclass(member))
        if len(classes) > 1 or (classes and _is_imported(value)):
            return _build_member(classes, value, where)
        if classes:
            return build(classes[0], value, where)
    expected = [member for member in members if member is not type(None)]
    # An exact type goes first, so that 1 stays an int in `float | int`.
    exact = [member for member in expected if type(value) is member]
    failure = None
    for member in exact + expected:
        try:
            return _convert(member, value, where)
        except ConfigError as error:
            failure = error
    if len(expected) == 1 and failure is not None:
        raise failure
    names = " or ".join(getattr(member, "__name__", str(member)) for member in expected)
    raise ConfigError(f"{where}: {value!r} is {_article(type(value).__name__)}, not {names}")


def _build_member(classes: tuple[Any, ...], value: Any, where: str) -> Any:
    """Builds the dataclass that `kind` names, among `classes` or by import path."""
    if _is_instance(value):
        return value
    kinds = {member.kind: member for member in classes if hasattr(member, "kind")}
    entries = _entries(value, where, "a dictionary for a choice of " + (", ".join(sorted(kinds)) or "kind"))
    kind = entries.get("kind")
    if _is_imported(value):
        member = import_path(str(kind), f"{where}.kind")
        if not _is_dataclass(member):
            raise ConfigError(f"{where}.kind: {kind!r} is not a dataclass")
        entries.pop("kind")
        return build(member, entries, where)
    if kind is None:
        raise ConfigError(f"{where}.kind: missing; one of {', '.join(sorted(kinds))}")
    if not isinstance(kind, str):
        raise ConfigError(f"{where}.kind: {kind!r} is {_article(type(kind).__name__)}, not a str")
    if kind not in kinds:
        hint = "; a class of one's own is package.module:Name" if "." in str(kind) else _nearest(str(kind), kinds)
        raise ConfigError(f"{where}.kind: unknown kind {kind!r}{hint}")
    return build(kinds[kind], entries, where)


def _convert_tuple(members: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    """Converts a list or tuple, element by element."""
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: {value!r} is {_article(type(value).__name__)}, not a list")
    if not members:
        return tuple(_frozen(entry) for entry in value)
    if len(members) == 2 and members[1] is Ellipsis:
        members = (members[0],) * len(value)
    if len(members) != len(value):
        raise ConfigError(f"{where}: {value!r} has {len(value)} entries, not {len(members)}")
    return tuple(
        _convert(member, entry, f"{where}[{index}]")
        for index, (member, entry) in enumerate(zip(members, value, strict=True))
    )


def _convert_mapping(members: tuple[Any, ...], value: Any, where: str) -> dict[str, Any]:
    """Converts a dictionary, value by value."""
    entries = _entries(value, where, "a dictionary")
    member = members[1] if members else Any
    return {key: _convert(member, entry, f"{where}.{key}") for key, entry in entries.items()}


def _entries(value: Any, where: str, wanted: str) -> dict[str, Any]:
    """Returns the items of a dictionary or ConfigDict."""
    if not hasattr(value, "items"):
        raise ConfigError(f"{where}: {value!r} is {_article(type(value).__name__)}, not {wanted}")
    return dict(value.items())


def _fields(cls: Any) -> dict[str, dataclasses.Field[Any]]:
    """Returns the fields that a dataclass is constructed from."""
    return {field.name: field for field in dataclasses.fields(cls) if field.init}


def _is_dataclass(hint: Any) -> bool:
    """Whether an annotation is a dataclass."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _is_instance(value: Any) -> bool:
    """Whether a value is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _frozen(value: Any) -> Any:
    """Returns an untyped value with lists as tuples and ConfigDicts as dictionaries."""
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(entry) for entry in value)
    if hasattr(value, "items"):
        return {key: _frozen(entry) for key, entry in value.items()}
    return value


def _is_imported(value: Any) -> bool:
    """Whether a dictionary's `kind` is an import path."""
    kind = value.get("kind") if hasattr(value, "items") else None
    return isinstance(kind, str) and ":" in kind


def _qualified_name(cls: type) -> str:
    """Returns the import path of a class."""
    return f"{cls.__module__}:{cls.__qualname__}"


def _nearest(key: str, known: Any) -> str:
    """Returns a hint that names the nearest known key, or all keys where none is near."""
    near = difflib.get_close_matches(key, [str(entry) for entry in known], n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(sorted(map(str, known))) or 'none'}"


def _article(name: str) -> str:
    """Returns the name of a type with its article."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _named(error: BaseException) -> str:
    """Returns the class of an error, and the first line of its message."""
    return f"{type(error).__name__}: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    """Returns the first line of an error's message."""
    # A KeyError shows its message as a literal.
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    lines = str(message).strip().splitlines()
    return lines[0] if lines else type(error).__name__
