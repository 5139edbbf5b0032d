"""Tab in a real bash, zsh and fish on a terminal, against running services."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import PROJECT
from tests.integration.embedded_host import BIN, EmbeddedHost
from tests.waiting import SECONDS

PROMPT = "READY>"
SEQUENCE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[()].|[=>])")  # console_codes(4)
SETUP = {
    "bash": "PS1='READ''Y>'; source completions/circlectl.bash",
    "zsh": "PS1='READ''Y>'; autoload -Uz compinit && compinit -D -u; source completions/circlectl.zsh",
    "fish": "function fish_prompt; printf READ; printf 'Y>'; end; source completions/circlectl.fish",
}
START = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "-i"],
}
# Functions of a plugin may have any name; their author is not somebody to trust.
FUNCTIONS = [
    "two words",
    "it's",
    "$(touch pwned)",
    'quo"ted',
    "semi;colon & more",
    "back\\slash",
    "ünï→",
    "colon:ed",
    "wow!x",
]


@pytest.fixture(scope="module", autouse=True)
def _names(host: EmbeddedHost, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A plugin called special, with FUNCTIONS, and services with names that shells find special."""
    escaped = ("".join(f"\\{byte:02x}" for byte in name.encode()) for name in FUNCTIONS)
    exports = "".join(f'(export "{name}" (func $upper))' for name in escaped)
    text = (PROJECT / "plugins/example.wat").read_text()
    text = text.replace('(func (export "upper")', '(func $upper (export "upper")')
    directory = tmp_path_factory.mktemp("plugin")
    (directory / "special.wat").write_text(text.rstrip().removesuffix(")") + exports + ")")
    converter = PROJECT / "plugins/wat2wasm.py"
    subprocess.run([sys.executable, converter, directory / "special.wat", directory / "special.wasm"], check=True)
    host.load(directory / "special.wasm")
    for name in ("web@one:eins", "web@one:zwei", "database"):
        (host.catalog / f"{name}.toml").write_text(f'[[service]]\nname = "{name}"\nunit = "{name[:3]}.service"\n')


class Shell:
    """An interactive shell on a terminal of its own."""

    def __init__(self, name: str, host: EmbeddedHost, directory: Path) -> None:
        environment = {
            **host.environment,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(directory),
            "TERM": "xterm",
            "LC_ALL": "C.UTF-8",
        }
        self._terminal, slave = pty.openpty()
        command = ["setsid", "--ctty", *START[name]]  # fish insists on a controlling terminal
        self._process = subprocess.Popen(command, env=environment, cwd=PROJECT, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self._type(f"{SETUP[name]}; cd {directory}\r", PROMPT)

    def close(self) -> None:
        """End the shell."""
        os.close(self._terminal)
        self._process.kill()
        self._process.wait(SECONDS)

    def words(self, typed: str) -> list[str]:
        """The words of the line that `typed` has become, as the shell would pass them to a program."""
        marker = f"end{time.monotonic_ns()}"
        # At the line's beginning (Ctrl-A), and then go on at its end (Ctrl-E).
        output = self._type(f"{typed}\x01printf '<%s>\\n' \x05 {marker}\r", rf"<{marker}>[^<]*{PROMPT}")
        return re.findall(r"^\r*<(.*)>\r*$", SEQUENCE.sub("", output), re.MULTILINE)[:-1]

    def shown(self, typed: str, pattern: str) -> str:
        """What the terminal shows after `typed`, up to what matches `pattern`; the shell is not of use after that."""
        return self._type(typed, pattern)

    def _type(self, text: str, pattern: str) -> str:
        """Type, and wait until the terminal has shown `pattern`; return what it has shown."""
        os.write(self._terminal, text.encode())
        output, deadline = "", time.monotonic() + SECONDS
        while not re.search(pattern, output, re.DOTALL):
            if not select.select([self._terminal], [], [], max(0, deadline - time.monotonic()))[0]:
                os.write(self._terminal, b"\x03")
                pytest.fail(f"{pattern} was not shown, but {output!r}")
            output += os.read(self._terminal, 65536).decode(errors="replace")
        return output


@contextlib.contextmanager
def opened(name: str, host: EmbeddedHost, directory: Path) -> Iterator[Shell]:
    """A shell in `directory`. Skips where it is not installed."""
    if not shutil.which(name):
        pytest.skip(f"there is no {name} here; install it to try completion in it")
    shell = Shell(name, host, directory)
    try:
        yield shell
    finally:
        shell.close()


@pytest.fixture(scope="module", params=START)
def shell(
    request: pytest.FixtureRequest, host: EmbeddedHost, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shell]:
    """Each of the shells, in a directory of its own, in which no file appears."""
    directory = tmp_path_factory.mktemp(request.param)
    with opened(request.param, host, directory) as shell:
        yield shell
    assert "pwned" not in {path.name for path in directory.rglob("*")}


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("circlectl ser\t", ["circlectl", "service"]),
        ("circlectl service sto\t", ["circlectl", "service", "stop"]),
        ("circlectl service stop data\t", ["circlectl", "service", "stop", "database"]),
        ("circlectl service stop web@one:z\t", ["circlectl", "service", "stop", "web@one:zwei"]),
        ("circlectl plugin invoke spe\tcrc\t", ["circlectl", "plugin", "invoke", "special", "crc32"]),
        ("circlectl user create --role ope\t", ["circlectl", "user", "create", "--role", "operator"]),
        ("circlectl user create --rol\t ope\t", ["circlectl", "user", "create", "--role", "operator"]),
        ("circlectl --scope sys\tservice", ["circlectl", "--scope", "system", "service"]),
        # With the cursor back at the end of the verb (Ctrl-B).
        ("circlectl service sto nginx" + "\x02" * 6 + "\t", ["circlectl", "service", "stop", "nginx"]),
        ("circlectl nonsense xyz\t", ["circlectl", "nonsense", "xyz"]),
    ],
)
def test_tab_completes(shell: Shell, typed: str, expected: list[str]) -> None:
    assert shell.words(typed) == expected


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_a_name_is_inserted_as_one_word_whatever_is_in_it(shell: Shell, name: str, quote: str) -> None:
    begun = "\\$" if name[0] == "$" and quote != "'" else name[:2] if name[0] != "$" else name[:1]
    assert shell.words(f"circlectl plugin invoke special {quote}{begun}\t") == [
        "circlectl",
        "plugin",
        "invoke",
        "special",
        name,
    ]


@pytest.mark.parametrize("name", START)
def test_tab_lists_what_there_is(name: str, host: EmbeddedHost, tmp_path: Path) -> None:
    with opened(name, host, tmp_path) as shell:
        assert "database" in shell.shown("circlectl service stop \t\t", "web@one.*web@one")


@pytest.mark.parametrize("flag", ["", "--manifest="])
def test_paths_are_completed_by_the_shell(shell: Shell, tmp_path: Path, flag: str) -> None:
    (tmp_path / "my plugin.wasm").touch()
    expected = ["circlectl", "plugin", "load", f"{flag}{tmp_path}/my plugin.wasm"]
    assert shell.words(f"circlectl plugin load {flag}{tmp_path}/my\t") == expected
