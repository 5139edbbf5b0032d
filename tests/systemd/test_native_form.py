"""What only a real systemd can show: idle exits under load, cold starts, the cost of a start."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from tests.measuring import once_it_holds
from tests.systemd.installed import write
from tests.systemd.machine import Machine

BARE_UNIT = """\
[Unit]
StartLimitIntervalSec=0
[Service]
ExecStart=/usr/bin/python3 /opt/test/bare.py
"""
CLIENT = """
import json, random, socket, sys, time
pauses = random.Random(int(sys.argv[1]))
sent = lost = 0
pids = set()
begun = time.monotonic()
# Longer than that where the machine is so busy that this would show nothing.
while (passed := time.monotonic() - begun) < 20 or ((sent <= 20 or len(pids) <= 5) and passed < 200):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect("/run/circleosd/auth-service.sock")
        sock.sendall(b'{"action":"health"}\\n')
        with sock.makefile() as replies:
            reply = replies.readline()
    sent += 1
    try:
        pids.add(json.loads(reply)["data"]["pid"])
    except (ValueError, TypeError):
        lost += 1
    time.sleep(pauses.uniform(0.05, 0.5))
print(json.dumps({"sent": sent, "lost": lost, "pids": len(pids)}))
"""
BARE = """
import asyncio, os, socket
async def main():
    async def answer(reader, writer):
        await reader.readline()
        writer.write(b'{"ok":true,"message":null,"data":{"pid":%d}}\\n' % os.getpid())
        await writer.drain()
        writer.close()
    await asyncio.start_unix_server(answer, sock=socket.socket(fileno=3))
    await asyncio.sleep(3600)
asyncio.run(main())
"""
COLD = """
import json, os, signal, socket, statistics, subprocess, time
def once(path, unit):
    begun = time.perf_counter()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        sock.sendall(b'{"action":"health"}\\n')
        with sock.makefile() as replies:
            reply = json.loads(replies.readline())
    took = time.perf_counter() - begun
    assert reply["ok"], reply
    subprocess.run(["systemctl", "stop", unit], check=True, stderr=subprocess.DEVNULL)
    return took
servers = {
    "bare": ("/run/bare.sock", "bare.service"),
    "hardened": ("/run/hardened.sock", "hardened.service"),
    "ours": ("/run/circleosd/auth-service.sock", "circleosd-auth.service"),
}
times = {name: [] for name in servers}
for _ in range(12):
    for name, server in servers.items():
        times[name].append(once(*server))
print(json.dumps({name: statistics.median(took) for name, took in times.items()}))
"""
STARTS = """
import json, socket, statistics, subprocess, sys, time
sys.path.insert(0, sys.argv[1])
from circleosd import client
def timed(call):
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
REGISTRY = "/run/circleosd/service-registry.sock"
def registry(action):
    return lambda: next(client.call(REGISTRY, {"action": action, "name": "idler"}, timeout=60))
def systemctl(verb, user=None):
    return lambda: subprocess.run(["systemctl", verb, "idler.service"], check=True, user=user)
registry("status")()
figures = {"ours": [], "systemctl": [], "systemctl with our rights": []}
for _ in range(50):
    figures["ours"].append(timed(registry("start")))
    registry("stop")()
    figures["systemctl"].append(timed(systemctl("start")))
    systemctl("stop")()
    figures["systemctl with our rights"].append(timed(systemctl("start", user="circleosd-registry")))
    systemctl("stop")()
