"""Where sockets, state and settings are."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from circlectl import sessions
from circleosd import paths
from circleosd.embedded.up import found_with
from circleosd.errors import BadRequest, Denied


def test_where_the_sockets_are() -> None:
    assert paths.runtime_dir({"CIRCLEOSD_RUNTIME_DIR": "/x", "XDG_RUNTIME_DIR": "/y"}) == "/x"
    assert paths.user_runtime_dir({"XDG_RUNTIME_DIR": "/y"}) == "/y/circleosd"
    assert paths.socket_path("auth-service", "/x") == "/x/auth-service.sock"
    with pytest.raises(BadRequest, match="107 bytes"):
        paths.socket_path("auth-service", "/" + "x" * 100)


def test_without_a_variable_the_home_is_the_user_databases(monkeypatch: pytest.MonkeyPatch) -> None:
    assert paths.state_home({"XDG_STATE_HOME": "/s", "HOME": "/h"}) == "/s"
    assert paths.state_home({"HOME": "/h"}) == "/h/.local/state"
    home = pwd.getpwuid(os.getuid()).pw_dir
    assert paths.state_home({}) == paths.state_home({"HOME": ""}) == f"{home}/.local/state"
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
    with pytest.raises(BadRequest, match="uid 4000000000 has no home directory; set HOME"):
        paths.state_home({})
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert sessions.load("/run/circleosd") is None, "who has no home has no session, and needs none to ask"


def test_a_scope_says_whose_sockets_are_meant() -> None:
    env = {"CIRCLEOSD_RUNTIME_DIR": "/x", "XDG_RUNTIME_DIR": "/y"}
    assert paths.runtime_dir(env, "system") == "/run/circleosd"
    assert paths.runtime_dir(env, "user") == "/y/circleosd"
    with pytest.raises(BadRequest, match="--scope must be system or user, not 'both'"):
        paths.runtime_dir(env, "both")


def test_without_a_variable_ones_own_sockets_are_the_managers_or_else_where_up_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "USER_RUNTIMES", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    managers = tmp_path / "1000/circleosd"
    assert paths.runtime_dir({"HOME": "/h"}, "user") == "/h/.local/state/circleosd/run"
    managers.mkdir(parents=True)
    assert paths.runtime_dir({"HOME": "/h"}, "user") == str(managers)
    assert paths.runtime_dir({"HOME": "/h", "XDG_RUNTIME_DIR": "/y"}, "user") == "/y/circleosd"


def test_circleosd_up_says_what_circlectl_needs_to_find_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "SYSTEM_RUNTIME", str(tmp_path / "circleosd"))
    env = {"XDG_RUNTIME_DIR": "/y"}
    named = ", where circlectl finds it with CIRCLEOSD_RUNTIME_DIR="
    assert found_with("/y/circleosd", env) == ""
    assert found_with("/z z/run", env) == f"{named}'/z z/run'"
    (tmp_path / "circleosd").mkdir()  # which is taken for the system's
    assert found_with("/y/circleosd", env) == ", where circlectl finds it with --scope user"
    assert found_with("/z/run", env) == f"{named}/z/run"
    assert found_with("/z/run", {**env, "CIRCLEOSD_RUNTIME_DIR": "/z/run"}) == ""
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
    assert found_with("/z/run", {}) == f"{named}/z/run", "also who has no home"


def test_the_systems_sockets_are_not_roots_own_where_systemd_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "USER_RUNTIMES", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 0)
    monkeypatch.setattr(paths, "BOOTED", str(tmp_path))
    assert paths.runtime_dir({"HOME": "/root"}, "user") == f"{tmp_path}/0/circleosd"
    assert paths.runtime_dir({"HOME": "/root", "XDG_RUNTIME_DIR": "/y"}, "user") == "/y/circleosd"
    monkeypatch.setattr(paths, "BOOTED", str(tmp_path / "none"))
    assert paths.runtime_dir({"HOME": "/root"}, "user") == "/run/circleosd", "where `up` listens"


def test_who_cannot_give_a_file_to_its_owner_is_told_what_else_helps() -> None:
    """As in a container with the host's /etc, whose owner, root, is not mapped."""
    for uid, said in ((1000, "see: chown 0 /etc/circleosd$"), (65534, "; if .* CIRCLEOSD_CONFIG_DIR name another")):
        with pytest.raises(Denied, match=rf"^it belongs to uid {uid}, not to uid 0; .*{said}"):
            paths.only(0)("/etc/circleosd", os.stat_result((0o40755, 0, 0, 0, uid, 0, 0, 0, 0, 0)))


def test_a_relative_path_in_a_variable_of_xdg_is_ignored() -> None:
    env = {"HOME": "/h"} | dict.fromkeys(
        ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR"), "./x"
    )
    assert paths.state_home(env) == "/h/.local/state"
    assert paths.cache_home(env) == "/h/.cache"
    assert paths.config_dirs(env) == ["/etc/circleosd", "/h/.config/circleosd", "/h/.circleosd"]
    assert paths.user_runtime_dir(env) == paths.user_runtime_dir({"HOME": "/h"})
