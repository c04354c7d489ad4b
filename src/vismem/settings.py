"""Reads settings from YAML files and `key=value`, and checks every name and type; each error is one line.

Training and evaluation read their settings here. Nothing here imports torch, so a typo is reported immediately.
"""

from __future__ import annotations

import ast
import collections.abc
import difflib
import re
import sys
import types
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import yaml
from pydantic import PlainValidator, TypeAdapter, ValidationError

from vismem.config import SettingsError, shortened

__all__ = ["SettingsError", "check", "convert", "hints_from_source", "kind_of", "read_changes", "read_file"]

MOST_BYTES = 2**18  # of a settings file
MOST_VALUES = 10_000  # in a file, with aliases expanded
MOST_DEPTH = 32
TOO_DEEP = f"values are nested more than {MOST_DEPTH} deep"
CORE = "tag:yaml.org,2002:"


# Reading YAML.


class _Loader(yaml.SafeLoader):
    """Composes nodes by YAML 1.2's core schema: `no`, `off` and dates are text, `5e-5` is a number."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+(_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(CORE + _tag, re.compile(rf"^(?:{_pattern})$"), _first)


def read_file(path: str | Path | None) -> dict[str, Any]:
    """Reads a YAML file; returns no settings for None.

    Raises:
        SettingsError: if the file is too large, not UTF-8, not YAML 1.2, or not a mapping.
        OSError: if it cannot be read.
    """
    if path is None:
        return {}
    with open(path, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise SettingsError(f"{path} is larger than {MOST_BYTES // 2**10} KiB, the limit for a settings file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SettingsError(f"{path} is not UTF-8 text: byte 0x{content[error.start]:02x} in line {line}") from error
    found = _read(text, str(path))
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise SettingsError(f"{path} must hold a mapping of settings, got {format_value(found)}")
    return found


def read_changes(texts: Sequence[str]) -> dict[str, Any]:
    """Reads `key=value` and `section.key=value`, with the values as YAML; the last one wins if a key is repeated.

    Raises:
        SettingsError: if an entry has another form, or a value is not YAML.

    Example:
        >>> read_changes(["baseline=off", "stage2.learning_rate=1e-5"])
        {'baseline': 'off', 'stage2': {'learning_rate': 1e-05}}
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        *sections, key = parts = name.strip().split(".")
        if not equals or not all(parts):
            raise SettingsError(f"{text!r} is not of the form key=value")
        target = found
        for depth, section in enumerate(sections):
            inner = target.setdefault(section, {})
            if section == "memory" and isinstance(inner, str):
                inner = target[section] = {"preset": inner}
            if not isinstance(inner, dict):
                before = ".".join(sections[: depth + 1])
                raise SettingsError(f"{name} is set inside {before}, which is set to {format_value(inner)}")
            target = inner
        target[key] = _read(value, f"the value of {name}", comments=False)
    return found


