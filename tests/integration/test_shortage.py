"""A process that may have no more threads, memory or descriptors: who asks is told, and afterwards it goes on."""

from __future__ import annotations

import contextlib
import json
import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from circleosd.paths import SERVICES
from tests.core_text import core
from tests.integration import made
from tests.integration.conftest import NewHost, running
from tests.integration.embedded_host import EmbeddedHost, read_reply

THREADS = "no more threads can be started in this service; try again later"
LARGE = 7 << 20  # bytes of a line


@contextlib.contextmanager
def bounded(pid: int, what: int, most: int) -> Iterator[None]:
    """A process meanwhile has no more than that."""
    soft, hard = resource.prlimit(pid, what)
    resource.prlimit(pid, what, (most, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, what, (soft, hard))


@contextlib.contextmanager
def no_memory(pid: int) -> Iterator[None]:
    """A process gets hardly any more memory, and so no stack for a thread, which takes 8 MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    with bounded(pid, resource.RLIMIT_AS, pages * os.sysconf("SC_PAGE_SIZE") + (1 << 20)):
        yield


@pytest.fixture(scope="module")
def threadless() -> Iterator[EmbeddedHost]:
    """A host whose processes may have less memory than a thread's stack would take."""
    yield from running({}, ("sh", "-c", 'ulimit -S -s 1048576 && ulimit -S -v 786432 && exec "$@"', "sh"))


@pytest.mark.parametrize("service", SERVICES)
def test_a_request_for_which_no_thread_can_be_started_is_told_so(host: EmbeddedHost, service: str) -> None:
    with no_memory(host.pid(service)):
        reply = host.call(service, {"action": "audit"})  # the first that needs a thread which is not there yet
        assert (reply["error"], reply["message"]) == ("limit", THREADS)
        assert host.call(service, {"action": "health"})["ok"]
    assert host.call(service, {"action": "audit"})["ok"]


@pytest.mark.parametrize("service", SERVICES)
def test_a_request_for_which_there_is_no_memory_to_import_what_validates_is_told_so(
    new_host: NewHost, service: str
) -> None:
    host = new_host({})
    request = {"action": "history", "lines": 1}  # the first that is to be validated
    with no_memory(host.pid(service)):
        reply = host.call(service, request)
        assert (reply["error"], reply["message"].endswith(" in this service; try again later")) == ("limit", True)
        assert host.call(service, {"action": "health"})["ok"]
    assert host.call(service, request)["ok"]


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_that_can_start_no_thread_says_so(threadless: EmbeddedHost, service: str) -> None:
    reply = threadless.call(service, {"action": "health"})
    assert reply["error"] == "unavailable"
    why = f"{service} cannot start: no more threads can be started"
    assert reply["message"].startswith(why)
    threadless.wait_for(lambda: f": circleosd: {why}" in threadless.log)  # and no traceback


def test_what_the_machine_lacks_for_a_worker_is_told_and_is_no_failure_of_its_plugin(
    new_host: NewHost, tmp_path: Path
) -> None:
    host = new_host({"CIRCLEOSD_PLUGINS_BACK_OFF_AFTER": "1", "CIRCLEOSD_PLUGINS_QUARANTINE_AFTER": "2"})
    assert host.process is not None
    artifact = made.write(tmp_path, "echo", core())
    with bounded(host.process.pid, resource.RLIMIT_SIGPENDING, 0):  # what it starts can make no timer
        refused = host.call("plugin-manager", {"action": "load", "path": str(artifact)})
    why = "echo cannot be loaded: its worker cannot continue: [Errno 11] cannot make a timer"
    assert (refused["error"], refused["message"]) == ("unavailable", why)
    host.load(artifact)
    host.data("service-registry", "stop", name="plugin@echo")
    with bounded(host.process.pid, resource.RLIMIT_SIGPENDING, 0):
        for _ in range(3):
            reply = host.invoke("echo", "echo", "hello")
            assert (reply["error"], reply["message"]) == ("unavailable", why)
    assert host.invoke("echo", "echo", "hello")["data"] == "hello"
    shown = host.data("plugin-manager", "show", id="echo")
    assert (shown["failures"], shown["state"]) == (0, "ready")


def test_a_worker_that_ends_before_it_is_connected_is_no_failure_of_its_plugin(
    new_host: NewHost, tmp_path: Path
) -> None:
    host = new_host({"CIRCLEOSD_PLUGINS_LOAD_TIME": "5", "CIRCLEOSD_PLUGINS_BACK_OFF_AFTER": "1"})
    artifact = made.write(tmp_path, "echo", core())
    host.load(artifact)
    host.data("service-registry", "stop", name="plugin@echo")
    unit = host.units / "circleosd-plugin@.service"
    unit.write_text("[Service]\nExecStart=/bin/false\n")
    why = "the worker of echo did not start within 5 s; see: circlectl service logs plugin@echo"
    load = {"action": "load", "path": str(artifact)}
    with ThreadPoolExecutor(2) as both:
        tries = [both.submit(host.invoke, "echo", "echo", "hello"), both.submit(host.call, "plugin-manager", load)]
    for reply in (each.result() for each in tries):
        assert (reply["error"], reply["message"].replace(".staged", "")) == ("unavailable", why)
    unit.unlink()
    assert host.invoke("echo", "echo", "hello")["data"] == "hello"
    shown = host.data("plugin-manager", "show", id="echo")
    assert (shown["failures"], shown["state"]) == (0, "ready")


def test_a_line_for_which_there_is_no_memory_is_refused(host: EmbeddedHost) -> None:
    pid = host.pid("plugin-manager")
    request = json.dumps({"action": "invoke", "id": "absent", "func": "f", "payload": "x" * LARGE}).encode() + b"\n"
    with no_memory(pid), host.connect("plugin-manager") as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(request)
        reply = read_reply(sock)
        assert reply["error"] == "limit"
        assert "this service has no memory left for the line" in reply["message"]
    assert host.call("plugin-manager", request)["error"] == "not-found"
    assert host.pid("plugin-manager") == pid


def test_a_socket_goes_on_listening_when_its_service_cannot_be_started_nor_told_of(new_host: NewHost) -> None:
    host = new_host({})
    assert host.process is not None
    with (
        bounded(host.process.pid, resource.RLIMIT_NOFILE, 0),  # no process can be started
        no_memory(host.process.pid),  # no thread either
        host.connect("auth-service") as sock,
    ):
        sock.sendall(b'{"action":"health"}\n')
        host.wait_for(lambda: host.log.count("cannot run circleosd-auth.service") > 2)
    host.wait_for(lambda: host.call("auth-service", {"action": "health"})["ok"])  # it may still be told of


def test_who_could_not_be_told_for_want_of_a_thread_is_told_what_is_wrong_now(new_host: NewHost) -> None:
    """In the embedded mode."""
    host = new_host({})
    assert host.process is not None
    unit = host.units / "circleosd-auth.service"
    with contextlib.ExitStack() as stack:
        with no_memory(host.process.pid):
            unit.write_text("[Service]\nExecStart=/bin/true\nUser=first\n")
            sock = stack.enter_context(host.connect("auth-service"))
            sock.sendall(b'{"action":"health"}\n')
            host.wait_for(lambda: "User=first" in host.log)
            unit.write_text("[Service]\nExecStart=/bin/true\nUser=second\n")
            host.wait_for(lambda: "User=second" in host.log)
        assert "User=second" in read_reply(sock)["message"]
    unit.unlink()
    host.wait_for(lambda: host.call("auth-service", {"action": "health"})["ok"])
