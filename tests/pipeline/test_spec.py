"""Specs are parsed, never executed; what is wrong is answered with what is right."""

import dataclasses
import re

import pytest

from pipeline import spec
from pipeline.errors import InputError


def test_text_and_parse_are_inverse():
    attack = spec.parse("attacks", "patch(size=24, target='basketball hoop')")
    assert (attack.target, attack.size) == ("basketball hoop", 24)
    assert {f.name: getattr(attack, f.name) for f in dataclasses.fields(attack)[2:4]} == {
        "cells": 4,
        "location": "fixed",
    }
    assert spec.parse("attacks", spec.text(attack)) == attack


def test_the_key_leaves_defaults_out():
    for text in ("patch(target='a')", "patch(cells=4, target='a', size=16)"):
        assert spec.key(spec.parse("attacks", text)) == "patch(target='a')"
    assert spec.key(spec.parse("attacks", "patch(target='a', size=17)")) == "patch(target='a', size=17)"
    inside = spec.text(spec.parse("attacks", "patch(target='banana')"))
    assert spec.key(spec.parse("attacks", f"label_consistent(attack={inside!r})")) == "label_consistent()"
    both = f"multi(attacks=({inside!r}, \"optimised_patch(target='a', surrogate='/here')\"))"
    assert spec.key(spec.parse("attacks", both)) == (
        "multi(attacks=(\"patch(target='banana')\", \"optimised_patch(target='a')\"))"
    )


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("attacks", "pathc(target='x')", "did you mean 'patch'"),
        ("attacks", "patch(target='x', sise=3)", "did you mean 'size'"),
        ("attacks", "patch", "needs target"),
        ("attacks", "patch(target=3)", "expected str"),
        ("attacks", "patch(target='x', size=2.5)", "expected int"),
        ("attacks", "patch(target='x', size=True)", "expected int"),
        ("attacks", "patch(target='x', location='left')", "one of 'fixed', 'random'"),
        ("attacks", "patch(target='x', size=2, cells=4)", "cells <= size"),
        ("attacks", "patch('x')", "is not a spec"),
        ("attacks", "patch(target='x')(1)", "is not a spec"),
        ("attacks", "patch(target=__import__('os').system('true'))", "is not a spec"),
        ("attacks", "patch(**{'target': 'x'})", "is not a spec"),
        ("attacks", "(" * 5000, "is not a spec"),
        ("detectors", "_knn", "unknown detector"),
        ("policies", "budgt(detector='slof', drop=0.1)", "unknown policy"),
        ("policies", "budget(detector='slof', drop=1.5)", "0 <= drop < 1"),
    ],
)
def test_errors_say_what_is_valid(kind, text, says):
    with pytest.raises(InputError, match=re.escape(says)):
        spec.parse(kind, text)


@pytest.mark.parametrize("kind", spec.KINDS)
def test_every_entry_is_one_documented_frozen_dataclass_of_its_file_name(kind):
    for name in spec.names(kind):
        cls = spec.entry(kind, name)
        assert dataclasses.is_dataclass(cls)
        assert cls.__dataclass_params__.frozen
        assert cls.__doc__
        assert not cls.__doc__.startswith(name)


def test_digest_does_not_depend_on_key_order():
    assert (
        spec.digest({"a": 1, "b": [2, 3]}) == spec.digest({"b": [2, 3], "a": 1}) != spec.digest({"a": 1, "b": [3, 2]})
    )
