"""Walks every action × every kind of caller over the sockets, and compares with docs/access.md.

It needs only a way to ask: a function from requests to replies, so that it runs in the embedded mode and on a booted
systemd alike (see `door.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from circleosd.api import actions
from circleosd.api.contract import Request, parameters
from circleosd.policy import Access
from tests import PROJECT
from tests.door import Asked

Ask = Callable[[Sequence[Asked]], list[dict[str, Any]]]

PASSWORD = "a long enough one"
ABSENT = "absent"  # begins the names of services and plugins that do not exist, and of a user who is in nobody's way

# What the walk sends where a contract alone does not say what would do no harm. Objects begin with `ABSENT`.
SAMPLES: dict[str, dict[str, Any]] = {
    "user:create": {"name": f"{ABSENT}_user", "password": PASSWORD, "role": "none"},
    "user:login": {"name": "walk_login", "password": PASSWORD},
    "user:role": {"name": f"{ABSENT}_user", "role": "none"},
    "user:uid": {"name": f"{ABSENT}_user", "uid": 60100},
    "user:grant": {"name": f"{ABSENT}_user", "verb": "service:stop", "object": f"{ABSENT}1"},
    "user:ungrant": {"name": f"{ABSENT}_user", "verb": "service:stop", "object": f"{ABSENT}1"},
    "user:passwd": {"name": f"{ABSENT}_user", "old": PASSWORD, "password": PASSWORD},
    "user:revoke": {"name": f"{ABSENT}_user", "session": "0" * 12},
    "user:can": {"name": f"{ABSENT}_user", "verb": "service:stop", "object": "x"},
    "plugin:load": {"path": f"/nonexistent/{ABSENT}.wasm"},
}


class Uids(NamedTuple):
    """Unix users to act as, all different and none of them root."""

    stranger: int = 60001
    viewer: int = 60002
    operator: int = 60003
    granted: int = 60004
    admin: int = 60005
    other: int = 60006


@dataclass(frozen=True)
class Subject:
    """A kind of caller: its column in the table, who connects, with which token, and as which user."""

    name: str
    column: str
    uid: int
    token: str | None = None
    user: str | None = None


class Cell(NamedTuple):
    """One thing to try: `own` when it is about the subject's own user."""

    verb: str
    subject: Subject
    asked: Asked
    own: bool
    ruled: bool


