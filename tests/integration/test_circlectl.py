"""circlectl as a person uses it, against running services."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest

from circlectl import sessions
from circleosd.paths import SERVICES
from tests import PROJECT
from tests.integration.conftest import NewHost
from tests.integration.embedded_host import BIN, EmbeddedHost
from tests.integration.people import PASSWORD, log_circlectl_in
from tests.waiting import SECONDS

TEXTS = [
    "None",
    "12345",
    "1e5",
    "2e9672320848",
    "[1,2]",
    '{"a":1}',
    "",
    "é漢🙂x" * 410,
    " padded ",
    "a\nb",
    "True",
    "-",
]


@pytest.fixture(scope="module", autouse=True)
def _plugin(host: EmbeddedHost) -> None:
    host.load("plugins/example.wasm")


@pytest.mark.parametrize("text", TEXTS)
def test_a_plugin_gets_the_text_that_was_typed(host: EmbeddedHost, text: str) -> None:
    assert host.ok("plugin", "invoke", "example", "handle", text).endswith(f": {text}\n")


@pytest.mark.parametrize("text", ["-5", "--help", "--json", "--", "-h", *TEXTS])
def test_a_plugin_gets_the_text_behind_two_dashes(host: EmbeddedHost, text: str) -> None:
    assert host.ok("plugin", "invoke", "example", "handle", "--", text).endswith(f": {text}\n")


def test_a_plugin_gets_the_text_on_standard_input(host: EmbeddedHost) -> None:
    invoke = ("plugin", "invoke", "example", "upper", "--payload-stdin")
    text = "longer than\nan argument\n" * 10_000
    assert len(text) > 1 << 17  # bytes, which one argument may have (execve(2))
    assert host.ok(*invoke, stdin=text) == text.upper() + "\n"
    assert host.ok(*invoke) == "\n"
    twice = host.ctl(*invoke, "text", stdin="text")
    assert (twice.returncode, twice.stderr.count("the payload is given twice")) == (2, 1)
    latin = subprocess.run(
        [BIN / "circlectl", *invoke], env=host.environment, input=b"gr\xf6\xdfer", capture_output=True, check=False
    )
    assert (latin.returncode, latin.stderr.count(b"is not UTF-8 text, from byte 2 on")) == (2, 1)
    endless = host.ctl(*invoke, stdin="x" * ((16 << 20) + 1))
    assert (endless.returncode, endless.stderr.count("has more than 16777216 bytes")) == (8, 1)


def test_the_text_is_four_kib() -> None:
    assert max(len(text.encode()) for text in TEXTS) > 4096


@pytest.mark.usefixtures("other_users")
def test_who_may_not_connect_is_not_told_to_start_what_runs(new_host: NewHost) -> None:
    host = new_host({})
    host.directory.chmod(0o755)
    done = subprocess.run(
        [BIN / "circlectl", "service", "list"],
        env=host.environment, user=65534, group=65534, extra_groups=[], capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 12
    said = "only its owner may; choose another CircleOSD with --scope [unavailable]\n"
    assert done.stderr.endswith(said), done.stderr


def test_help_stops_nothing(host: EmbeddedHost) -> None:
    host.add_service("keeper")
    host.ok("service", "start", "keeper")

    def status() -> dict[str, object]:
        return {**host.data("service-registry", "status", name="keeper"), "memory": None}  # it may just have begun

    before = status()
    for flag in ("--help", "-h"):
        assert "usage: circlectl service stop NAME" in host.ok("service", "stop", "keeper", flag)
        assert "usage:" in host.ok("service", flag, "stop", "keeper")
    assert status() == before


def test_names_are_texts_and_the_rule_quotes_them(host: EmbeddedHost) -> None:
    host.ok("user", "create", "None", "--password-stdin", stdin="long enough\n")
    assert "None" in {user["name"] for user in host.data("auth-service", "list")}
    done = host.ctl("user", "create", "12345", "--password-stdin", stdin="long enough\n")
    assert done.returncode == 2
    assert "'12345' is not a user name" in done.stderr
    taken = host.ctl("user", "create", "None", "--password-stdin", stdin="long enough\n")
    assert taken.returncode == 6
    assert "the user None already exists" in taken.stderr


def test_a_login_is_kept_used_and_ended(host: EmbeddedHost) -> None:
    host.ok("user", "create", "alice", "--role", "operator", "--password-stdin", stdin="correct horse\n")
    wrong = host.ctl("user", "login", "alice", "--password-stdin", stdin="battery staple\n")
    assert wrong.returncode == 4
    assert wrong.stderr == (
        "circlectl: wrong user name or password; an admin can set a new password: circlectl user passwd NAME [denied]\n"
    )
    said = host.ok("user", "login", "alice", "--password-stdin", stdin="correct horse\n")
    assert said.startswith("logged in as alice (operator) until ")
    assert said.endswith(" at the latest\n")  # it ends before that when it is not used
    (session,) = (Path(host.environment["XDG_STATE_HOME"]) / "circleosd/sessions").iterdir()
    assert session.stat().st_mode & 0o777 == 0o600
    identity = json.loads(host.ok("user", "whoami", "--json"))
    assert identity["user"] == "alice"
    assert identity["session"]
    assert "token" not in identity
    host.ok("user", "logout")
    assert not session.exists()
    assert json.loads(host.ok("user", "whoami", "--json"))["user"] is None
    again = host.ctl("user", "logout")
    assert again.returncode == 7


def test_a_login_counts_on_its_own_host_where_others_share_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for token, host in (("first", "one"), ("second", "two")):
        monkeypatch.setattr(os, "uname", lambda host=host: os.uname_result(("Linux", host, "6", "1", "x86_64")))
        assert sessions.load("/run/circleosd") is None
        sessions.save("/run/circleosd", {"user": "ada", "token": token, "expires": time.time() + 60})
        assert sessions.load("/run/circleosd") == token
    sessions.forget("/run/circleosd")
    (kept,) = (tmp_path / "circleosd/sessions").iterdir()
    assert json.loads(kept.read_text())["token"] == "first"


def test_a_token_that_is_no_session_is_refused_with_the_next_step(host: EmbeddedHost) -> None:
    session = log_circlectl_in(host, "bob")
    kept = json.loads(session.read_text())
    session.write_text(json.dumps({**kept, "token": "x" * 43}))
    done = host.ctl("service", "list")
    assert done.returncode == 4
    assert "log in again, or drop it: circlectl user logout" in done.stderr
    host.ok("user", "logout")
    assert not session.exists(), "a session that is gone at the service is gone here too"
    host.ok("service", "list")


def test_a_session_that_is_over_or_unknown_stands_in_nobodys_way(host: EmbeddedHost) -> None:
    session = log_circlectl_in(host, "otto")
    kept = json.loads(session.read_text())
    session.write_text(json.dumps({**kept, "token": "x" * 43, "expires": time.time() - 1}))
    assert json.loads(host.ok("user", "whoami", "--json"))["user"] is None
    session.write_text(json.dumps({**kept, "token": "x" * 43}))
    host.ok("user", "login", "otto", "--password-stdin", stdin=f"{PASSWORD}\n")
    assert json.loads(host.ok("user", "whoami", "--json"))["user"] == "otto"
    host.ok("user", "logout")


def test_a_logout_from_a_session_that_is_over_does_what_was_asked(host: EmbeddedHost) -> None:
    session = log_circlectl_in(host, "ines")
    session.write_text(json.dumps({**json.loads(session.read_text()), "expires": time.time() - 1}))
    host.ok("user", "logout")
    assert not session.exists()
    assert host.ctl("user", "logout").returncode == 7


def test_a_session_of_another_uid_is_neither_sent_nor_forgotten(host: EmbeddedHost) -> None:
    session = log_circlectl_in(host, "nora")
    kept = json.loads(session.read_text())
    session.write_text(json.dumps({**kept, "uid": os.getuid() + 1}))  # as root finds it with the HOME of that user
    assert json.loads(host.ok("user", "whoami", "--json"))["user"] is None
    assert host.ctl("user", "logout").returncode == 7
    session.write_text(json.dumps(kept))
    assert json.loads(host.ok("user", "whoami", "--json"))["user"] == "nora"
    host.ok("user", "logout")


@pytest.mark.parametrize("content", [None, "[" * 10_000, '{"token": "x", "expires": null}', " " * 100_000])
def test_what_is_no_session_is_neither_waited_for_nor_sent(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    sessions.save("/run/circleosd", {"user": "ada", "token": "first", "expires": time.time() + 60})
    (kept,) = (tmp_path / "circleosd/sessions").iterdir()
    kept.unlink()
    if content is None:
        os.mkfifo(kept)
    else:
        kept.write_text(content)
    assert sessions.load("/run/circleosd") is None
    sessions.save("/run/circleosd", {"user": "ada", "token": "first", "expires": time.time() + 60})
    assert sessions.load("/run/circleosd") == "first"


def test_a_session_is_of_one_circleosd(host: EmbeddedHost, new_host: NewHost) -> None:
    other = new_host({"XDG_STATE_HOME": host.environment["XDG_STATE_HOME"]})
    log_circlectl_in(host, "olga")
    assert json.loads(other.ok("user", "whoami", "--json"))["user"] is None
    assert json.loads(host.ok("user", "whoami", "--json"))["user"] == "olga"
    host.ok("user", "logout")


def test_what_a_service_has_to_say_steers_no_terminal(host: EmbeddedHost) -> None:
    bad = host.catalog / "\x1b[31m.toml"
    bad.write_text("no catalog")
    done = host.ctl("service", "list")
    bad.unlink()
    assert r"/\x1b[31m.toml" in done.stderr
    assert "\x1b" not in done.stderr


def test_a_session_that_cannot_be_kept_is_ended(host: EmbeddedHost) -> None:
    host.ok("user", "create", "nina", "--password-stdin", stdin="correct horse\n")
    done = host.ctl(
        "user", "login", "nina", "--password-stdin", stdin="correct horse\n", env={"XDG_STATE_HOME": "/dev/null"}
    )
    assert done.returncode == 2
    assert done.stderr.startswith("circlectl: cannot save the session at /dev/null/circleosd")
    assert done.stderr.endswith("; set XDG_STATE_HOME to a writable directory [bad-request]\n")
    assert host.data("auth-service", "show", name="nina")["sessions"] == 0


def test_a_session_that_cannot_be_kept_is_told_by_the_name_that_it_would_have(
    host: EmbeddedHost, tmp_path: Path
) -> None:
    host.ok("user", "create", "norbert", "--password-stdin", stdin="correct horse\n")
    (tmp_path / "circleosd").mkdir()
    (tmp_path / "circleosd/sessions").symlink_to("/proc")
    done = host.ctl(
        "user", "login", "norbert", "--password-stdin", stdin="correct horse\n", env={"XDG_STATE_HOME": str(tmp_path)}
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"circlectl: cannot save the session at {tmp_path}/circleosd/sessions/")
    assert ".json: No such file or directory; " in done.stderr


def test_a_session_for_which_there_is_no_room_is_ended_and_leaves_nothing(host: EmbeddedHost, tmp_path: Path) -> None:
    host.ok("user", "create", "nils", "--password-stdin", stdin="correct horse\n")
    login = [str(BIN / "circlectl"), "user", "login", "nils", "--password-stdin"]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 0; exec "$@"', "-", *login],
        input="correct horse\n",
        env={**host.environment, "XDG_STATE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"cannot save the session at {tmp_path}/circleosd/sessions/" in done.stderr
    assert ".json: File too large; " in done.stderr
    assert [*(tmp_path / "circleosd/sessions").iterdir()] == []
    assert host.data("auth-service", "show", name="nils")["sessions"] == 0


def test_passwords_are_nowhere(host: EmbeddedHost) -> None:
    secret = "Tr0ub4dor&3-secret"
    token = json.loads(log_circlectl_in(host, "carol", password=secret).read_text())["token"]
    host.ok("user", "logout")
    for path in host.directory.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert secret.encode() not in content, path
            assert token.encode() not in content, path
    refused = host.ctl("user", "create", "dave", f"--password={secret}")
    assert refused.returncode == 2


def on_a_terminal(host: EmbeddedHost, *arguments: str) -> tuple[subprocess.Popen[bytes], int, int]:
    """circlectl on a terminal of its own, and both ends of that."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [BIN / "circlectl", *arguments], env=host.environment,
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True, close_fds=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    return process, master, slave


