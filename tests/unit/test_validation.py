"""What validates requests, manifests and catalog files says the same as pydantic, which it stands for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, is_dataclass
from typing import Any

import pytest
from pydantic import TypeAdapter

from circleosd.api import auth, plugins, registry
from circleosd.api.contract import completed
from circleosd.paths import SERVICES
from circleosd.plugins.manifest import Capability, Limits, Manifest
from circleosd.registry.catalog import Entry
from circleosd.validation import ValidationError, validator

TYPES = [completed(contract) for module in (auth, registry, plugins) for contract in module.CONTRACTS]
VALUES = [
    None, "", "a", "alice", "5", "1.5", "true", 5, -1, 2**70, 1.5, float("nan"), True, "x" * 5000, "viewer", "warn",
    "service:stop", "*", "0" * 12, "a.service", ["start"], ["start", "enable"], [], [1], {}, {"a": 1}, {1: 2},
    {"a": ["b"]},
]  # fmt: skip


def said(validate: Callable[[Any], Any], value: Any) -> str:
    """The value that comes of it, or all that is wrong, as text: no NaN is another."""
    try:
        made = validate(value)
    except ValidationError as exc:
        return repr([(item["type"], item["loc"], item["msg"]) for item in exc.errors(include_url=False)])
    return repr(asdict(made) if is_dataclass(made) and not isinstance(made, type) else made)


def tried(cls: Any) -> Iterator[Any]:
    """Objects with every value in every field, beside good ones and beside none."""
    names = [item.name for item in fields(cls)]
    yield from ({}, {"nope": 1}, [], "x", None)
    for name in names:
        for value in VALUES:
            yield {name: value}
            yield {**dict.fromkeys(names, "alice"), name: value}


@pytest.mark.parametrize("cls", TYPES, ids=lambda cls: cls.__name__)
def test_requests_are_validated_as_pydantic_does(cls: Any) -> None:
    mine, pydantics = validator(cls).validate_python, TypeAdapter(cls).validator.validate_python
    for value in tried(cls):
        assert said(mine, value) == said(pydantics, value), value


def test_manifests_are_validated_as_pydantic_does() -> None:
    mine, pydantics = validator(Manifest).validate_json, TypeAdapter(Manifest).validate_json
    for value in tried(Manifest):
        text = json.dumps(value)
        assert said(mine, text) == said(pydantics, text), value
    for table, cls in (("limits", Limits), ("capabilities", Capability)):
        for value in tried(cls):
            text = json.dumps({"name": "a", table: [value] if table == "capabilities" else value})
            assert said(mine, text) == said(pydantics, text), value


def test_catalog_files_are_validated_as_pydantic_does() -> None:
    mine, pydantics = validator(list[Entry]).validate_python, TypeAdapter(list[Entry]).validator.validate_python
    for value in tried(Entry):
        assert said(mine, [value]) == said(pydantics, [value]), value


def test_what_is_not_known_here_is_refused() -> None:
    with pytest.raises(TypeError, match="nothing here validates"):
        validator(set[str])


@pytest.mark.parametrize("service", SERVICES.values())
def test_a_service_validates_without_pydantic(service: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"""
import sys
from circleosd.api import {service} as contracts
from circleosd.api.contract import completed
from circleosd.validation import validator
for contract in contracts.CONTRACTS:
    validator(completed(contract))
print("pydantic" in sys.modules)
"""],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "False\n"
