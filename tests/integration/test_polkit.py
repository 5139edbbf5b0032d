"""The polkit rule, evaluated as JavaScript, and the files that it is made from and written to."""

from __future__ import annotations

import errno
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest

from circleosd import polkit
from circleosd.errors import BadRequest
from circleosd.registry.catalog import Entry
from circleosd.systemd import journal

NODE = shutil.which("node")
MANAGE = "org.freedesktop.systemd1.manage-units"
REGISTRY = "circleosd-registry"
SWITCH = "circleosd-switch"

# What polkitd gives a rule, as far as ours uses it (polkit(8)); unknown details are undefined there too. The message is
# the one with which systemd asks for an ordinary job, unless a test says otherwise.
HARNESS = """
let rules = [];
const polkit = { addRule: (rule) => rules.push(rule), Result: { YES: "yes", NO: "no", NOT_HANDLED: null } };
%s
const asked = JSON.parse(require("fs").readFileSync(0));
const wish = (verb) => verb === "reset-failed" ? `reset the "failed" state of` : verb;
const message = (verb) => `Authentication is required to ${wish(verb)} '$(unit)'.`;
const ordinary = (details) => ({ "polkit.message": message(details.verb), ...details });
const answer = ([id, user, details]) => rules[0]({ id, lookup: (key) => ordinary(details)[key] }, { user });
console.log(JSON.stringify(asked.map(answer)));
"""


def answers(entries: Iterable[Entry], asked: list[tuple[str, str, dict[str, str]]]) -> list[str | None]:
    """What the rule says to each question: yes, no, or None where it leaves the decision to others."""
    if NODE is None:
        pytest.skip("needs node to evaluate the rule")
    script = HARNESS % polkit.rule(entries)
    done = subprocess.run([NODE, "-e", script], input=json.dumps(asked), capture_output=True, text=True, check=True)
    found: list[str | None] = json.loads(done.stdout)
    return found


def answer(entries: Iterable[Entry], verb: str, unit: str) -> str | None:
    return answers(entries, [(MANAGE, REGISTRY, {"unit": unit, "verb": verb})])[0]


NGINX = Entry("web", "nginx.service")
CRON = Entry("cron", "cron.service", verbs=["restart"])


def test_exactly_the_cataloged_units_and_verbs_are_allowed() -> None:
    units = ["nginx.service", "cron.service", "ssh.service", "nginx.socket", "nginx", "NGINX.service", "xnginx.service"]
    verbs = ["start", "stop", "restart", "reload", "kill", "set-property", "try-restart", "reload-or-restart", "clean"]
    verbs.append("reset-failed")
    asked = [(verb, unit) for unit in units for verb in verbs]
    found = answers([NGINX, CRON], [(MANAGE, REGISTRY, {"unit": unit, "verb": verb}) for verb, unit in asked])
    allowed = {question for question, said in zip(asked, found, strict=True) if said == "yes"}
    assert allowed == {(verb, "nginx.service") for verb in ("start", "stop", "restart", "reload")} | {
        ("restart", "cron.service")
    }
    assert set(found) == {"yes", "no"}


@pytest.mark.parametrize("unit", ["nginx.service", "circleosd-enable@nginx.service.service"])
def test_a_transient_unit_of_a_listed_name_is_refused(unit: str) -> None:
    message = {"polkit.message": "Authentication is required to start transient unit '$(unit)'."}
    for verb in ("start", "reset-failed"):
        assert answers([NGINX], [(MANAGE, REGISTRY, {"unit": unit, "verb": verb, **message})]) == ["no"]


def test_an_empty_catalog_allows_workers_alone() -> None:
    assert answer([], "start", "nginx.service") == "no"
    assert answer([], "start", "circleosd-plugin@echo.service") == "yes"


def test_nothing_but_managing_units_is_allowed_to_the_registry() -> None:
    details = {"unit": "nginx.service", "verb": "start"}
    actions = [
        "org.freedesktop.systemd1.manage-unit-files",
        "org.freedesktop.systemd1.reload-daemon",
        "org.freedesktop.systemd1.set-environment",
        "org.freedesktop.login1.reboot",
    ]
    assert set(answers([NGINX], [(action, REGISTRY, details) for action in actions])) == {"no"}


def test_the_user_of_the_units_that_enable_may_do_that_and_nothing_else() -> None:
    allowed = ["org.freedesktop.systemd1.manage-unit-files", "org.freedesktop.systemd1.reload-daemon"]
    refused = [MANAGE, "org.freedesktop.systemd1.set-environment", "org.freedesktop.login1.reboot"]
    details = {"unit": "nginx.service", "verb": "start"}
    assert answers([NGINX], [(action, SWITCH, details) for action in allowed + refused]) == ["yes"] * 2 + ["no"] * 3