def test_a_password_is_asked_for_without_echo(host: EmbeddedHost) -> None:
    process, master, slave = on_a_terminal(host, "user", "create", "erin")
    os.close(slave)
    shown = b""
    for prompt in (b"Password: ", b"Password again: "):
        while not shown.endswith(prompt):
            assert select.select([master], [], [], 10)[0], shown
            shown += os.read(master, 1024)
        os.write(master, b"hidden password\n")
    while select.select([master], [], [], 10)[0]:
        try:
            shown += os.read(master, 1024)
        except OSError:  # the terminal is closed
            break
    assert process.wait(SECONDS) == 0, shown
    os.close(master)
    assert b"hidden" not in shown
    assert b"erin" in shown


def test_a_password_is_not_shown_that_is_typed_after_a_stop(host: EmbeddedHost) -> None:
    process, master, slave = on_a_terminal(host, "user", "login", "nobody")
    shown = b""
    for times in (1, 2):
        while shown.count(b"Password: ") < times:
            assert select.select([master], [], [], 10)[0], shown
            shown += os.read(master, 1024)
        modes = termios.tcgetattr(slave)
        assert not modes[3] & termios.ECHO
        if times == 1:  # as a shell has it while something else has the terminal
            modes[3] |= termios.ECHO
            termios.tcsetattr(slave, termios.TCSANOW, modes)
            process.send_signal(signal.SIGCONT)
    os.write(master, b"hidden password\n")
    assert process.wait(SECONDS) == 4
    assert termios.tcgetattr(slave)[3] & termios.ECHO
    os.close(slave)
    os.close(master)


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["ci", "--uid", "61005"], 0, b"uid:        61005"),
        (["no good name"], 2, b"name: 'no good name' is not a user name: an ASCII letter or _, then"),
        (["harry", "--role", "bogus"], 2, b"role: 'bogus' is not one of: none, viewer, operator, admin [bad-request]"),
    ],
)
def test_a_password_that_is_not_needed_is_not_asked_for(
    host: EmbeddedHost, arguments: list[str], status: int, says: bytes
) -> None:
    master, slave = pty.openpty()
    done = subprocess.run(
        [BIN / "circlectl", "user", "create", *arguments], env=host.environment,
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    shown = os.read(master, 4096)
    os.close(slave)
    os.close(master)
    assert done.returncode == status, shown
    assert says in shown
    assert b"assword:" not in shown


def test_who_has_a_uid_has_a_password_too_if_it_is_given(host: EmbeddedHost) -> None:
    host.ok("user", "create", "iris", "--uid", "61006", "--password-stdin", stdin="correct horse\n")
    assert "as iris" in host.ok("user", "login", "iris", "--password-stdin", stdin="correct horse\n")
    host.ok("user", "logout")


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (b"\x04", b"no password was given"),
        (b"caf\xe9 au lait\n", b"the password is not UTF-8 text"),
        (b"short\n", b"password: must have 8 to 1024 characters, not 5 [bad-request]"),
        (b"\x03", b""),
    ],
)
def test_a_prompt_left_without_a_password_is_no_traceback(host: EmbeddedHost, typed: bytes, says: bytes) -> None:
    process, master, slave = on_a_terminal(host, "user", "create", "gina")
    shown = b""
    while not shown.endswith(b"Password: "):
        assert select.select([master], [], [], 10)[0], shown
        shown += os.read(master, 1024)
    os.write(master, typed)
    assert process.wait(SECONDS) == (2 if says else 130)
    while b"Password: \r\n" not in shown or says not in shown:  # what follows has a line of its own
        assert select.select([master], [], [], 10)[0], shown
        shown += os.read(master, 4096)
    assert termios.tcgetattr(slave)[3] & termios.ECHO, "the terminal is as it was"
    os.close(slave)
    os.close(master)
    assert b"Traceback" not in shown
    assert b"caf" not in shown
    assert b"again" not in shown


