"""Unit files as the embedded mode reads them."""

from __future__ import annotations

import pytest

from circleosd.config import AuthSettings, PluginSettings, ServerSettings
from circleosd.embedded.unitfile import UnitFile
from circleosd.errors import BadRequest
from circleosd.passing import MAX_FILES
from circleosd.paths import SERVICES
from circleosd.registry.service import FOLLOWED
from circleosd.server import GIVEN_UP, SHUTDOWN
from circleosd.worker.limits import COMPILE_MEMORY, MAX_DESCRIPTORS, MOST_THREADS
from tests import PROJECT

TEXT = r"""
# a comment
; another
[Unit]
Description=One  line
Wants=a.socket b.socket
Wants="c d.socket"

[Service]
ExecStart=/bin/sh -c 'echo $$ "%i"' \
    # a comment within
    more
Environment=A=1 "B=two words"
Environment=
Environment=C=3
TimeoutStartSec=1min 30s
"""
SPECIFIERS = {"t": "/run", "t/circleosd": "/tmp/x", "i": "b-c", "%": "%"}


def service(lines: str) -> UnitFile:
    return UnitFile(f"[Service]\n{lines}\n", SPECIFIERS)


def test_keys_lists_quotes_continuations_and_resets() -> None:
    file = UnitFile(TEXT, SPECIFIERS)
    assert file.get("Unit", "Description") == "One  line"
    assert file.words("Unit", "Wants") == ["a.socket", "b.socket", "c d.socket"]
    assert file.get("Service", "ExecStart").split() == ["/bin/sh", "-c", "'echo", "$$", '"b-c"\'', "more"]
    assert file.words("Service", "Environment") == ["C=3"]
    assert file.seconds("Service", "TimeoutStartSec", "5") == 90
    assert file.seconds("Service", "TimeoutStopSec", "5") == 5
    assert file.get("Install", "WantedBy") == ""
    assert file.get("Unit", "ExecStart") == ""


def test_a_line_goes_on_after_a_lone_backslash_at_its_very_end() -> None:
    assert service("A='x\\\n  y'").words("Service", "A") == ["x   y"]
    assert service("A=x\\\\\nB=y").get("Service", "B") == "y"
    assert service("A=x\\\\\\\nB=y").get("Service", "A") == "x\\\\ B=y"
    with pytest.raises(BadRequest, match="not support backslashes"):
        service("A=x \\ \nB=y").words("Service", "A")


@pytest.mark.parametrize("text", ["Key=before a section", "[Unit]\nno assignment", "[Unit]\n=value", "[Unit\n"])
def test_a_line_that_is_nothing_is_named(text: str) -> None:
    with pytest.raises(BadRequest, match=f"line {len(text.splitlines())} is neither"):
        UnitFile(text, {})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5", 5), ("100ms", 0.1), ("2h 3min", 7380), ("1.5s", 1.5), ("infinity", float("inf")), ("0", 0),
        ("1min30s", 90), ("250 usec", 25e-5), ("2 h", 7200),
    ],
)  # fmt: skip
def test_time_spans(text: str, seconds: float) -> None:
    assert service(f"RestartSec={text}").seconds("Service", "RestartSec", "1") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["soon", "5 parsecs", "-1s", "5s,", "inf", "nan", "1e3", "5 fortnights"])
def test_what_is_no_time_span(text: str) -> None:
    with pytest.raises(BadRequest, match="not a time span"):
        service(f"RestartSec={text}").seconds("Service", "RestartSec", "1")


def test_specifiers() -> None:
    assert service("A=%t/%i 100%% %t/circleosd/x %t/circleosds").get("Service", "A") == (
        "/run/b-c 100% /tmp/x/x /run/circleosds"
    )
    for wrong in ("%j", "100%"):
        with pytest.raises(BadRequest, match="does not support the specifier"):
            service(f"A={wrong}").get("Service", "A")


def test_a_value_may_be_one_of_a_few() -> None:
    assert service("Type=exec").get("Service", "Type", "simple", of=("simple", "exec")) == "exec"
    with pytest.raises(BadRequest, match="Type=forking, only simple, exec"):
        service("Type=forking").get("Service", "Type", "simple", of=("simple", "exec"))


