"""What a contract is made of: the base class of all requests and the rules for their fields.

Nothing here imports pydantic: `circlectl` builds its command line from contracts, and pydantic's import alone would
cost it more than everything else it does. The services apply the rules through pydantic's protocol,
`__get_pydantic_core_schema__` (validation.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from enum import StrEnum
from types import UnionType
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar, Union, dataclass_transform, get_args, get_origin

from circleosd.errors import BadRequest
from circleosd.policy import Access

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def contract(cls: type[T]) -> type[T]:
    """Declare a contract. It becomes a dataclass when it is first needed, see `completed`."""
    return cls


class Effect(StrEnum):
    """What carrying out an action changes, which decides how it is recorded in the ledger."""

    NONE = "none"  # reads; only denials are recorded
    STATE = "state"  # changes the service's own database; the handler records it in the same transaction
    EXTERNAL = "external"  # acts outside it; the dispatcher records the intent before and the outcome after


class Rule:
    """A constraint on a field: `check` raises ValueError with a sentence that quotes the value."""

    def check(self, value: Any) -> None:
        raise NotImplementedError

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> dict[str, Any]:
        """Have `check` called after the type itself was validated (pydantic, "Custom types"); never for None."""

        def checked(value: Any) -> Any:
            if value is not None:
                self.check(value)
            return value

        return {
            "type": "function-after",
            "function": {"type": "no-info", "function": checked},
            "schema": handler(source),
        }


def cut(text: str) -> str:
    """`text` if it is not long, else its beginning."""
    return text if len(text) <= 60 else text[:60] + "…"


def quoted(value: str) -> str:
    """`value` as it can stand in a message: escaped, in quotes, cut when long."""
    return repr(cut(value))


class Pattern(Rule):
    """The whole text matches `regex`; `means` says in words what that is."""

    def __init__(self, regex: str, means: str) -> None:
        self.regex = regex
        self.means = means
        self._matches: Callable[[str], Any] | None = None  # compiled when first needed: a command needs few

    def check(self, value: Any) -> None:
        if self._matches is None:
            self._matches = re.compile(self.regex).fullmatch
        if not self._matches(value):
            raise ValueError(f"{quoted(value)} is not {self.means}")


class Length(Rule):
    """Between `least` and `most` characters. The message does not quote the text: it may be a password."""

    def __init__(self, least: int, most: int) -> None:
        self.least = least
        self.most = most

    def check(self, value: Any) -> None:
        if not self.least <= len(value) <= self.most:
            raise ValueError(f"must have {self.least} to {self.most} characters, not {len(value)}")


class Between(Rule):
    """A number from `least` to `most`, both included."""

    def __init__(self, least: float, most: float) -> None:
        self.least = least
        self.most = most

    def check(self, value: Any) -> None:
        if not self.least <= value <= self.most:
            raise ValueError(f"{cut(str(value))} is not between {self.least} and {self.most}")


class Doc(str):
    """What a field is, in a few words, for help and reference."""

    __slots__ = ()


class Flag(str):
    """The name of a field's option on the command line, if the field itself must have another name."""

    __slots__ = ()


class Mark(StrEnum):
    """How `circlectl` treats a field that is not simply an argument."""

    SECRET = "secret"  # asked for without echo; never an argument, never in the ledger
    FILE = "file"  # a path: made absolute, and opened by circlectl, which passes the descriptor
    HIDDEN = "hidden"  # set by programs, not offered on the command line
    TIME = "time"  # seconds since the epoch; typed as such, as a date, or as a span of time ago
    OPTION = "option"  # always a --flag, never positional
    NEW = "new"  # a secret that is being chosen: asked for twice
    STDIN = "stdin"  # may be on standard input instead, with --NAME-stdin: an argument has 128 KiB, and all can see it


class Parameter(NamedTuple):
    """One field of a contract, as help, command line and ledger see it. `word` is its name on the command line."""

    name: str
    word: str
    type: Any
    required: bool
    default: Any
    doc: str
    marks: frozenset[Mark]
    rules: tuple[Rule, ...]

    @property
    def spelled(self) -> str:
        """`word` as it is typed."""
        return self.word.replace("_", "-")

    def check(self, value: Any) -> None:
        """Raises `BadRequest` for a value that its rules, which the service keeps too, do not allow."""
        try:
            for rule in self.rules:
                rule.check(value)
        except ValueError as exc:
            raise BadRequest(f"{self.word}: {exc}") from exc


