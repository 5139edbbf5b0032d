"""What a worker gives up before it runs plugin code, as the kernel has it."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest

from tests import PROJECT
from tests.component_text import component
from tests.core_text import core
from tests.native_source import native
from tests.waiting import SECONDS
from tests.wasi_text import ECHO, command
from tests.worker_driver import start

DUMPABLE = """
#include <sys/prctl.h>
HANDLER(dumpable) { UNUSED; SAY("%d", prctl(PR_GET_DUMPABLE)); return 0; }
"""
_LANDLOCK_CREATE_RULESET, _LANDLOCK_VERSION = 444, 1
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2


def offered() -> list[str]:
    """What this kernel offers to a process that confines itself, found out without confining this one."""
    libc = ctypes.CDLL(None, use_errno=True)
    walls = []
    version = libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_LANDLOCK_VERSION))
    if version > 0:
        walls.append(f"landlock-{version}")
    libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, None, 0, 0)  # takes filters, but this is none
    if ctypes.get_errno() == errno.EFAULT and platform.machine() in ("x86_64", "aarch64"):
        walls.append("seccomp")
    return walls


@pytest.mark.parametrize(
    ("kind", "artifact"),
    [("native", lambda: native(DUMPABLE, "dumpable")), ("wasm", core), ("wasm", lambda: command(ECHO)),
     ("wasm", component)],
    ids=["native", "core", "wasi", "component"],
)  # fmt: skip
def test_a_worker_has_every_wall_that_the_kernel_offers_and_no_privileges(
    kind: str, artifact: Callable[[], bytes]
) -> None:
    with start(artifact(), plugin_type=kind, memory=64 << 20) as worker:
        assert worker.ready().sandbox == offered()
        status = worker.status()
        assert status["Seccomp"] == "2" or "seccomp" not in offered()
        assert status["NoNewPrivs"] == "1"
        for capabilities in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(status[capabilities], 16) == 0
        for nothing in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_SIGPENDING):
            assert resource.prlimit(worker.process.pid, nothing) == (0, 0)
        soft, hard = resource.prlimit(worker.process.pid, resource.RLIMIT_DATA)
        assert 64 << 20 < soft == hard < 4 << 30  # also where many CPUs mean many threads
        if kind == "native":
            assert worker.invoke("dumpable") == "0"


# As on a machine whose calls have numbers that the filter does not know.
WITHOUT_SECCOMP = """
    import errno, os, socket, sys
    from types import SimpleNamespace
    from circleosd.worker import limits, sandbox
    port, hidden = int(sys.argv[1]), "\\0" + sys.argv[2]
    limits.settle()
    os.uname = lambda: SimpleNamespace(machine="m68k")
    assert "seccomp" not in sandbox.confine()

    def connect(family, address):
        with socket.socket(family) as sock:
            sock.connect(address)

    for act in (
        lambda: connect(socket.AF_INET, ("127.0.0.1", port)),
        lambda: socket.create_server(("127.0.0.1", 0)),
        lambda: connect(socket.AF_UNIX, hidden),
        lambda: os.kill(os.getppid(), 0),
        lambda: open("/etc/passwd"),
        lambda: os.kill(os.getpid(), 0),
    ):
        try:
            act()
            print("done")
        except OSError as exc:
            print(errno.errorcode[exc.errno])
"""


def test_landlock_is_a_wall_of_its_own() -> None:
    walls = offered()
    version = int(walls[0].removeprefix("landlock-")) if walls and walls[0] != "seccomp" else 0
    if version < 6:
        pytest.skip(f"this kernel's Landlock knows no scopes: {walls}")
    name = f"circleosd-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as hidden:
        hidden.bind(f"\0{name}")
        hidden.listen()
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(WITHOUT_SECCOMP), str(server.getsockname()[1]), name],
            cwd=PROJECT, capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
    assert done.stdout.split() == ["EACCES", "EACCES", "EPERM", "EPERM", "EACCES", "done"], done.stderr