def test_a_password_on_standard_input_must_be_text(host: EmbeddedHost) -> None:
    for locale in ("C.UTF-8", "C"):
        done = subprocess.run(
            [BIN / "circlectl", "user", "create", "gina", "--password-stdin"], input=b"caf\xe9 au lait\n",
            env={**host.environment, "LC_ALL": locale}, capture_output=True, timeout=SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr == (
            b"circlectl: the password is not UTF-8 text [bad-request]; see: circlectl user create --help\n"
        )


def test_a_line_of_a_windows_file_is_the_password_that_can_be_typed(host: EmbeddedHost) -> None:
    host.ok("user", "create", "vera", "--password-stdin", stdin="correct horse\r\n")
    for typed in ("correct horse\n", "correct horse\r\n"):
        assert "as vera" in host.ok("user", "login", "vera", "--password-stdin", stdin=typed)
    host.ok("user", "passwd", "--password-stdin", stdin="correct horse\r\nbattery staple\r\n")
    assert "as vera" in host.ok("user", "login", "vera", "--password-stdin", stdin="battery staple\n")
    host.ok("user", "logout")


def test_without_a_terminal_a_password_needs_its_flag(host: EmbeddedHost) -> None:
    done = host.ctl("user", "login", "alice")
    assert done.returncode == 2
    assert "--password-stdin" in done.stderr


def test_nobody_is_asked_for_passwords_who_is_no_user(host: EmbeddedHost) -> None:
    done = host.ctl("user", "passwd", "--password-stdin", stdin="")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("circlectl: user passwd needs NAME: you are not a CircleOSD user [bad-request]")


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["service", "stop", "nothing"], 5, "see: circlectl service list; to add it, see circleosd(8)"),
        (["service", "stop"], 2, "service stop needs NAME"),
        (["service", "stop", "../etc"], 2, "is not a service name"),
        (["plugin", "invoke", "none", "f", "x"], 5, "no plugin none is loaded"),
        (["plugin", "invoke", "example", "nofunc", "x"], 5, "has no function 'nofunc'; it has: handle, upper, crc32"),
        (["plugin", "load", "README.md"], 2, "neither WebAssembly nor a shared object"),
        (["plugin", "load", "nonexistent.wasm"], 5, "no such file: nonexistent.wasm"),
        (["plugin", "load", "/dev/zero"], 2, "not a regular file"),
        (["plugin", "load", "plugins"], 2, "not a regular file"),
        (["plugin", "load", "plugins/example.wasm", "--manifest", "README.md"], 2, "the manifest is not JSON"),
        (["plugin", "load", "plugins/example.wasm", "--sha256", "A" * 64], 2, "is not 64 hex digits, in lower case"),
        (["plugin", "unload", "none"], 5, "no plugin none is loaded"),
        (["user", "create", "x", "--uid", "abc", "--password-stdin"], 2, "'abc' is not a whole number"),
        (["user", "create", "x", "--role", "king", "--password-stdin"], 2, "role"),
        (["system", "history", "--lines", "-1"], 2, "not between 0 and 10000"),
        (["fly"], 2, "no command 'fly'"),
    ],
)
def test_errors_are_one_line_with_a_stable_status(
    host: EmbeddedHost, arguments: list[str], status: int, says: str
) -> None:
    done = host.ctl(*arguments, stdin="long enough\n")
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert done.stderr.startswith("circlectl: ")