def _read(text: str, where: str, *, comments: bool = True) -> Any:
    """Reads a YAML document as plain values; without `comments`, `#` after a plain scalar is part of the text."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        plain = node is None or (isinstance(node, yaml.ScalarNode) and node.style is None)
        if not comments and plain and text[node.end_mark.index if node else 0 :].strip():
            return text.strip()
        return None if node is None else _plain(node, [MOST_VALUES], 0)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None and "\n" in text.strip() else ""
        problem = " ".join(" ".join(filter(None, (error.context, error.problem))).split())
        raise SettingsError(f"{where} is not valid YAML{line}: {problem}") from error
    except RecursionError as error:
        raise SettingsError(f"{where} is not valid YAML: {TOO_DEEP}") from error
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise SettingsError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def _plain(node: yaml.Node, left: list[int], depth: int) -> Any:
    """The value of a node. Aliases count expanded, so that a small file cannot produce millions of values."""
    left[0] -= 1
    if left[0] < 0:
        raise _refused(node, f"with its aliases expanded it has more than {MOST_VALUES:,} values")
    if depth > MOST_DEPTH:
        raise _refused(node, TOO_DEEP)
    kind = node.tag.removeprefix(CORE)
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return [_plain(each, left, depth + 1) for each in node.value]
    if isinstance(node, yaml.MappingNode) and kind == "map":
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            name = _plain(key, left, depth + 1)
            if not isinstance(name, str):
                raise _refused(key, f"the name of a setting must be text, got {format_value(name)}")
            if name == "<<":
                raise _refused(key, "merge keys (<<) are not part of YAML 1.2; write the settings out")
            if name in found:
                raise _refused(key, f"{name} is set twice (first in line {lines[name]})")
            found[name], lines[name] = _plain(value, left, depth + 1), key.start_mark.line + 1
        return found
    if isinstance(node, yaml.ScalarNode) and kind in _SCALARS:
        try:
            return _SCALARS[kind](node.value)
        except (ValueError, KeyError):
            raise _refused(node, f"{format_value(node.value)} is not of the type {kind}") from None
    raise _refused(node, f"the tag {node.tag} is not supported; use text, numbers, true, false, lists and mappings")


def _refused(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _int(text: str) -> int:
    value = int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if value.bit_length() > 1024:  # Python limits the digits of an integer
        raise ValueError
    return value


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_SCALARS: dict[str, Any] = {
    "null": lambda _text: None,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "int": _int,
    "float": _float,
    "str": str,
}


# Names and types.


def check(
    values: Any, kinds: Mapping[str, Any], section: str = "", elsewhere: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Checks names and converts each value to its setting's type, from `kind_of`. Raises SettingsError.

    Args:
        values, kinds: by name.
        section: prefix of the names in messages; ends with a dot or a space.
        elsewhere: other libraries' names -> the name here, or a sentence of advice.
    """
    if not isinstance(values, Mapping):
        raise SettingsError(
            f"{section.rstrip(' .') or 'settings'} must be a mapping of settings, got {format_value(values)}"
        )
    found = {}
    for name, value in values.items():
        if name not in kinds:
            raise unknown(f"{section}{name}", str(name), kinds, elsewhere)
        found[name] = convert(value, kinds[name], f"{section}{name}")
    return found


def unknown(
    full_name: str, name: str, known: Collection[str], elsewhere: Mapping[str, str] | None = None
) -> SettingsError:
    """The error for an unknown name; gives its name here, or the nearest one."""
    if other := (elsewhere or {}).get(name):
        return SettingsError(
            f"unknown setting {full_name}; " + (other if " " in other else f"it is called {other} here")
        )
    near = difflib.get_close_matches(name, known, 1)
    few = f"; the settings are {', '.join(known)}" if len(known) <= 20 else ""
    return SettingsError(f"unknown setting {full_name}" + (f"; did you mean {near[0]}?" if near else few))


def convert(value: Any, kind: Any, name: str) -> Any:
    """Converts a value from YAML or the command line to a type; null becomes empty text. Raises SettingsError."""
    if value is None and kind is str:
        return ""
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError:
        hint = ""
        if describe(kind).startswith("text") and isinstance(value, (int, float)):
            hint = f' (as text: "{str(value).lower()}", with quotes)'
        raise SettingsError(f"{name} must be {describe(kind)}, got {format_value(value)}{hint}") from None


def check_preset(value: Any, presets: Collection[str], where: str = "") -> str:
    """Checks the name of a preset. Raises SettingsError if it is unknown."""
    if not isinstance(value, str) or value not in presets:
        raise SettingsError(f"{where}unknown preset {format_value(value)}; choose from {', '.join(presets)}")
    return value


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _number(value: Any) -> int | float:
    if isinstance(value, str):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise ValueError
    return value


def _whole(value: Any) -> int:
    value = _number(value)
    if value != int(value) or abs(value) >= 2**63:
        raise ValueError
    return int(value)


def _flag(value: Any) -> bool:
    found = _FLAGS.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise ValueError
    return found


# YAML 1.2 has only true and false; where a boolean is expected, YAML 1.1's words are accepted too.
_FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}

