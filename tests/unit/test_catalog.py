"""The catalog of services."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from circleosd.api import registry
from circleosd.api.contract import Effect
from circleosd.errors import BadRequest, Limit, NotFound
from circleosd.paths import SERVICES, only
from circleosd.registry import catalog
from tests import PROJECT

GOOD = '[[service]]\nname = "nginx"\nunit = "nginx.service"\ndescription = "web"\nverbs = ["restart"]\n'


def test_own_services_are_always_there_and_files_add_theirs(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(GOOD)
    found = catalog.read([tmp_path, tmp_path / "missing"])
    assert [*found.entries] == [*SERVICES, "nginx"]
    assert found.find("nginx").verbs == ["restart"]
    assert found.problems == ()
    with pytest.raises(NotFound):
        found.find("apache")


def test_the_later_directory_and_file_win(tmp_path: Path) -> None:
    for directory, file, unit in [("1", "z", "first"), ("2", "a", "second"), ("2", "b", "third")]:
        (tmp_path / directory).mkdir(exist_ok=True)
        (tmp_path / directory / f"{file}.toml").write_text(GOOD.replace("nginx.service", f"{unit}.service"))
    assert catalog.read([tmp_path / "1", tmp_path / "2"]).find("nginx").unit == "third.service"


def test_only_files_that_end_in_toml_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.toml.dpkg-dist").write_text(GOOD)
    (tmp_path / "README").write_text("nonsense")
    found = catalog.read([tmp_path])
    assert ("nginx" in found.entries, found.problems) == (False, ())


def test_a_byte_order_mark_stands_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("\ufeff" + GOOD)
    found = catalog.read([tmp_path])
    assert ("nginx" in found.entries, found.problems) == (True, ())


def test_a_directory_that_cannot_be_read_is_named_and_takes_no_other_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "a.toml").write_text(GOOD)
    listed = os.listdir

    def refused(directory: Path) -> list[str]:
        if directory.name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(directory))
        return listed(directory)

    monkeypatch.setattr(os, "listdir", refused)
    found = catalog.read([tmp_path / "closed", tmp_path / "good"])
    said = f"{tmp_path}/closed: Permission denied; see: chmod a+rX {tmp_path} {tmp_path}/closed"
    assert ("nginx" in found.entries, found.problems) == (True, (said,))


def test_the_name_of_a_unit_has_at_most_the_length_that_systemd_takes() -> None:
    longest = "x" * (255 - len(".service")) + ".service"
    assert catalog.parse(f'[[service]]\nname = "a"\nunit = "{longest}"\n')[0].unit == longest
    with pytest.raises(BadRequest, match="number 1, unit: "):
        catalog.parse(f'[[service]]\nname = "a"\nunit = "x{longest}"\n')


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "[service]\n",
        'x = 1\n[[service]]\nname = "a"\nunit = "a.service"\n',
        '[[service]]\nname = "a"\n',
        '[[service]]\nname = "a"\nunit = "a"\n',
        '[[service]]\nname = "a"\nunit = "../a.service"\n',
        '[[service]]\nname = "a b"\nunit = "a.service"\n',
        '[[service]]\nname = "a"\nunit = "a.service"\nverbs = ["fly"]\n',
        '[[service]]\nname = "a"\nunit = "a.service"\ncolor = "red"\n',
        '[[service]]\nname = "auth-service"\nunit = "a.service"\n',
        '[[service]]\nname = "plugin@x"\nunit = "a.service"\n',
        f"service = {'[' * 5000}",
    ],
)
def test_a_bad_file_is_named_and_takes_no_other_away(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.toml").write_text(text)
    (tmp_path / "good.toml").write_text(GOOD)
    found = catalog.read([tmp_path])
    assert "nginx" in found.entries
    assert len(found.problems) == 1
    assert "bad.toml" in found.problems[0]


def test_workers_are_found_by_their_plugin(tmp_path: Path) -> None:
    found = catalog.read([tmp_path])
    assert found.find("plugin@json-filter").unit == "circleosd-plugin@json-filter.service"
    with pytest.raises(NotFound):
        found.find("plugin@json-filter", workers=False)
    with pytest.raises(NotFound):
        found.find("plugin@x.socket", sockets=False)
    assert found.find("plugin@x.socket").unit == "circleosd-plugin@x.socket"
    assert found.find("plugin@x.staged.socket").unit == "circleosd-plugin@x.staged.socket"
    assert catalog.plugin_entry("circleosd-plugin@x.service").name == "plugin@x"
    for name in ("plugin@", "plugin@X", "plugin@../x", "plugin@a.b"):
        with pytest.raises(NotFound):
            found.find(name)


def test_a_reader_sees_every_change_of_the_files(tmp_path: Path) -> None:
    reader = catalog.Reader([tmp_path])
    assert "nginx" not in reader().entries
    (tmp_path / "a.toml").write_text(GOOD)
    assert reader() is reader()
    assert reader().find("nginx").description == "web"
    (tmp_path / "a.toml").write_text(GOOD.replace('"web"', '"the web"'))
    assert reader().find("nginx").description == "the web"
    (tmp_path / "a.toml").unlink()
    assert "nginx" not in reader().entries


def test_a_reader_reads_what_cannot_be_used_again_when_that_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse, parsed = catalog.parse, list[str]()

    def noted(text: str) -> list[catalog.Entry]:
        parsed.append(text)
        return parse(text)

    monkeypatch.setattr(catalog, "parse", noted)
    (tmp_path / "a.toml").write_text("[[service]]\nname =")
    reader = catalog.Reader([tmp_path])
    assert len(reader().problems) == 1
    assert reader() is reader()
    assert len(parsed) == 1
    (tmp_path / "a.toml").write_text(GOOD)
    assert (reader().problems, len(parsed)) == ((), 2)


def test_what_kept_a_reader_from_a_file_for_a_moment_does_not_keep_it_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "a.toml").write_text(GOOD)
    reader = catalog.Reader([tmp_path])
    with monkeypatch.context() as without:
        without.setattr(os, "open", broken)
        assert reader().problems == (f"{tmp_path}/a.toml: Input/output error",)
    assert reader().problems == ()
    assert "nginx" in reader().entries


@pytest.mark.parametrize("lacking", ["open", "listdir"])
def test_services_are_not_missing_because_descriptors_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    def none_left(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    (tmp_path / "a.toml").write_text(GOOD)
    reader = catalog.Reader([tmp_path])
    with monkeypatch.context() as without:
        without.setattr(os, lacking, none_left)
        with pytest.raises(Limit, match="Too many open files"):
            reader()
    assert "nginx" in reader().entries


def test_a_reader_sees_that_a_file_may_be_read_now() -> None:
    program = (
        "import os, sys, pathlib; from circleosd.registry import catalog; os.geteuid() or os.setuid(65534);"
        "reader = catalog.Reader([pathlib.Path(sys.argv[1])]);"
        "print(*reader().problems, flush=True); input(); print(*reader().problems, bool(reader().entries.get('nginx')))"
    )
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        file = Path(directory, "a.toml")
        file.write_text(GOOD)
        file.chmod(0)
        command = [sys.executable, "-c", program, directory]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == f"{file}: Permission denied; see: chmod a+rX {directory} {file}\n"
            file.chmod(0o644)
            assert child.communicate("\n")[0] == "True\n"


def test_a_reader_believes_only_what_one_user_alone_can_write_if_it_must_not_believe_others(tmp_path: Path) -> None:
    directory, file = tmp_path / "services.d", tmp_path / "services.d" / "b.toml"
    directory.mkdir(mode=0o755)
    (directory / "a.toml").write_text(GOOD)
    file.write_text(GOOD.replace("nginx.service", "ssh.service"))
    for place, mode in ((tmp_path, 0o755), (directory / "a.toml", 0o644), (file, 0o664)):
        place.chmod(mode)
    reader = catalog.Reader([directory], only(os.getuid()))
    assert reader().find("nginx").unit == "nginx.service"
    assert reader().problems == (f"{file}: it is writable by others than its owner; see: chmod go-w {file}",)
    file.chmod(0o644)
    assert reader().find("nginx").unit == "ssh.service"
    for place in (directory, tmp_path):
        place.chmod(0o775)
        assert reader().problems == (f"{place}: it is writable by others than its owner; see: chmod go-w {place}",)
        assert {*reader().entries.values()} == {*catalog.OWN}
        with pytest.raises(
            NotFound, match=rf"^no service nginx in the catalog; cannot use .*; see: chmod go-w {place}$"
        ):
            reader().find("nginx")
        place.chmod(0o755)
        assert (reader().problems, "nginx" in reader().entries) == ((), True)
    others = catalog.Reader([directory], only(os.getuid() + 1))
    assert "belongs to uid" in others().problems[0]
    assert {*others().entries.values()} == {*catalog.OWN}


@pytest.mark.timeout(60)
def test_what_is_no_file_of_a_sensible_size_is_named_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "directory.toml").mkdir()
    (tmp_path / "dangling.toml").symlink_to("/nonexistent")
    (tmp_path / "large.toml").write_text(f"{GOOD.replace('nginx', 'large')}#{'#' * catalog.MAX_FILE}")
    (tmp_path / "binary.toml").write_bytes(b"\xff\x00")
    (tmp_path / "good.toml").write_text(GOOD)
    found = catalog.Reader([tmp_path])()
    assert "nginx" in found.entries
    assert "large" not in found.entries
    assert [Path(problem.partition(":")[0]).stem for problem in found.problems] == [
        "binary", "dangling", "directory", "large", "pipe",
    ]  # fmt: skip
    assert all(problem.count(str(tmp_path)) == 1 for problem in found.problems)


def test_a_directory_in_the_place_of_a_file_leaves_no_descriptor_behind(tmp_path: Path) -> None:
    (tmp_path / "a.toml").mkdir()
    reader = catalog.Reader([tmp_path])
    assert reader().problems == (f"{tmp_path}/a.toml: Is a directory",)
    before = os.listdir("/proc/self/fd")
    reader()
    assert len(os.listdir("/proc/self/fd")) <= len(before)


def test_a_link_is_not_followed_where_the_file_itself_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(GOOD)
    (tmp_path / "b.toml").symlink_to("a.toml")
    assert catalog.text_of(tmp_path / "b.toml") == GOOD
    with pytest.raises(OSError, match="symbolic links"):
        catalog.text_of(tmp_path / "b.toml", flags=os.O_NOFOLLOW)


def test_what_an_editor_leaves_beside_a_file_is_none_of_the_catalog(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(GOOD)
    (tmp_path / ".#a.toml").symlink_to("root@host.4711:1700000000")  # Emacs' lock
    for name in ("a.toml~", "#a.toml#", ".a.toml.swp", "a.toml.dpkg-old"):
        (tmp_path / name).write_text("half of a fi")
    found = catalog.read([tmp_path])
    assert (found.problems, "nginx" in found.entries) == ((), True)


@pytest.mark.parametrize("unit", ["circleosd-registry.service", "circleosd-auth.socket", "circleosd-plugin@x.service"])
def test_circleosds_own_units_have_no_other_names(tmp_path: Path, unit: str) -> None:
    (tmp_path / "a.toml").write_text(GOOD.replace("nginx.service", unit))
    found = catalog.read([tmp_path])
    assert found.problems == (f"{tmp_path}/a.toml: the unit {unit} belongs to CircleOSD, which catalogs it itself",)
    assert {*found.entries.values()} == {*catalog.OWN}


def test_the_catalog_decides_on_everything_that_the_registry_does_to_a_unit() -> None:
    assert {item.action for item in registry.CONTRACTS if item.effect is Effect.EXTERNAL} == {*catalog.ALL_VERBS}
    *others, last = catalog.ALL_VERBS
    assert f"The verbs are {', '.join(others)} and {last}." in (PROJECT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["", "".join(f"# {line}\n" for line in GOOD.splitlines())])
def test_a_file_without_an_entry_is_no_problem(text: str) -> None:
    assert catalog.parse(text) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f'{GOOD}[[service]]\nname = "a"\nunit = "a"\n', r"^\[\[service\]\] number 2, unit: 'a' is not the full name"),
        (
            GOOD.replace("nginx.service", "data.automount"),
            r"'data.automount' is not the full name of a unit \(service, .*, slice\), such as nginx.service$",
        ),
        (
            GOOD.replace("restart", "fly"),
            r"number 1, verbs\.0: should be 'start', 'stop', 'restart', 'reload', 'enable' or 'disable'$",
        ),
        (GOOD + GOOD, r"^\[\[service\]\] number 2, name: the file already has a service nginx$"),
        (GOOD.replace("verbs", "verb"), "number 1, verb: no such member$"),
        ('[[service]]\nname = "a"\n', "number 1, unit: is missing$"),
        ('[service]\nname = "a"\n', r"^a catalog file may contain only \[\[service\]\] tables$"),
    ],
)
def test_parse_says_which_entry_is_wrong(text: str, says: str) -> None:
    with pytest.raises(BadRequest, match=says) as refused:
        catalog.parse(text)
    assert "Value error" not in str(refused.value)
