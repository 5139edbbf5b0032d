"""What a start of a service does not wait for: libraries that only some requests need."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import NewHost
from tests.integration.embedded_host import EmbeddedHost

LATER = ("pydantic", "libcrypto", "argon2", "wasmtime")


@pytest.fixture(scope="module")
def with_plugin(host: EmbeddedHost) -> EmbeddedHost:
    host.load("plugins/example.wasm")
    host.data("auth-service", "create", name="alice", password="a long enough one")
    return host


@pytest.mark.parametrize("service", ["auth-service", "plugin-manager"])
def test_a_first_list_needs_no_library_for_other_requests(with_plugin: EmbeddedHost, service: str) -> None:
    pid = with_plugin.pid(service)
    os.kill(pid, signal.SIGKILL)
    with_plugin.wait_for(lambda: pid not in with_plugin.processes())
    assert with_plugin.data(service, "list")
    mapped = Path(f"/proc/{with_plugin.pid(service)}/maps").read_text()
    assert "_sqlite3" in mapped
    assert [name for name in LATER if name in mapped] == []


def test_the_embedded_mode_does_without_openssl(host: EmbeddedHost) -> None:
    assert host.process is not None
    mapped = Path(f"/proc/{host.process.pid}/maps").read_text()
    assert "_asyncio" in mapped
    assert "libcrypto" not in mapped


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python's own traceback module has dataclasses from 3.14 on")
def test_a_first_request_without_parameters_generates_no_dataclass(new_host: NewHost) -> None:
    host = new_host({"PYTHONPROFILEIMPORTTIME": "1"})
    assert host.data("auth-service", "health")
    assert host.data("auth-service", "whoami")
    host.stop()  # so that all is in the log
    prefix = "circleosd-auth: import time:"
    imported = {line.rpartition("|")[2].strip() for line in host.log.splitlines() if line.startswith(prefix)}
    assert "circleosd.auth.service" in imported
    assert "dataclasses" not in imported