def test_the_ends_of_a_process_are_numbers_and_signals() -> None:
    assert service("A=2 12\nA=SIGKILL SIGUSR1").ends("A") == ["2", "12", "SIGKILL", "SIGUSR1"]
    for name in ("TEMPFAIL", "KILL", "-1"):
        with pytest.raises(BadRequest, match=f"A=, not {name}"):
            service(f"A=2 {name}").ends("A")


def test_no_end_of_a_command_with_a_dash_in_front_is_a_failure() -> None:
    assert [service(f"ExecStart={start}/bin/a-b -c").tolerates() for start in ("-", "+-", "!!-", "", "!!")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_commands_split_and_replace_variables() -> None:
    environment = {"OPTS": "-a '-b c'", "NAME": "x y 100%"}
    file = service("ExecStart=-/bin/prog $OPTS '${NAME}' ${NONE}z $$OPTS a$OPTS %t")
    assert file.command(environment) == ["/bin/prog", "-a", "-b c", "x y 100%", "z", "$OPTS", "a$OPTS", "/run"]


@pytest.mark.parametrize(
    "wrong", ["", "'unclosed", "@/bin/sh sh", ":/bin/sh", r"/bin/sh -c 'echo \x41'", "a\nExecStart=b", "a ; b"]
)
def test_commands_that_mean_something_else_to_systemd_are_refused(wrong: str) -> None:
    with pytest.raises(BadRequest, match="ExecStart="):
        service(f"ExecStart={wrong}").command({})
    with pytest.raises(BadRequest, match="cannot read A="):
        service("ExecStart=/bin/echo $A").command({"A": "it's"})


def test_every_shipped_unit_can_be_read() -> None:
    files = [path for path in (PROJECT / "units").iterdir() if path.suffix in (".socket", ".service", ".target")]
    assert len(files) >= 9
    for path in files:
        text = UnitFile(path.read_text(), {**SPECIFIERS, "I": "b/c"})
        assert text.get("Unit", "Description").startswith(("CircleOSD", "Socket of"))
        assert text.get("Unit", "Documentation") == "man:circleosd(8)"


EXECUTOR = 32  # threads, where there are CPUs enough (concurrent.futures.ThreadPoolExecutor)
# What a service may have beside its first thread: these, three for each database, and some of its own.
THREADS = {"auth": EXECUTOR + 3 + AuthSettings().hashing, "registry": EXECUTOR + 3 + FOLLOWED, "plugins": EXECUTOR + 6}


def of_system(name: str) -> UnitFile:
    """A service's unit as the system's manager has it."""
    unit = PROJECT / "units" / f"circleosd-{name}.service"
    system = PROJECT / "units/system" / f"{unit.name}.d" / "10-system.conf"
    return UnitFile(unit.read_text() + system.read_text(), SPECIFIERS)


@pytest.mark.parametrize("name", SERVICES.values())
def test_the_unit_of_a_service_leaves_it_what_it_may_take(name: str) -> None:
    text = of_system(name)
    assert text.seconds("Service", "TimeoutStopSec", "0") > SHUTDOWN + GIVEN_UP
    assert int(text.get("Service", "LimitNOFILE", "0")) > ServerSettings().max_connections * (1 + MAX_FILES)
    assert int(text.get("Service", "TasksMax", "0")) > 1 + THREADS[name]
    # Its messages and the rows of its ledger are under one name.
    assert text.get("Service", "SyslogIdentifier") == text.get("Service", "ExecStart").replace(" ", "-")


def test_the_unit_of_a_worker_leaves_it_what_it_may_take() -> None:
    text = of_system("plugin@")
    # To compile, for WASI, and of its own.
    assert int(text.get("Service", "TasksMax", "0")) > 1 + 2 * MOST_THREADS + PluginSettings().concurrency
    assert int(text.get("Service", "LimitNOFILE", "0")) > MAX_DESCRIPTORS
    assert int(text.get("Service", "MemoryMax", "0M").removesuffix("M")) << 20 > COMPILE_MEMORY