def test_requests_without_a_unit_or_a_verb_are_refused() -> None:
    asked: list[dict[str, str]] = [{}, {"unit": "nginx.service"}, {"verb": "start"}]
    assert set(answers([NGINX], [(MANAGE, REGISTRY, details) for details in asked])) == {"no"}


def test_other_people_are_none_of_its_business() -> None:
    details = {"unit": "nginx.service", "verb": "start"}
    people = ["root", "alice", "", "circleosd-registry2"]
    assert answers([NGINX], [(MANAGE, user, details) for user in people]) == [None] * len(people)


@pytest.mark.parametrize("name", ["echo", "a", "echo.staged", "a_b-c", "x" * 48])
@pytest.mark.parametrize("kind", ["service", "socket"])
def test_workers_may_be_run(name: str, kind: str) -> None:
    unit = f"circleosd-plugin@{name}.{kind}"
    details = [{"unit": unit, "verb": verb} for verb in ("start", "stop", "restart", "reload", "kill")]
    assert answers([], [(MANAGE, REGISTRY, each) for each in details]) == ["yes", "yes", "yes", "no", "no"]


@pytest.mark.parametrize(
    "unit",
    [
        "circleosd-plugin@.service",
        "circleosd-plugin@Echo.service",
        "circleosd-plugin@a.b.service",
        "circleosd-plugin@-a.service",
        "circleosd-plugin@echo.timer",
        "circleosd-plugin@echo.service\n",
        "circleosd-plugin@echo.service.service",
        "xcircleosd-plugin@echo.service",
        "circleosd-plugin@" + "x" * 49 + ".service",
        "evil\ncircleosd-plugin@echo.service",
    ],
)
def test_what_only_looks_like_a_worker_may_not(unit: str) -> None:
    assert answer([], "start", unit) == "no"


def test_names_of_the_language_are_names_like_others() -> None:
    names = ["__proto__", "constructor", "toString", "hasOwnProperty", "indexOf", "length"]
    entries = [Entry("odd", f"{name}.service") for name in names]
    asked = [("start", f"{name}.service") for name in names]
    asked += [("start", name) for name in names] + [(name, "") for name in names]
    found = answers(entries, [(MANAGE, REGISTRY, {"unit": unit, "verb": verb}) for verb, unit in asked])
    assert found == ["yes"] * len(names) + ["no"] * 2 * len(names)


@pytest.mark.parametrize("unit", [r"a\x2db.service", "a@b.service", "a:b.timer", r"dev-x\x22.mount"])
def test_every_name_that_a_unit_can_have_is_allowed_literally(unit: str) -> None:
    assert answer([Entry("odd", unit)], "start", unit) == "yes"


@pytest.mark.parametrize(
    "unit", ['"];evil()//.service', "a b.service", "a\n.service", "*.service", "a@.service", "", "é.service", "nginx"]
)
def test_what_is_no_unit_name_never_gets_into_the_rule(unit: str) -> None:
    with pytest.raises(BadRequest):
        polkit.rule([Entry("odd", unit)])


def test_enabling_is_starting_the_unit_that_enables_just_that() -> None:
    entries = [NGINX, Entry("cron", "cron.service", verbs=["enable"])]
    allowed = [
        "circleosd-enable@nginx.service.service",
        "circleosd-disable@nginx.service.service",
        "circleosd-enable@cron.service.service",
    ]
    for verb in ("start", "reset-failed"):
        assert [answer(entries, verb, unit) for unit in allowed] == ["yes"] * 3
        assert answer(entries, verb, "circleosd-enable@ssh.service.service") == "no"
    assert answer(entries, "start", "circleosd-disable@cron.service.service") == "no"
    assert answer(entries, "stop", "circleosd-enable@nginx.service.service") == "no"


def test_the_same_catalog_gives_the_same_text_in_any_order() -> None:
    again = Entry("www", "nginx.service", verbs=["stop"])
    assert polkit.rule([NGINX, CRON]) == polkit.rule([CRON, again, NGINX, NGINX])


