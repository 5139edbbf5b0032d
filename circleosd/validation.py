"""Validators for dataclasses, made with pydantic-core alone.

pydantic makes the same ones, but its import and its first type take longer than the rest of a service's start, and a
third of its memory. tests/unit/test_validation.py compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic_core import SchemaValidator, ValidationError, core_schema

__all__ = ["ValidationError", "first_wrong", "validator"]

_SIMPLE: dict[Any, Callable[[], Any]] = {
    Any: core_schema.any_schema,
    str: core_schema.str_schema,
    int: core_schema.int_schema,
    float: core_schema.float_schema,
    bool: core_schema.bool_schema,
}

# pydantic's messages that contain terms of Python.
_WORDS = {"missing": "is missing", "unexpected_keyword_argument": "no such member"}


def validator(hint: Any) -> SchemaValidator:
    """A validator for values of that type: a dataclass, or a type that its fields have."""
    return SchemaValidator(_schema(hint))


def first_wrong(exc: ValidationError) -> tuple[str, tuple[int | str, ...], str]:
    """The first error: its type, by pydantic's name, its location, and a description."""
    error = exc.errors(include_url=False, include_context=False)[0]
    words = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return error["type"], error["loc"], _WORDS.get(error["type"], words)


def _schema(hint: Any) -> Any:
    if own := getattr(hint, "__get_pydantic_core_schema__", None):  # pydantic, "Custom types"
        return own(hint, _of_type)
    return _of_type(hint)


def _of_type(hint: Any) -> Any:
    if simple := _SIMPLE.get(hint):
        return simple()
    if is_dataclass(hint):
        return _of_dataclass(hint)
    arguments = get_args(hint)
    match get_origin(hint):
        case origin if origin is Annotated:
            return _ruled(*arguments)
        case origin if origin is Literal:
            return core_schema.literal_schema([*arguments])
        case origin if origin is list:
            return core_schema.list_schema(_schema(arguments[0]))
        case origin if origin is tuple and arguments[1:] == (...,):
            return core_schema.tuple_schema([_schema(arguments[0])], variadic_item_index=0)
        case origin if origin is dict:
            return core_schema.dict_schema(*map(_schema, arguments))
        case origin if origin in (Union, UnionType):
            choices = [_schema(item) for item in arguments if item is not NoneType]
            schema = core_schema.union_schema(choices) if len(choices) > 1 else choices[0]
            return core_schema.nullable_schema(schema) if NoneType in arguments else schema
    raise TypeError(f"nothing here validates {hint}")


def _ruled(hint: Any, *extras: Any) -> Any:
    schema = _schema(hint)
    for extra in extras:
        if rule := getattr(extra, "__get_pydantic_core_schema__", None):
            schema = rule(hint, lambda _, inner=schema: inner)
    return schema


def _of_dataclass(cls: Any) -> Any:
    hints, members = get_type_hints(cls, include_extras=True), []
    for item in fields(cls):
        schema = _schema(hints[item.name])
        if item.default is not MISSING:
            schema = core_schema.with_default_schema(schema, default=item.default)
        elif item.default_factory is not MISSING:
            schema = core_schema.with_default_schema(schema, default_factory=item.default_factory)
        members.append(core_schema.dataclass_field(item.name, schema))
    config: dict[str, Any] = getattr(cls, "__pydantic_config__", {})
    return core_schema.dataclass_schema(
        cls,
        core_schema.dataclass_args_schema(cls.__name__, members),
        [item.name for item in fields(cls)],
        config=core_schema.CoreConfig(
            strict=config.get("strict", False), extra_fields_behavior=config.get("extra", "ignore")
        ),
    )