def test_who_loads_what_is_no_plugin_is_led_to_the_guide(host: EmbeddedHost, tmp_path: Path) -> None:
    (tmp_path / "foreign.wasm").write_bytes(b"\0asm\1\0\0\0")
    refused = host.ctl("plugin", "load", str(tmp_path / "foreign.wasm"))
    assert refused.stderr.endswith("[bad-request]; see: circlectl plugin load --help\n")
    assert "plugins/README.md" in host.ok("plugin", "load", "--help")


def test_json_is_the_replys_data(host: EmbeddedHost) -> None:
    assert json.loads(host.ok("plugin", "list", "--json")) == host.data("plugin-manager", "list")
    assert json.loads(host.ok("--json", "plugin", "invoke", "example", "upper", "a")) == "A"


def test_status_and_history_cover_all_services(host: EmbeddedHost) -> None:
    assert [row["service"] for row in json.loads(host.ok("system", "status", "--json"))] == [*SERVICES]
    host.ctl("service", "start", "nothing")
    host.ctl("user", "enable", "nobody")
    rows = json.loads(host.ok("system", "history", "--json", "--lines", "1000"))
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)
    assert {row["service"] for row in rows} == {*SERVICES}
    loads = [row for row in rows if row["action"] == "load" and row["object"] == "example"]
    assert loads[0]["phase"] == "done"
    assert loads[0]["actor"]["uid"] == os.getuid()
    assert any(row["error"] == "not-found" and row["object"] == "nothing" for row in rows)