# ---- the files


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """A catalog with nginx, and where the rule goes."""
    directory = tmp_path / "circleosd" / "services.d"
    directory.mkdir(parents=True)
    (directory / "web.toml").write_text('[[service]]\nname = "web"\nunit = "nginx.service"\nverbs = ["stop"]\n')
    for path in (directory.parent, directory, directory / "web.toml"):
        path.chmod(path.stat().st_mode & ~0o022)
    rules = tmp_path / "rules.d" / "49-circleosd.rules"
    rules.parent.mkdir()
    return directory, rules


def generate(places: tuple[Path, Path], owner: int | None = None) -> tuple[str, ...]:
    return polkit.generate(*places, owner=os.getuid() if owner is None else owner)


def test_the_rule_is_written_for_polkitd_to_read(places: tuple[Path, Path]) -> None:
    rules = places[1]
    old = os.umask(0o077)
    try:
        assert generate(places) == ()
    finally:
        os.umask(old)
    assert '"stop nginx.service"' in rules.read_text()
    assert '"start nginx.service"' not in rules.read_text()
    assert '"stop circleosd-auth.service"' in rules.read_text()
    assert rules.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in rules.parent.iterdir()] == [rules.name]


def test_the_rule_gets_the_label_of_its_directory(places: tuple[Path, Path]) -> None:
    """With SELinux, polkitd may not read a file with the label that a service's new files in /etc get."""
    _, target = places
    label = b"system_u:object_r:etc_t:s0"
    try:
        os.setxattr(target.parent, polkit.LABEL, label)
    except OSError as exc:
        pytest.skip(f"no labels here: {exc}")
    polkit.write("text", target)
    assert os.getxattr(target, polkit.LABEL) == label


def test_a_rule_that_is_up_to_date_is_not_touched(places: tuple[Path, Path]) -> None:
    generate(places)
    before = places[1].stat()
    generate(places)
    after = places[1].stat()
    assert (after.st_ino, after.st_ctime_ns) == (before.st_ino, before.st_ctime_ns)


@pytest.mark.parametrize("spoil", [lambda path: path.write_text("x"), lambda path: path.chmod(0o600), Path.unlink])
def test_a_rule_that_was_changed_is_put_right(places: tuple[Path, Path], spoil: object) -> None:
    generate(places)
    good = places[1].read_text()
    assert callable(spoil)
    spoil(places[1])
    generate(places)
    assert places[1].read_text() == good
    assert places[1].stat().st_mode & 0o777 == 0o644


def test_a_unit_removed_from_the_catalog_leaves_the_rule(places: tuple[Path, Path]) -> None:
    generate(places)
    (places[0] / "web.toml").unlink()
    generate(places)
    assert "nginx" not in places[1].read_text()


def test_no_catalog_at_all_leaves_the_services_of_circleosd(places: tuple[Path, Path]) -> None:
    shutil.rmtree(places[0].parent)
    assert generate(places) == ()
    assert '"stop circleosd-auth.service"' in places[1].read_text()
    assert "nginx" not in places[1].read_text()


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_file_that_others_may_write_is_refused(places: tuple[Path, Path], mode: int) -> None:
    path = places[0] / "more.toml"
    path.write_text('[[service]]\nname = "cron"\nunit = "cron.service"\n')
    path.chmod(mode)
    assert generate(places) == (f"{path}: it is writable by others than its owner; see: chmod go-w {path}",)
    assert "cron.service" not in places[1].read_text()
    assert "nginx.service" in places[1].read_text()  # the other files still count


def test_a_file_of_somebody_else_is_refused(places: tuple[Path, Path]) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root to give a file away")
    file = places[0] / "web.toml"
    file.chmod(0o644)
    os.chown(file, 4242, 4242)
    assert generate(places) == (f"{file}: it belongs to uid 4242, not to uid 0; see: chown 0 {file}",)
    assert "nginx" not in places[1].read_text()


@pytest.mark.parametrize("place", [0, 1])
def test_a_directory_that_others_may_write_makes_the_whole_catalog_untrusted(
    places: tuple[Path, Path], place: int
) -> None:
    path = (places[0], places[0].parent)[place]
    path.chmod(0o777)
    assert generate(places) == (f"{path}: it is writable by others than its owner; see: chmod go-w {path}",)
    assert "nginx" not in places[1].read_text()


def test_a_directory_of_somebody_else_makes_the_whole_catalog_untrusted(places: tuple[Path, Path]) -> None:
    (problem,) = generate(places, owner=os.getuid() + 1)
    assert "belongs to uid" in problem
    assert "nginx" not in places[1].read_text()


