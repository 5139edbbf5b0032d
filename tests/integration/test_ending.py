"""A service that is told to end while a request takes longer than it may."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from tests import PROJECT
from tests.integration.conftest import NewHost
from tests.integration.embedded_host import read_reply

HASTY = Path(__file__).with_name("hasty_service.py")
NEVER_READY = "[Service]\nType=notify\nExecStart=/bin/sleep 600\nTimeoutStartSec=60\n"


def test_a_request_that_takes_too_long_at_the_end_is_given_up_and_its_outcome_found_out_later(
    new_host: NewHost,
) -> None:
    host = new_host({})
    unit = (PROJECT / "units/circleosd-registry.service").read_text()
    unit = unit.replace("ExecStart=circleosd ", f"ExecStart={sys.executable} {HASTY} ")
    (host.units / "circleosd-registry.service").write_text(unit)
    host.add_service("slow", NEVER_READY)
    pid = host.pid("service-registry")
    with host.connect("service-registry") as idle, host.connect("service-registry", 10) as sock:
        idle.sendall(b'{"action":"health"}\n')
        assert read_reply(idle)["ok"]
        sock.sendall(b'{"action":"start","name":"slow"}\n')
        host.wait_for(lambda: host.data("service-registry", "status", name="slow")["state"] == "activating")
        os.kill(pid, signal.SIGTERM)
        reply = read_reply(sock)
    assert reply["error"] == "unavailable"
    assert "ended before this was done" in reply["message"]
    host.wait_for(lambda: pid not in host.processes())
    rows = json.loads(host.ok("system", "history", "--object", "slow", "--json"))
    assert [(row["phase"], row["intent"]) for row in rows] == [("intent", None), ("outcome", rows[0]["seq"])]
    assert "at its next start the unit slow.service is activating" in rows[1]["message"]
    assert "SIGKILL" not in host.log
    assert host.data("service-registry", "status", name="service-registry")["restarts"] == 0