print(json.dumps({name: statistics.median(times) for name, times in figures.items()}))
"""


def reach(machine: Machine, command: str, goals: Mapping[str, float]) -> None:
    """Measure until ours took at most so many times what each of the others did in the same run."""
    missed = set(goals)

    def measure() -> dict[str, float]:
        figures: dict[str, float] = json.loads(machine.succeed(command))
        print(figures)
        missed.difference_update({name for name in goals if figures["ours"] <= goals[name] * figures[name]})
        return figures

    once_it_holds(measure, lambda figures: not missed, tries=12)


@pytest.fixture(scope="module")
def machine(installed: Machine) -> Machine:
    for name, text in {"client": CLIENT, "bare": BARE, "cold": COLD, "starts": STARTS}.items():
        write(installed, f"/opt/test/{name}.py", text)
    return installed


def test_two_clients_meet_idle_exits_for_twenty_seconds_and_lose_no_request(machine: Machine) -> None:
    write(machine, "/etc/circleosd/config.toml", "[server]\nidle_exit = 0.2\n")
    machine.succeed("systemctl stop circleosd-auth.service")
    first, second = "python3 /opt/test/client.py 1", "python3 /opt/test/client.py 2"
    lines = machine.succeed(f"{first} >/tmp/one & {second} >/tmp/two & wait; cat /tmp/one /tmp/two").splitlines()
    figures = [json.loads(line) for line in lines]
    print(figures)
    assert [figure["lost"] for figure in figures] == [0, 0]
    assert all(figure["sent"] > 20 for figure in figures)
    assert max(figure["pids"] for figure in figures) > 5, "the service did not exit in between, so this shows nothing"


def test_a_service_that_cannot_start_says_so_to_who_asks_and_is_not_started_over_and_over(machine: Machine) -> None:
    write(machine, "/etc/circleosd/config.toml", "[server]\nidle_exti = 5\n")
    machine.succeed("systemctl stop circleosd-auth.service")
    for _ in range(25):  # more than TriggerLimitBurst=
        status, said = machine.execute("circlectl user list 2>&1")
        assert (status, "cannot start: no such setting: server.idle_exti" in said) == (12, True), said
    machine.wait_until_succeeds("systemctl is-failed circleosd-auth.service")
    assert machine.get_unit_property("circleosd-auth.service", "NRestarts") == "0"
    assert machine.get_unit_property("circleosd-auth.socket", "ActiveState") == "active"
    write(machine, "/etc/circleosd/config.toml", "# nothing is set\n")
    machine.succeed("circlectl user list")


@pytest.mark.alone
def test_a_cold_start_takes_little_longer_than_that_of_a_bare_asyncio_server(machine: Machine) -> None:
    """`bare` is not hardened, `hardened` is the same server with the sandbox of auth-service."""
    write(machine, "/etc/circleosd/config.toml", "# nothing is set\n")
    for name in ("bare", "hardened"):
        write(machine, f"/etc/systemd/system/{name}.socket", f"[Socket]\nListenStream=/run/{name}.sock\n")
        write(machine, f"/etc/systemd/system/{name}.service", BARE_UNIT)
    dropins = "/etc/systemd/system/hardened.service.d"
    machine.succeed(f"cp -r /usr/lib/systemd/system/circleosd-auth.service.d {dropins}")
    machine.succeed("systemctl daemon-reload && systemctl start bare.socket hardened.socket")
    machine.succeed("systemctl stop circleosd-auth.service")
    # 1.2 and 1.4 to 1.8 where nothing else runs; more than that comes from imports or sandboxing that somebody added.
    reach(machine, "python3 /opt/test/cold.py", {"hardened": 1.5, "bare": 2})


@pytest.mark.alone
def test_a_start_through_the_registry_is_no_slower_than_by_systemctl_with_the_same_rights(machine: Machine) -> None:
    """systemd asks polkit about what is not root. Root is spared that, and about a fifth of the time."""
    write(machine, "/etc/circleosd/services.d/idler.toml", '[[service]]\nname = "idler"\nunit = "idler.service"\n')
    write(machine, "/etc/systemd/system/idler.service", "[Service]\nType=exec\nExecStart=/bin/sleep 600\n")
    machine.succeed("systemctl daemon-reload")
    machine.wait_until_succeeds("grep -q idler.service /etc/polkit-1/rules.d/49-circleosd.rules")
    site = machine.succeed("ls -d /usr/lib/circleosd/lib/python3*/site-packages").strip()
    reach(machine, f"python3 /opt/test/starts.py {site}", {"systemctl with our rights": 1.1, "systemctl": 1.25})