class Request:
    """Base of every contract. Class arguments say what the fields cannot.

    action: the name on the wire. access: the role that it needs; a grant of `VERB` on the object suffices too.
    object: the field that names the object acted on. effect: how it is recorded. command: the verb in circlectl's
    group, None when there is none. reply: the type of `data`. stream: whether several replies may come.

    own: a user may do it to the object that bears the user's own name, which is the default for the object. rows: the
    field of a reply's rows that names an object; callers without the role see the rows of objects on which a rule
    allows them something. claimed: the object is only what the caller says it is, so no rule can be about it.
    """

    action: ClassVar[str]
    access: ClassVar[Access]
    effect: ClassVar[Effect]
    object_field: ClassVar[str | None]
    command: ClassVar[str | None]
    reply: ClassVar[Any]
    stream: ClassVar[bool]
    own_object: ClassVar[bool]
    row_field: ClassVar[str | None]
    claimed_object: ClassVar[bool]
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    def __init_subclass__(
        cls,
        *,
        action: str,
        access: Access,
        reply: Any,
        effect: Effect = Effect.NONE,
        object: str | None = None,
        command: str | None = "",
        stream: bool = False,
        own: bool = False,
        rows: str | None = None,
        claimed: bool = False,
    ) -> None:
        cls.action = action
        cls.access = access
        cls.effect = effect
        cls.object_field = object
        cls.command = action if command == "" else command
        cls.reply = reply
        cls.stream = stream
        cls.own_object = own
        cls.row_field = rows
        cls.claimed_object = claimed

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Only until the class is completed: then it has its own.
        completed(type(self)).__init__(self, *args, **kwargs)

    @classmethod
    def has_fields(cls) -> bool:
        """Whether it has any; known before it is completed."""
        return any(base.__annotations__ for base in cls.__mro__ if issubclass(base, Request) and base is not Request)

    @classmethod
    def has_object(cls) -> bool:
        """Whether a rule can be about an object of the action, and not just about the action."""
        return cls.row_field is not None or (cls.object_field is not None and not cls.claimed_object)

    @classmethod
    def takes_rules(cls) -> bool:
        """Whether a rule about an object can allow the action."""
        return cls.access is not Access.ANYONE and cls.has_object()

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Callable[[Any], Any]) -> dict[str, Any]:
        """Take a dict for the dataclass itself, while its fields stay strict: "5" is no number."""
        return {**handler(source), "strict": False}

    @classmethod
    def summary(cls) -> str:
        """The docstring's first line."""
        return (cls.__doc__ or "").strip().partition("\n")[0]


def completed(request: type[Request]) -> type[Request]:
    """The contract as the frozen dataclass that it is declared to be.

    Making one takes as long as importing a small module, and a start of a service or of circlectl needs few of them.
    """
    from dataclasses import dataclass  # some starts need none

    for cls in reversed(request.__mro__):  # a contract may extend another's fields
        if issubclass(cls, Request) and cls is not Request and "__dataclass_fields__" not in vars(cls):
            dataclass(frozen=True, eq=False, repr=False)(cls)
    return request


def parameters(request: type[Request]) -> Iterator[Parameter]:
    """The fields of a contract in order. Modules with contracts do not postpone the evaluation of annotations."""
    from dataclasses import MISSING, fields

    for item in fields(completed(request)):  # type: ignore[arg-type]  # a dataclass now
        hint: Any = item.type
        rules = tuple(_rules(hint))
        doc, word = "", item.name
        marks: set[Mark] = set()
        if get_origin(hint) is Annotated:
            hint, *extras = get_args(hint)
            marks.update(extra for extra in extras if isinstance(extra, Mark))
            doc = next((str(extra) for extra in extras if isinstance(extra, Doc)), "")
            word = next((str(extra) for extra in extras if isinstance(extra, Flag)), word)
        required = item.default is MISSING and item.default_factory is MISSING
        default = None if item.default is MISSING else item.default
        yield Parameter(item.name, word, hint, required, default, doc, frozenset(marks), rules)


def _rules(hint: Any) -> Iterator[Rule]:
    """The rules for a value of a type, or for one that is not None."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        yield from (part for part in parts if isinstance(part, Rule))
    if origin in (Annotated, Union, UnionType):
        for part in parts:
            yield from _rules(part)
