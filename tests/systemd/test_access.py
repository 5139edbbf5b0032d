"""Every action × every kind of caller on a booted systemd, with real Unix users, compared with docs/access.md."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from tests.access import Uids, Walk
from tests.door import Asked
from tests.systemd.conftest import PROJECT_INSIDE
from tests.systemd.machine import Machine

AT_ONCE = 100  # requests in one command, whose text has at most 128 KiB (MAX_ARG_STRLEN, execve(2))
DOOR = f"python3 {PROJECT_INSIDE}/tests/door.py /run/circleosd"


def test_every_action_allows_whom_the_table_says_and_nobody_else(installed: Machine) -> None:
    names = [f"walker{number}" for number in range(len(Uids._fields))]
    for name in names:
        installed.succeed(f"useradd --groups circleosd {name}")
    uids = Uids(*(int(installed.succeed(f"id -u {name}")) for name in names))

    def ask(requests: Sequence[Asked]) -> list[dict[str, Any]]:
        replies = []
        for start in range(0, len(requests), AT_ONCE):
            lines = "\n".join(map(json.dumps, requests[start : start + AT_ONCE]))
            replies += installed.succeed(f"{DOOR} <<<{shlex.quote(lines)}").splitlines()
        return [json.loads(reply) for reply in replies]

    assert Walk(ask, uids).disagreements() == []


def test_nobody_stays_out_of_the_record_by_the_name_of_a_control_group(installed: Machine) -> None:
    installed.succeed("useradd --groups circleosd hider")
    parent = installed.succeed("dirname $(ls -d /sys/fs/cgroup{/systemd,}/cgroup.procs | tail -1)").strip()
    group = f"{parent}/$'hidden\\377.service'"
    become = "setpriv --reuid hider --regid hider --init-groups"  # su(1) would move it to a login session's group
    attempt = f"{become} circlectl service stop plugin-manager"
    status, said = installed.execute(f"mkdir {group} && (echo $BASHPID >{group}/cgroup.procs; {attempt}) 2>&1")
    installed.succeed(f"rmdir {group}")
    assert (status, "needs the role operator" in said) == (4, True), said
    (row,) = json.loads(installed.succeed("circlectl system history --action stop --failed --json"))[-1:]
    assert (row["error"], row["actor"]["unit"]) == ("denied", "hidden\\xff.service")


def test_the_plugin_manager_may_do_to_services_what_workers_and_plugins_need_and_no_more(installed: Machine) -> None:
    become = (
        "setpriv --reuid circleosd-plugins --regid circleosd-plugins --groups $(getent group circleosd | cut -d: -f3)"
    )
    denied = 4
    allowed = ["list", "status nginx", "restart broken", "status plugin@x", "start plugin@x.socket", "stop plugin@x"]
    refused = [f"{verb} nginx" for verb in ("start", "stop", "reload", "enable", "disable", "logs")]
    found = {
        command: installed.execute(f"{become} circlectl service {command} 2>&1")[0] for command in allowed + refused
    }
    assert {command for command, status in found.items() if status != denied} == {*allowed}, found
    installed.succeed("circlectl service stop plugin@x.socket")