Whole = Annotated[int, PlainValidator(_whole), "a whole number"]
Number = Annotated[float, PlainValidator(_number), "a number"]
Flag = Annotated[bool, PlainValidator(_flag), "true or false"]
_KINDS: dict[Any, Any] = {int: Whole, float: Number, bool: Flag}


def kind_of(hint: Any) -> Any:
    """Converts a type hint to a setting's type: numbers are finite, not booleans, and may be given as text."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        named = any(get_origin(each) is Literal and isinstance(get_args(each)[0], str) for each in inner)
        kept = [kind_of(each) for each in inner if not (named and each is str)]  # an enum, or the names of its members
        return Union[tuple(kept)]  # noqa: UP007
    if hint is dict or origin in (dict, collections.abc.Mapping):
        return dict[str, Any] if len(inner) < 2 else dict[str, kind_of(inner[1])]  # type: ignore[misc]
    if origin in (list, collections.abc.Sequence):
        return list[kind_of(inner[0])]  # type: ignore[misc]
    if origin is tuple:
        return tuple[kind_of(inner[0]), ...]  # type: ignore[misc]
    return _KINDS.get(hint, hint)


def describe(kind: Any) -> str:
    """Describes a type's values, for messages."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return str(inner[2])
    if origin is Literal:
        names = ["false" if each is False else str(each) for each in inner]
        return names[0] if len(names) == 1 else f"one of {', '.join(names)}"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(each) for each in sorted(inner, key=lambda each: each is type(None)))
    if origin in (list, tuple):
        each = get_args(inner[0]) if get_origin(inner[0]) in (Union, types.UnionType) else inner[:1]
        return f"a list of {' or '.join(_PLURALS.get(one, 'mappings') for one in each)}"
    return {str: "text", dict: "a mapping", type(None): "null"}.get(origin or kind, "another value")


_PLURALS: dict[Any, str] = {Whole: "whole numbers", Number: "numbers", str: "texts"}


def format_value(value: Any) -> str:
    """Formats a value for messages: as in YAML, and shortened."""
    constants = {True: "true", False: "false", None: "null"}
    return constants[value] if value is None or isinstance(value, bool) else shortened(value)


# Type hints of dataclasses whose modules import torch.


def hints_from_source(file: Path, name: str, enums: Sequence[Path] = ()) -> dict[str, Any]:
    """Reads the type hints of a dataclass from its source, as importing the module would import torch.

    Enums, defined in `file` or in `enums`, become a `Literal` of their values; any other type that is not built in
    becomes `Any`.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    plain = (bool, int, float, str, list, dict, tuple, collections.abc.Mapping, collections.abc.Sequence)
    known = _Names({each.__name__: each for each in plain}, Any=Any, Literal=Literal)
    for each in [tree, *(ast.parse(path.read_text(encoding="utf-8")) for path in enums)]:
        for node in each.body:
            if isinstance(node, ast.ClassDef) and any("Enum" in ast.unparse(base) for base in node.bases):
                members = [item.value for item in node.body if isinstance(item, ast.Assign)]
                values = tuple(item.value for item in members if isinstance(item, ast.Constant))
                known[node.name] = Literal[values]
    fields = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return {
        node.target.id: _hint(node, known)
        for node in fields
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


class _Names(dict[str, Any]):
    def __missing__(self, name: str) -> Any:
        return Any


def _hint(node: ast.AnnAssign, known: _Names) -> Any:
    """A field's type hint, or a `Literal` of the `choices` in its metadata."""
    hint = eval(compile(ast.Expression(node.annotation), "hint", "eval"), {"__builtins__": {}}, known)
    for each in ast.walk(node.value) if node.value else ():
        if isinstance(each, ast.Dict):
            for key, value in zip(each.keys, each.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "choices" and isinstance(value, ast.List):
                    named: Any = Literal[tuple(ast.literal_eval(value))]
                    return named | None if type(None) in get_args(hint) else named
    return hint