def test_a_file_that_names_no_unit_is_left_out_alone(places: tuple[Path, Path]) -> None:
    bad = places[0] / "bad.toml"
    bad.write_text('[[service]]\nname = "cron"\nunit = "cron@.service"\n')
    bad.chmod(0o644)
    (problem,) = generate(places)
    assert "'cron@.service' is not the full name of a unit" in problem
    assert "cron" not in places[1].read_text()
    assert "nginx.service" in places[1].read_text()


def test_links_and_pipes_are_refused(places: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "elsewhere.toml").write_text('[[service]]\nname = "cron"\nunit = "cron.service"\n')
    (places[0] / "link.toml").symlink_to(tmp_path / "elsewhere.toml")
    os.mkfifo(places[0] / "pipe.toml", 0o644)
    problems = generate(places)
    assert len(problems) == 2
    assert problems[0] == f"{places[0] / 'link.toml'}: it is a symbolic link; put the file itself there"
    assert "is not a regular file" in problems[1]
    assert "cron.service" not in places[1].read_text()


def test_a_directory_that_is_a_link_is_refused_as_that(places: tuple[Path, Path], tmp_path: Path) -> None:
    (places[0] / "cron.toml").write_text('[[service]]\nname = "cron"\nunit = "cron.service"\n')
    places[0].rename(tmp_path / "elsewhere")
    places[0].symlink_to(tmp_path / "elsewhere")
    assert generate(places) == (f"{places[0]}: it is a symbolic link; put the directory itself there",)
    assert "cron.service" not in places[1].read_text()


@pytest.mark.parametrize(
    "change",
    [
        lambda directory: (directory / "web.toml").unlink(missing_ok=True),
        lambda directory: (directory / "web.toml").write_text(""),
        lambda directory: directory.chmod(0o777),
    ],
    ids=["a file goes", "a file has another text", "others may write"],
)
def test_a_catalog_that_changes_while_it_is_read_is_read_again(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object]
) -> None:
    write, changes = polkit.write, iter([change])

    def write_late(text: str, target: Path) -> None:
        for change in changes:
            change(places[0])
        write(text, target)

    monkeypatch.setattr(polkit, "write", write_late)
    generate(places)
    assert "nginx" not in places[1].read_text()


def test_a_rule_that_cannot_be_written_leaves_the_old_one_and_no_temporary_file(places: tuple[Path, Path]) -> None:
    places[1].write_text("// old\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            generate(places)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in places[1].parent.iterdir()] == [places[1].name]
    assert places[1].read_text() == "// old\n"


def test_why_the_rule_cannot_be_written_is_said_without_the_name_of_a_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, complaints = tmp_path / "none" / "49-circleosd.rules", list[str]()
    monkeypatch.setattr(polkit, "generate", partial(polkit.generate, tmp_path / "services.d", target))
    monkeypatch.setattr(journal, "complain", complaints.append)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="1"):
        polkit.main()
    assert complaints == [f"cannot update the polkit rule: {target}: No such file or directory"]


def test_a_catalog_that_cannot_be_read_for_want_of_descriptors_takes_no_rights_away(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    complaints = list[str]()
    generate(places)
    with monkeypatch.context() as without:
        without.setattr(polkit, "generate", partial(polkit.generate, *places, owner=os.getuid()))
        without.setattr(journal, "complain", complaints.append)
        without.setattr(os, "_exit", sys.exit)
        without.setattr(os, "open", none_left)
        with pytest.raises(SystemExit, match="1"):
            polkit.main()
    assert len(complaints) == 1
    assert complaints[0].startswith("cannot update the polkit rule: ")
    assert "nginx" in places[1].read_text()


def test_the_rule_for_a_catalog_of_ones_own_is_printed(places: tuple[Path, Path]) -> None:
    generate(places)
    command = [sys.executable, "-m", "circleosd", "polkit-rule", str(places[0])]
    places[0].parent.chmod(0o777)  # as /tmp; a draft may be anywhere
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == places[1].read_text()
    (places[0] / "bad.toml").write_text('[[service]]\nname = "cron"\nunit = "cron@.service"\n')
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "not the full name of a unit" in done.stderr) == (1, True)
    for errors in ("2>&-", "2>/dev/full"):
        shell = ["bash", "-c", f"{shlex.join(command)} {errors}"]
        assert subprocess.run(shell, stdout=subprocess.PIPE, text=True, check=False).stdout == done.stdout, errors
    done = subprocess.run([*command[:-1], "/nonexistent"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, "no directory /nonexistent" in done.stderr) == (5, "", True)
    done = subprocess.run([*command[:-1], "x" * 300], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, f"circleosd: cannot read {'x' * 300}: File name too long\n")