def test_control_characters_do_not_reach_a_terminal(host: EmbeddedHost) -> None:
    master, slave = pty.openpty()
    subprocess.run(
        [BIN / "circlectl", "plugin", "invoke", "example", "handle", "\x1b[31mred"],
        env=host.environment, stdout=slave, stderr=slave, stdin=subprocess.DEVNULL, check=True, timeout=SECONDS,
    )  # fmt: skip
    shown = os.read(master, 4096)
    os.close(master)
    os.close(slave)
    assert b"\\x1b[31mred" in shown
    assert b"\x1b[31m" not in shown


def test_a_closed_pipe_is_no_error_message(host: EmbeddedHost) -> None:
    for number in range(30):
        host.call("service-registry", {"action": "start", "name": f"missing{number}"})
    done = subprocess.run(
        f"'{BIN}/circlectl' system history --lines 1000 | head -c 1 >/dev/null",
        shell=True, env=host.environment, capture_output=True, text=True, timeout=SECONDS, check=False, cwd=PROJECT,
    )  # fmt: skip
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("line", "status", "says"),
    [
        ("service list >&-", 0, ""),
        ("service list >&- 2>&-", 0, ""),
        ("service nope 2>&-", 2, ""),
        ("user login alice <&-", 2, "no terminal to prompt for the password"),
        ("service list >/dev/full", 12, "No space left on device; the request may have succeeded [unavailable]\n"),
        ("system history --json >/dev/full", 12, "on device; the request may have succeeded [unavailable]\n"),
        ("--help >/dev/full", 12, "the output: No space left on device; no request was made [unavailable]\n"),
        ("--version >/dev/full", 12, "the output: No space left on device; no request was made [unavailable]\n"),
        ("plugin load plugins/example.wasm 2>/dev/full", 0, ""),
        ("service stop nothing 2>/dev/full", 5, ""),
        ("service nope 2>/dev/full", 2, ""),
    ],
)
def test_a_stream_that_is_closed_or_full_is_no_traceback(host: EmbeddedHost, line: str, status: int, says: str) -> None:
    done = subprocess.run(
        f"'{BIN}/circlectl' {line}", shell=True, env=host.environment, capture_output=True, text=True, timeout=SECONDS,
        check=False, cwd=PROJECT,
    )  # fmt: skip
    assert done.returncode == status
    assert says in done.stderr
    assert done.stderr.count("\n") == bool(says)


def test_what_an_encoding_lacks_is_escaped(host: EmbeddedHost) -> None:
    done = host.ctl("plugin", "invoke", "example", "handle", "a→b", env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(": a\\u2192b\n")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf8", "UTF-8"])
def test_json_is_json_in_every_encoding(host: EmbeddedHost, encoding: str) -> None:
    done = subprocess.run(
        [BIN / "circlectl", "plugin", "invoke", "--json", "example", "upper", "é→\N{GRINNING FACE}"],
        env={**host.environment, "PYTHONIOENCODING": encoding}, capture_output=True, timeout=SECONDS, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout.decode(encoding)) == "é→\N{GRINNING FACE}"
