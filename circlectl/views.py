"""How the reply of each command is shown; commands not listed here are shown according to the type of the reply."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, get_args

from circlectl import render
from circlectl.commands import Command
from circleosd.steering import word


def of(command: Command, data: Any, *, room: int | None = None) -> str | None:
    """The text to print for a reply; None for nothing.

    `room` is the number of columns of a terminal, for which tables are made narrower and control characters visible.
    """
    if special := _SPECIAL.get((command.group, command.verb)):
        return special(data)
    if isinstance(data, str):
        return data if room is None else render.printable(data, keep="\t\n")
    if isinstance(data, list):
        row_type = get_args(command.contract.reply)[0]
        hidden = _HIDDEN.get((command.group, command.verb), ())
        return render.table(data, [name for name in row_type.__annotations__ if name not in hidden], room)
    return None if data is None else render.fields(data)


def _login(data: dict[str, Any]) -> str:
    until = render.value("expires", data["expires"])
    return f"logged in as {data['user']} ({data['role']}) until {until} at the latest"


def _job(data: dict[str, Any]) -> str:
    return f"{data['name']}: {data['state']} ({data['sub']})"


def _status(rows: list[dict[str, Any]]) -> str:
    return render.table(rows, ("service", "state", "version", "pid", "uptime", "memory", "requests"))


def _history(data: Any) -> str:
    """One line per act: an intent is shown only if its outcome is unknown. A single row comes from following."""
    if isinstance(data, dict):
        return "  ".join(render.value("", value) for value in _act(data).values())
    if data and "problems" in data[0]:
        return _audit(data)
    ended = {(row["service"], row["intent"]) for row in data if row["intent"]}
    shown = [_act(row) for row in data if row["phase"] != "intent" or (row["service"], row["seq"]) not in ended]
    return render.table(shown, ("time", "who", "service", "action", "object", "outcome", "change_or_reason"))


def _act(row: dict[str, Any]) -> dict[str, Any]:
    actor = row["actor"]
    who = f"plugin {actor['plugin']}" if actor.get("plugin") else actor["user"] or "-"
    caller = row["params"].get("called_by") if actor.get("plugin") else None
    outcome = row["error"] or ("done" if row["phase"] == "outcome" else row["phase"])
    return {
        "time": render.value("time", row["time"]),
        "who": f"{who}/{actor['uid']}" + (f", called by {caller}" if caller else ""),
        "service": row["service"],
        "action": row["action"],
        "object": render.value("", row["object"] and word(row["object"])),
        "outcome": f"{outcome} ×{row['count']}" if row["count"] > 1 else outcome,
        "change_or_reason": "; ".join(filter(None, (_change(row["before"], row["after"]), row["message"]))) or "-",
    }


def _audit(data: list[dict[str, Any]]) -> str:
    rows = [{**item, "state": "; ".join(item["problems"]) or "intact"} for item in data]
    return render.table(rows, ("service", "rows", "first", "last", "state", "hash"))


def _rule(rule: dict[str, Any]) -> str:
    return f"{'deny' if rule['deny'] else 'allow'} {rule['verb']} {rule['object']}"


def _who(data: dict[str, Any]) -> str:
    """A user or an identity, whose rules are in `rules` or `grants`."""
    return render.fields(
        {key: [*map(_rule, item)] if key in ("rules", "grants") else item for key, item in data.items()}
    )


def _rules(data: list[dict[str, Any]]) -> str:
    return "\n".join(map(_rule, data)) or "no rules"


def _answer(data: dict[str, Any]) -> str:
    return render.printable(f"{'yes' if data['allowed'] else 'no'}: {data['why']}")


def _change(before: Any, after: Any) -> str:
    if before is None and after is None:
        return ""
    return f"{_state(before)} → {_state(after)}"


def _state(state: Any) -> str:
    """A state before or after an act. Digests are cut, as they would hide the rest; --json prints them in full."""
    if isinstance(state, dict):
        state = {name: f"{item[:12]}…" if name.endswith("digest") else item for name, item in state.items()}
    return render.value("", state)


def _timed(data: list[dict[str, Any]] | dict[str, Any], text: Callable[[dict[str, Any]], str]) -> str | None:
    """A line for each row, starting with its time; a single row is part of a stream."""
    rows = data if isinstance(data, list) else [data]
    return "\n".join(f"{render.value('time', row['time'])}  {text(row)}" for row in rows) or None


def _log(lines: list[dict[str, Any]] | dict[str, Any]) -> str | None:
    return _timed(lines, lambda row: render.printable(row["text"], keep="\t"))


def _change_of_state(row: dict[str, Any]) -> str:
    now = time.strftime("%H:%M:%S")
    return f"{now}  {row['name']}: {row['state']} ({row['sub']})"


def _plugin(data: dict[str, Any]) -> str:
    """What a plugin is and what it may do."""
    signed = f"signed by {data['signer']}" if data["signer"] else "not signed by a trusted signer"
    state = "" if data["state"] == "ready" else f", {data['state']}"
    lines = [f"{data['id']} {data['version']}: {data['abi']}, {signed}{state}"]
    lines.append(f"  functions: {render.value('', data['functions'])}")
    return "\n".join([*map(render.printable, lines), *_capabilities(data["capabilities"])])


def _capabilities(asked: list[dict[str, Any]]) -> list[str]:
    width = max((len(item["name"]) for item in asked), default=0)
    return [
        f"  {render.printable(item['name']):<{width}}  {'granted' if item['granted'] else 'not granted'}"
        + (f": {render.printable(item['reason'])}" if item["reason"] else "")
        for item in asked
    ]


def _details(data: dict[str, Any]) -> str:
    rest = {name: item for name, item in data.items() if item is not None and name not in ("capabilities", "limits")}
    limits = {name: render.value(_LIMITS.get(name, ""), item) for name, item in data["limits"].items()}
    shown = render.fields({**rest, "limits": limits})
    return "\n".join([shown, "capabilities:", *(_capabilities(data["capabilities"]) or ["  none requested"])])


def _verified(data: dict[str, Any]) -> str:
    line = f"{data['name']} {data['version']}: good signature by {data['signer']} with {data['key']}"
    asked = [f"  asks for {item['name']}: {item['reason']}".rstrip(": ") for item in data["capabilities"]]
    return "\n".join(map(render.printable, [line, *asked]))


def _signed(data: dict[str, Any]) -> str:
    return render.printable(f"signed {data['manifest']}; the signature is {data['signature']}")


def _events(data: list[dict[str, Any]] | dict[str, Any]) -> str | None:
    return _timed(data, lambda row: f"{row['plugin']}  {row['topic']}: {render.printable(row['payload'])}")


_LIMITS = {"memory": "size", "output": "size", "storage": "size", "time": "duration"}  # what is shown as what
_SPECIAL: dict[tuple[str, str], Callable[[Any], str | None]] = {
    ("user", "login"): _login,
    ("user", "whoami"): _who,
    ("user", "show"): _who,
    ("user", "delete"): lambda data: f"deleted {data['name']}",
    ("user", "grant"): _rules,
    ("user", "ungrant"): _rules,
    ("user", "can"): _answer,
    ("service", "start"): _job,
    ("service", "stop"): _job,
    ("service", "restart"): _job,
    ("service", "reload"): _job,
    ("service", "logs"): _log,
    ("service", "watch"): _change_of_state,
    ("plugin", "load"): _plugin,
    ("plugin", "show"): _details,
    ("plugin", "grant"): _plugin,
    ("plugin", "revoke"): _plugin,
    ("plugin", "enable"): _plugin,
    ("plugin", "disable"): _plugin,
    ("plugin", "unload"): lambda data: render.printable(f"unloaded {data['id']} {data['version']}"),
    ("plugin", "verify"): _verified,
    ("plugin", "sign"): _signed,
    ("plugin", "events"): _events,
    ("system", "status"): _status,
    ("system", "history"): _history,
}
_HIDDEN = {("plugin", "list"): ("digest", "manifest_digest", "capabilities", "plugin_type", "loaded")}