def table() -> dict[str, dict[str, str]]:
    """The cells of docs/access.md by action and column."""
    lines = (PROJECT / "docs/access.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    (_, *columns), _, *body = rows
    return {verb: dict(zip(columns, cells, strict=True)) for verb, *cells in body}


class Walk:
    """Users, sessions and rules for each kind of caller, and what each tries."""

    def __init__(self, ask: Ask, uids: Uids | None = None) -> None:
        self._ask = ask
        self._uids = uids or Uids()

    def _ok(self, uid: int, service: str, **request: Any) -> Any:
        (reply,) = self._ask([(uid, service, request)])
        assert reply["ok"], (request, reply)
        return reply["data"]

    def _user(self, name: str, role: str) -> None:
        self._ok(0, "auth-service", action="create", name=name, role=role, password=PASSWORD)

    def _login(self, name: str, uid: int, **more: float) -> str:
        login = self._ok(uid, "auth-service", action="login", name=name, password=PASSWORD, **more)
        return str(login["token"])

    def prepare(self) -> list[Subject]:
        """Make the kinds of callers. Every ledger has a row afterwards, so that following one has something to show."""
        uids = self._uids
        for role in ("viewer", "operator", "admin"):
            self._user(f"walk_{role}", role)
        self._user("walk_granted", "none")
        self._user("walk_login", "none")
        self._ok(0, "auth-service", action="grant", name="walk_granted", verb="*", object=f"{ABSENT}*")
        self._ask([
            (uids.stranger, "service-registry", {"action": "stop", "name": f"{ABSENT}1"}),
            (uids.stranger, "plugin-manager", {"action": "unload", "id": f"{ABSENT}1"}),
        ])  # fmt: skip
        expired = self._login("walk_admin", uids.other, lifetime=1)
        revoked = self._login("walk_admin", uids.other)
        self._ok(0, "auth-service", action="revoke", name="walk_admin", session=self._session(revoked, uids.other))
        viewer, operator = self._login("walk_viewer", uids.viewer), self._login("walk_operator", uids.operator)
        granted, admin = self._login("walk_granted", uids.granted), self._login("walk_admin", uids.admin)
        time.sleep(1.1)  # until the lifetime above is over
        return [
            Subject("stranger", "stranger", uids.stranger),
            Subject("viewer", "viewer", uids.viewer, viewer, "walk_viewer"),
            Subject("operator", "operator", uids.operator, operator, "walk_operator"),
            Subject("granted", "with a rule", uids.granted, granted, "walk_granted"),
            Subject("admin", "admin", uids.admin, admin, "walk_admin"),
            Subject("root", "root", 0),
            Subject("expired token", "invalid session", uids.other, expired, "walk_admin"),
            Subject("revoked token", "invalid session", uids.other, revoked, "walk_admin"),
            Subject("token of another uid", "invalid session", uids.other, admin, "walk_admin"),
        ]

    def _session(self, token: str, uid: int) -> str:
        return str(self._ok(uid, "auth-service", action="whoami", token=token)["session"])

    def cells(self, subjects: Sequence[Subject]) -> Iterator[Cell]:
        """Everything that each subject tries; ending its session comes last."""
        verbs = sorted(actions.BY_VERB, key=lambda verb: verb == "user:logout")
        for verb in verbs:
            contract = actions.BY_VERB[verb]
            for subject in subjects:
                yield self._cell(verb, subject, sample(verb))
                if contract.object_field is None:
                    continue
                oneself = {**sample(verb), contract.object_field: subject.user}
                if contract.own_object and subject.user:
                    yield self._cell(verb, subject, oneself, own=True)
                elif _is_never_ones_own(verb, contract) and subject.name in ("viewer", "operator", "granted"):
                    yield self._cell(verb, subject, oneself, own=True, ruled=False)
                if subject.name == "granted" and contract.takes_rules():
                    beside = {**sample(verb), contract.object_field: "beside"}
                    yield self._cell(verb, subject, beside, ruled=False)

    def _cell(
        self, verb: str, subject: Subject, parameters: dict[str, Any], *, own: bool = False, ruled: bool = True
    ) -> Cell:
        group, _, action = verb.partition(":")
        token = {"token": subject.token} if subject.token else {}
        request = {**parameters, "action": action, **token}
        return Cell(verb, subject, (subject.uid, actions.SERVICES[group], request), own, ruled)

    def disagreements(self) -> list[str]:
        """Where what happens is not what the table says; empty if they agree."""
        says, cells = table(), list(self.cells(self.prepare()))
        found = []
        for cell, reply in zip(cells, self._ask([cell.asked for cell in cells]), strict=True):
            entry = says[cell.verb][cell.subject.column]
            allowed = reply.get("error") != "denied"
            if allowed != self._allows(entry, cell):
                about = " about oneself" if cell.own else "" if cell.ruled else " about what no rule is about"
                found.append(f"{cell.verb} by {cell.subject.name}{about}: the table says {entry}, the reply is {reply}")
        return found

    @staticmethod
    def _allows(entry: str, cell: Cell) -> bool:
        if not cell.ruled:
            return False
        return entry in ("yes", "rows") or (entry == "own" and cell.own)


def _is_never_ones_own(verb: str, contract: type[Request]) -> bool:
    """Whether it is done to users, and being that user gives no right to it."""
    return verb.startswith("user:") and contract.access is Access.ADMIN and not contract.own_object


def sample(verb: str) -> dict[str, Any]:
    """Parameters for an action that leave everything as it is, or change only what is the walk's own."""
    if verb in SAMPLES:
        return dict(SAMPLES[verb])
    contract: type[Request] = actions.BY_VERB[verb]
    given: dict[str, Any] = {item.name: f"{ABSENT}1" for item in parameters(contract) if item.required}
    if contract.object_field:
        given[contract.object_field] = f"{ABSENT}_user" if verb.startswith("user:") else f"{ABSENT}1"
    return given
