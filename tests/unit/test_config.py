"""Settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from circleosd import __main__ as program
from circleosd import config
from circleosd.errors import BadRequest, Denied
from circleosd.paths import only


def test_later_sources_win(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for directory, idle in [(tmp_path / "xdg/circleosd", 5), (home / ".circleosd", 6)]:
        directory.mkdir(parents=True)
        (directory / "config.toml").write_text(f"[server]\nidle_exit = {idle}\nread_timeout = {idle}\n")
    env = {"HOME": str(home), "XDG_CONFIG_HOME": str(tmp_path / "xdg"), "CIRCLEOSD_SERVER_READ_TIMEOUT": "7.5"}
    settings = config.load(env)
    assert (settings.server.idle_exit, settings.server.read_timeout) == (6, 7.5)
    assert settings.server.write_timeout == config.ServerSettings().write_timeout


def test_a_byte_order_mark_stands_in_nobodys_way(tmp_path: Path) -> None:
    for text in ("[server]\nidle_exit = 5\n", "# nothing is set\n"):
        (tmp_path / "config.toml").write_text("\ufeff" + text)
        config.load({"CIRCLEOSD_CONFIG_DIR": str(tmp_path)})


def test_of_several_sources_the_wrong_one_is_named(tmp_path: Path) -> None:
    first, second = tmp_path / "xdg/circleosd/config.toml", tmp_path / ".circleosd/config.toml"
    for file in (first, second):
        file.parent.mkdir(parents=True)
        file.write_text("[server]\nidle_exit = 5\n")
    env = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "xdg"), "CIRCLEOSD_SERVER_READ_TIMEOUT": "7.5"}
    config.load(env)
    with pytest.raises(BadRequest, match=r"no such setting: server\.idle \(from CIRCLEOSD_ variables\)$"):
        config.load({**env, "CIRCLEOSD_SERVER_IDLE": "5"})
    for file in (first, second):
        file.write_text("[server]\nidle_exti = 5\n")
        with pytest.raises(BadRequest, match=rf"no such setting: server\.idle_exti \(from {file}\)$"):
            config.load(env)
        file.write_text("[server]\nidle_exit = 5\n")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[server]\nidle_exit = 'soon'\n", "setting server.idle_exit"),
        ("[server]\nidle_exit = '5'\n", "setting server.idle_exit: '5' is not a number"),
        ("[plugins]\nmemory = '65536'\n", "setting plugins.memory: '65536' is not a whole number"),
        ("[server]\nidle_exti = 5\n", "no such setting: server.idle_exti"),
        ("[sever]\nidle_exit = 5\n", "no such setting: sever"),
        ("server = 5\n", "setting server"),
        ("nonsense", "cannot read"),
        (f"server = {'[' * 5000}", "cannot read"),
        ("[server]\nidle_exit = -1\n", "setting server.idle_exit: -1 is not a number from 0 to 1000000000"),
        ("[server]\nidle_exit = inf\n", "setting server.idle_exit: inf is not a number"),
        ("[server]\nidle_exit = nan\n", "setting server.idle_exit: nan is not a number"),
        ("[server]\nidle_exit = true\n", "setting server.idle_exit: True is not a number"),
        ("[server]\nidle_exit = []\n", r"setting server.idle_exit: \[\] is not a number"),
        ("[server]\nmax_connections = 1.5\n", "setting server.max_connections: 1.5 is not a whole number"),
        ("[server]\nmax_connections = inf\n", "setting server.max_connections: inf is not a whole number"),
        (
            "[auth]\nhash_passes = 4294967296\n",
            "setting auth.hash_passes: .* is not a whole number from 1 to 4294967295",
        ),
        (
            "[auth]\nhash_memory = 4294967296\n",
            "setting auth.hash_memory: .* is not a whole number from 8 to 4294967295",
        ),
        (
            "[plugins]\ndefault_memory = 281474976710657\n",
            "setting plugins.default_memory: .* is not a whole number from 65536 to 281474976710656",
        ),
        ("[server]\nmax_connections = 0\n", "setting server.max_connections: 0 is not a whole number from 1 on"),
        ("[server.idle_exit]\n", "setting server.idle_exit: {} is not a number"),
        ("[plugins]\ntrust = 'maybe'\n", "setting plugins.trust: 'maybe' is not one of require, warn, off"),
        ("[plugins]\ntrust = 1\n", "setting plugins.trust: 1 is not one of require, warn, off"),
        ("[plugins]\ngrants = ['kv']\n", "setting plugins.grants: .* is not a table of lists of capabilities"),
        ("[plugins.grants]\ncounter = 'kv'\n", "setting plugins.grants: .* is not a table of lists of capabilities"),
        ("[plugins.grants]\ncounter = [5]\n", "setting plugins.grants: .* is not a table of lists of capabilities"),
    ],
)
def test_a_wrong_setting_is_named_with_its_file(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(BadRequest, match=says) as caught:
        config.load({"CIRCLEOSD_CONFIG_DIR": str(tmp_path)})
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "status", "says"),
    [
        ("[server]\nidle_exit = 5\n", 0, ""),
        ("[server]\nidle_exti = 5\n", 2, "circleosd: no such setting: server.idle_exti (from {path})\n"),
        (
            "[plugins.grants]\nweb = ['kv', 'clok']\n",
            2,
            "circleosd: setting plugins.grants.web: no capability 'clok'; available: log, kv, config, clock, "
            "services:read, services:restart:NAME, events:NAME (from {path})\n",
        ),
        (
            "[plugins.grants]\n'Counter x' = []\n",
            2,
            "circleosd: setting plugins.grants: 'Counter x' is not a plugin name: a lower-case ASCII letter or digit, "
            "then those, _ or -, at most 48 characters (from {path})\n",
        ),
    ],
)
def test_a_command_checks_the_settings(tmp_path: Path, text: str, status: int, says: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    command = [sys.executable, "-m", "circleosd", "check-settings"]
    env = {"CIRCLEOSD_CONFIG_DIR": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", says.format(path=path))


def test_a_service_of_the_system_checks_the_usual_directories_unless_another_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CIRCLEOSD_SUPERVISOR", "XDG_RUNTIME_DIR", "CIRCLEOSD_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    loose = tmp_path / "config.toml"
    loose.touch()
    loose.chmod(0o666)

    def accepts_it() -> bool:
        try:
            program._may_write()(loose, loose.stat())
        except Denied:
            return False
        return True

    assert not accepts_it()
    monkeypatch.setenv("CIRCLEOSD_CONFIG_DIR", "")  # counts as not set
    assert not accepts_it()
    monkeypatch.setenv("CIRCLEOSD_CONFIG_DIR", str(tmp_path))
    assert accepts_it()


def test_a_file_that_cannot_be_read_is_named_once(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.mkdir()
    with pytest.raises(BadRequest, match=f"^cannot read {path}: Is a directory$"):
        config.load({"CIRCLEOSD_CONFIG_DIR": str(tmp_path)})


def test_settings_that_others_may_write_are_refused_where_one_user_decides_on_them(tmp_path: Path) -> None:
    directory, file = tmp_path / "circleosd", tmp_path / "circleosd" / "config.toml"
    directory.mkdir(mode=0o755)
    file.write_text("[server]\nidle_exit = 7\n")
    file.chmod(0o644)
    env, mine = {"CIRCLEOSD_CONFIG_DIR": str(directory)}, only(os.getuid())
    for place, mode in ((file, 0o664), (file, 0o646), (directory, 0o775)):
        before = place.stat().st_mode
        place.chmod(mode)
        said = f"^cannot use {place}: it is writable by others than its owner; see: chmod go-w {place}$"
        with pytest.raises(BadRequest, match=said):
            config.load(env, may_write=mine)
        assert config.load(env).server.idle_exit == 7
        place.chmod(before)
    assert config.load(env, may_write=mine).server.idle_exit == 7
    said = f"it belongs to uid {os.getuid()}, not to uid {os.getuid() + 1}; see: chown {os.getuid() + 1} {directory}"
    more = "(; if this user namespace .*)?"  # for the user nobody
    with pytest.raises(BadRequest, match=f"^cannot use {directory}: {said}{more}$"):
        config.load(env, may_write=only(os.getuid() + 1))


def test_values_of_all_kinds(tmp_path: Path) -> None:
    text = "[server]\nidle_exit = 0\nmax_connections = 2.0\n[plugins]\ntrust = 'require'\ngrants = {counter = ['kv']}\n"
    (tmp_path / "config.toml").write_text(text)
    env = {
        "CIRCLEOSD_CONFIG_DIR": str(tmp_path),
        "CIRCLEOSD_PLUGINS_MEMORY": "1048576",
        "CIRCLEOSD_PLUGINS_TIME": "1e1",
    }
    settings = config.load(env)
    assert repr((settings.server.idle_exit, settings.server.max_connections)) == "(0.0, 2)"
    assert (settings.plugins.trust, settings.plugins.grants) == ("require", {"counter": ["kv"]})
    assert repr((settings.plugins.memory, settings.plugins.time)) == "(1048576, 10.0)"
    assert vars(settings.auth) == vars(config.Settings().auth)


def test_a_time_beyond_what_can_be_shown_is_refused() -> None:
    for name, text in (("AUTH_SESSION_LIFETIME", "1e17"), ("SERVER_IDLE_EXIT", "1000000001")):
        with pytest.raises(BadRequest, match=rf"'{text}' is not a number from 0(\.001)? to 1000000000 "):
            config.load({"CIRCLEOSD_CONFIG_DIR": "/nonexistent", f"CIRCLEOSD_{name}": text})
    load = {"CIRCLEOSD_CONFIG_DIR": "/nonexistent", "CIRCLEOSD_AUTH_SESSION_LIFETIME": "1e9"}
    assert config.load(load).auth.session_lifetime == 1e9


def test_a_wrong_variable_is_named() -> None:
    for text in ("", "soon", "-1", "nan", "1e400"):
        with pytest.raises(BadRequest, match=f"setting server.idle_exit: '{text}' is not a number from 0 to"):
            config.load({"CIRCLEOSD_CONFIG_DIR": "/nonexistent", "CIRCLEOSD_SERVER_IDLE_EXIT": text})
    with pytest.raises(BadRequest, match=r"no such setting: auth\.nonsense"):
        config.load({"CIRCLEOSD_CONFIG_DIR": "/nonexistent", "CIRCLEOSD_AUTH_NONSENSE": "1"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PLUGINS_CONCURRENCY", "0"),
        ("PLUGINS_MEMORY", "65535"),
        ("PLUGINS_TIME", "0"),
        ("PLUGINS_TIME", "nan"),
        ("PLUGINS_TIME", "inf"),
        ("PLUGINS_OUTPUT", "-1"),
        ("PLUGINS_STORAGE", "-1"),
        ("PLUGINS_QUEUE", "0"),
        ("SERVER_MAX_CONNECTIONS", "0"),
        ("AUTH_HASHING", "0"),
        ("AUTH_HASH_MEMORY", "7"),
        ("SERVER_IDLE_EXIT", "-1"),
    ],
)
def test_a_number_that_nothing_could_work_with_is_refused(name: str, value: str) -> None:
    with pytest.raises(
        BadRequest, match=rf"setting {name.lower().replace('_', '.', 1)}: \S+ is not a (whole )?number from"
    ):
        config.load({"CIRCLEOSD_CONFIG_DIR": "/nonexistent", f"CIRCLEOSD_{name}": value})


@pytest.mark.parametrize("name", ["SERVER_IDLE_EXIT", "PLUGINS_STORAGE", "PLUGINS_CACHE", "LEDGER_KEEP_DAYS"])
def test_zero_is_taken_where_it_says_something(name: str) -> None:
    config.load({"CIRCLEOSD_CONFIG_DIR": "/nonexistent", f"CIRCLEOSD_{name}": "0"})


def test_a_home_that_is_no_directory_has_no_settings() -> None:
    assert config.load({"HOME": "/dev/null", "CIRCLEOSD_SERVER_IDLE_EXIT": "7"}).server.idle_exit == 7
