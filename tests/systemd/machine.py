"""The NixOS test driver's machine, over a `Container`: what a scenario may call, with the same meaning.

The reference is nixpkgs, nixos/lib/test-driver, class QemuMachine. It differs in that retries come every
0.1 s, not every second, and in that errors carry what the command printed, which the driver only logs.
"""

import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.systemd.container import Container

RETRY_INTERVAL = 0.1
TIMED_OUT = 124  # timeout(1)
CONNECT = """
import socket, sys
kind = socket.SOCK_DGRAM if sys.argv[2] == "datagram" else socket.SOCK_STREAM
socket.socket(socket.AF_UNIX, kind).connect(sys.argv[1])
"""


class MachineError(AssertionError):
    """What a scenario demanded of its machine did not come about."""


class Machine:
    """A machine to give orders to; it boots at the first. Commands run in bash, as root, in /tmp."""

    def __init__(self, container: Container) -> None:
        self.container = container
        self.name = container.name

    def start(self) -> None:
        """Boot, and wait until systemd has started everything; do nothing if it is up."""
        if not self.is_up():
            self.container.boot()

    def is_up(self) -> bool:
        """Whether it runs."""
        return self.container.booted

    def shutdown(self) -> None:
        """Power off in good order, and wait for it; do nothing if it is off."""
        if self.is_up():
            self.container.shutdown()

    def crash(self) -> None:
        """Cut the power; do nothing if it is off."""
        if self.is_up():
            self.container.crash()

    def execute(self, command: str, check_return: bool = True, timeout: int | None = 900) -> tuple[int, str]:
        """Run a command under `set -euo pipefail`; return its exit status and its standard output.

        It is over when everything that holds the output has closed it, or, with status 124, after `timeout`
        seconds. `check_return=False` gives -1 for a status. The driver's `check_output` is not here: for what outlives
        the call it is of no use there, since the output then comes in the place of the next command's.
        """
        status, output, _ = self._bash(command, timeout)
        return (status if check_return else -1), output

    def succeed(self, *commands: str, timeout: int | None = None) -> str:
        """Run commands in turn and return their output. Raises MachineError at the first that fails."""
        return "".join(self._expect(command, timeout, success=True) for command in commands)

    def fail(self, *commands: str, timeout: int | None = None) -> str:
        """Like `succeed`, but each has to fail."""
        return "".join(self._expect(command, timeout, success=False) for command in commands)

    def wait_until_succeeds(self, command: str, timeout: int = 300) -> str:
        """Repeat a command until it succeeds, and return its output. Raises MachineError after `timeout`."""
        return self._repeat(command, timeout, success=True)

    def wait_until_fails(self, command: str, timeout: int = 300) -> str:
        """Like `wait_until_succeeds`, until it fails."""
        return self._repeat(command, timeout, success=False)

    def systemctl(self, q: str, user: str | None = None) -> tuple[int, str]:
        """Run `systemctl` with `q`, which is shell text; as `user` and for that user's manager, if given."""
        status, output, _ = self._bash(f"systemctl {'--user ' if user else ''}{q}", 900, user)
        return status, output

    def get_unit_property(self, unit: str, property: str, user: str | None = None) -> str:
        """One property of a unit. Raises MachineError if there is none of that name."""
        name, found, value = self._show(f'"{unit}" --property="{property}"', user).strip("\n").partition("=")
        if not found or name != property:
            raise MachineError(f"{self.name}: unit {unit} has no property {property}")
        return value

    def require_unit_state(self, unit: str, require_state: str = "active") -> None:
        """Raises MachineError unless a unit is in that state now."""
        state = self.get_unit_property(unit, "ActiveState")
        if state != require_state:
            raise MachineError(f"{self.name}: unit {unit} is {state}, not {require_state}{self._unit_log(unit)}")

    def wait_for_unit(self, unit: str, user: str | None = None, timeout: int = 300) -> None:
        """Wait for a unit to be active. Raises MachineError if it has failed, or is inactive for good."""

        def is_active() -> bool:
            state = self.get_unit_property(unit, "ActiveState", user)
            if state == "inactive" and "No jobs" in self.systemctl("list-jobs --full 2>&1", user)[1]:
                state = self.get_unit_property(unit, "ActiveState", user)
                if state == "inactive":
                    raise MachineError(f"{self.name}: unit {unit} is inactive and there are no jobs for it")
            if state == "failed":
                raise MachineError(f"{self.name}: unit {unit} has failed{self._unit_log(unit)}")
            return state == "active"

        self._retry(is_active, timeout, f"unit {unit} to be active")

    def wait_for_file(self, filename: str, timeout: int = 300) -> None:
        """Wait until something exists at a path, which is shell text."""
        self._retry(lambda: self.execute(f"test -e {filename}")[0] == 0, timeout, f"file {filename}")

    def wait_for_open_unix_socket(self, addr: str, is_datagram: bool = False, timeout: int = 300) -> None:
        """Wait until a socket accepts a connection, which starts a service that systemd has waiting on it."""
        script = ["python3", "-I", "-c", CONNECT, addr, "datagram" if is_datagram else "stream"]
        command = f"{shlex.join(script)} 2>/dev/null"
        self._retry(lambda: self.execute(command)[0] == 0, timeout, f"a listener on {addr}")

    def copy_from_host(self, source: str, target: str) -> None:
        """Copy a file or directory into the machine as `cp -r` does, owned by root; make its parent."""
        path = Path(source).resolve()
        pack = ["tar", "--create", "--owner=0", "--group=0", "--numeric-owner", f"--directory={path.parent}"]
        packed = subprocess.run([*pack, path.name], stdout=subprocess.PIPE, check=True).stdout
        unpack = (
            'unpacked=$(mktemp -d); trap \'rm -r "$unpacked"\' EXIT; cd "$unpacked"; tar --extract; '
            f"{shlex.join(['mkdir', '-p', str(Path(target).parent)])}; "
            f"{shlex.join(['cp', '-r', f'./{path.name}', target])}"
        )
        status, _, errors = self._bash(unpack, 900, input=packed)
        if status != 0:
            raise MachineError(f"{self.name}: cannot copy {source} to {target}: {errors.strip()}")

    def sleep(self, secs: int) -> None:
        self.succeed(f"sleep {secs}")

    def log(self, msg: str) -> None:
        print(f"{self.name}: {msg}", flush=True)

    def _bash(
        self, command: str, timeout: int | None, user: str | None = None, input: bytes = b""
    ) -> tuple[int, str, str]:
        """Exit status, standard output and standard error of a command."""
        self.start()
        script = ["bash", "-c", f"cd /tmp; set -euo pipefail; {command}"]
        try:
            done = self.container.run(script, input=input, timeout=timeout, user=user)
        except subprocess.TimeoutExpired as expired:
            output, errors = ((part or b"").decode(errors="replace") for part in (expired.output, expired.stderr))
            return TIMED_OUT, output, f"{errors}(killed after {timeout} s)"
        return done.returncode, done.stdout, done.stderr

    def _expect(self, command: str, timeout: int | None, *, success: bool) -> str:
        status, output, errors = self._bash(command, timeout)
        if (status == 0) != success:
            raise MachineError(self._account(command, status, output, errors))
        return output

    def _repeat(self, command: str, timeout: int, *, success: bool) -> str:
        last: tuple[int, str, str] = (-1, "", "")

        def is_so() -> bool:
            nonlocal last
            last = self._bash(command, timeout)
            return (last[0] == 0) == success

        try:
            self._retry(is_so, timeout, f"`{command}` to {'succeed' if success else 'fail'}")
        except MachineError as error:
            raise MachineError(f"{error}\nlast, {self._account(command, *last)}") from None
        return last[1]

    def _retry(self, is_so: Callable[[], bool], timeout: int, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not is_so():
            if time.monotonic() > deadline:
                raise MachineError(f"{self.name}: waited {timeout} s in vain for {what}")
            time.sleep(RETRY_INTERVAL)

    def _show(self, arguments: str, user: str | None) -> str:
        status, output = self.systemctl(f"--no-pager show {arguments}", user)
        if status != 0:
            raise MachineError(f"{self.name}: systemctl show {arguments} failed with exit status {status}")
        return output

    def _unit_log(self, unit: str) -> str:
        return "\n" + self.execute(f'systemctl --no-pager --full status "{unit}" 2>&1 || true')[1]

    def _account(self, command: str, status: int, output: str, errors: str) -> str:
        parts = [f"{self.name}: `{command}` ended with exit status {status}"]
        printed = {"output": output.rstrip(), "errors": errors.rstrip()}
        parts += [f"{title}:\n{text}" for title, text in printed.items() if text]
        return "\n".join(parts)
