"""`"patch(target='banana', size=16)"` <-> a frozen dataclass.

A spec is the CLI argument, the line in the log, the cache key and the row in the table. It is parsed
with `ast` and never executed. A kind (attacks, detectors, ...) is a folder; an entry is a file in it that holds one
dataclass of the same name. Nothing is registered: a new file is a new entry, imported when it is asked for.
"""

import ast
import dataclasses
import hashlib
import importlib
import json
import pkgutil
import types
import typing
from difflib import get_close_matches
from typing import Any

from pipeline.errors import InputError

KINDS = {
    "attacks": "pipeline.attacks",
    "detectors": "filters",
    "defenses": "train.defenses",
    "audits": "pipeline.audits",
    "policies": "pipeline.policies",
}


UNDRAWN = "names a place"  # Annotated[str, UNDRAWN]: a path, which is another one on another machine


@dataclasses.dataclass(frozen=True)
class SpecOf:
    """Annotated[str, SpecOf(kind)]: a field that holds the spec of another entry, or several."""

    kind: str


def names(kind: str) -> list[str]:
    """Entries of a kind: the files of its folder that do not start with an underscore."""
    package = importlib.import_module(KINDS[kind])
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def entry(kind: str, name: str) -> type:
    """The dataclass of an entry; an unknown name is an error that lists the valid ones."""
    valid = names(kind)
    if name not in valid:
        raise InputError(f"unknown {kind[:-1] if kind != 'policies' else 'policy'} {name!r}{_hint(name, valid)}")
    module = importlib.import_module(f"{KINDS[kind]}.{name}")
    return getattr(module, name)


def parse(kind: str, text: str) -> Any:
    """Build the entry that `text` names, e.g. `parse("detectors", "slof(k=16)")`.

    Raises InputError on anything but `name` or `name(key=literal, ...)`, on unknown keys and on values of another type.
    """
    name, values = parse_call(text)
    cls = entry(kind, name)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in fields:
            raise InputError(f"{name} has no parameter {key!r}{_hint(key, list(fields))}")
        if not fits(value, hints[key]):
            raise InputError(f"{name}({key}={value!r}): expected {type_name(hints[key])}")
    missing = [
        f.name
        for f in fields.values()
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{name} needs {', '.join(missing)}: {name}({', '.join(f'{m}=…' for m in missing)})")
    values = {k: float(v) if hints[k] is float else v for k, v in values.items()}  # 1 and 1.0 are one spec
    try:
        return cls(**values)
    except ValueError as error:  # a field's own check in __post_init__
        raise InputError(f"{text}: {error}") from error


def parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """`"slof(k=16)"` -> `("slof", {"k": 16})` without looking the name up."""
    shape = f"{text!r} is not a spec: write name or name(key=value, …) with plain values"
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
            raise InputError(shape)
        if any(keyword.arg is None for keyword in node.keywords):
            raise InputError(shape)
        return node.func.id, {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise InputError(shape) from error


def innermost(text: str) -> str:
    """The name of what a call is about in the end: of "label_consistent(attack='patch(…)')" patch."""
    name, arguments = parse_call(text)
    inner = arguments.get("attack")
    return innermost(inner) if isinstance(inner, str) else name


def text(instance: Any) -> str:
    """The canonical spec of an entry: every field, in the order of the dataclass."""
    values = ", ".join(f"{f.name}={getattr(instance, f.name)!r}" for f in dataclasses.fields(instance))
    return f"{type(instance).__name__}({values})"


def key(instance: Any) -> str:
    """The spec without what is as by default: randomness hangs on it, so that a new parameter changes nobody's draw.

    Fields marked UNDRAWN are left out, and specs inside (SpecOf) are in the same short form.
    """
    hints, told = typing.get_type_hints(type(instance), include_extras=True), []
    for field in dataclasses.fields(instance):
        marks = getattr(hints[field.name], "__metadata__", ())
        value, default = (_short(v, marks) for v in (getattr(instance, field.name), field.default))
        if UNDRAWN not in marks and value != default:
            told.append(f"{field.name}={value!r}")
    return f"{type(instance).__name__}({', '.join(told)})"


def _short(value: Any, marks: tuple[Any, ...]) -> Any:
    for mark in marks:
        if isinstance(mark, SpecOf) and isinstance(value, str):
            return key(parse(mark.kind, value))
        if isinstance(mark, SpecOf) and isinstance(value, tuple):
            return tuple(_short(one, marks) for one in value)
    return value


def digest(value: Any) -> str:
    """16 hex digits that identify a JSON-like value; the cache key of a job."""
    blob = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(blob.encode()).hexdigest()[:16]


def _hint(wrong: str, valid: list[str]) -> str:
    close = get_close_matches(wrong, valid, n=1)
    guess = f"; did you mean {close[0]!r}?" if close else "."
    return f"{guess} Valid: {', '.join(valid) or 'none'}"


def fits(value: Any, hint: Any) -> bool:
    """Whether a parsed value is of the annotated type; an int is a float, a bool is no int."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, arm) for arm in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(v, typing.get_args(hint)[0]) for v in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def type_name(hint: Any) -> str:
    """The annotated type in words."""
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a list of {type_name(typing.get_args(hint)[0])}"
    return getattr(hint, "__name__", str(hint))
