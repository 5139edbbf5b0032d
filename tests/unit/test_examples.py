"""The example plugins, each in a real worker: they do what is said of them, and come from their sources."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest

from circleosd.config import PluginSettings
from circleosd.plugins import manifest as manifests
from circleosd.worker import frames
from tests import PROJECT
from tests.plugin_tools import ENVIRONMENT, SEARCH
from tests.worker_driver import CallFailed, Worker, start

PLUGINS: Final = PROJECT / "plugins"
EXAMPLES: Final = PLUGINS / "examples"
NAMES: Final = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir())

# Not in the repository: for one machine only, or a megabyte that no two builds make alike.
BUILT_HERE: Final = ("native-hello", "webhook-format")

Starter = Callable[..., Worker]


def manifest_path(name: str) -> Path:
    return (PLUGINS if name == "example" else EXAMPLES / name) / f"{name}.json"


def artifact_path(name: str, directory: Path = PLUGINS) -> Path:
    relative = manifest_path(name).relative_to(PLUGINS)
    return directory / relative.with_suffix(".so" if name == "native-hello" else ".wasm")


def make(name: str, out: Path, *variables: str) -> Path:
    """Builds one example from source, below `out`; `variables` are make's. Skips the test when a tool is not here."""
    target = artifact_path(name, out)
    result = subprocess.run(
        ["make", "-C", str(PLUGINS), f"PYTHON={sys.executable}", f"OUT={out}", *variables, str(target)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    if not target.exists():
        skipped = [line for line in result.stderr.splitlines() if line.startswith("skipped")]
        pytest.skip("\n".join(skipped) or result.stderr)
    return target


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    """Starts a worker for an example as its manifest says, with what it asks for granted, unless told otherwise."""
    running: dict[str, Worker] = {}
    compiled: dict[str, bytes | None] = {}  # a JavaScript engine takes seconds
    with ExitStack() as stack:

        def begin(name: str, *, new: bool = False, **fields: Any) -> Worker:
            if not new and not fields and name in running:
                return running[name]
            said = manifests.parse(manifest_path(name).read_bytes())
            held_to = manifests.bounds(said, PluginSettings())
            path = artifact_path(name)
            if name in BUILT_HERE:
                path = make(name, tmp_path_factory.getbasetemp() / "built")
            worker = stack.enter_context(
                start(
                    path.read_bytes(),
                    compiled.get(name),
                    **{
                        "name": name,
                        "plugin_type": said.plugin_type,
                        "abi": said.abi,
                        "instance": said.instance,
                        "deterministic": said.deterministic,
                        "memory": held_to.memory,
                        "time": held_to.time,
                        "output": held_to.output,
                        "concurrency": held_to.concurrency,
                        "config": said.config,
                        "granted": tuple(capability.name for capability in said.capabilities),
                        **fields,
                    },
                )
            )
            worker.ready()
            compiled.setdefault(name, worker.compiled)
            if not new and not fields:
                running[name] = worker
            return worker

        yield begin


def error_of(worker: Worker, function: str, payload: str | bytes) -> str:
    """The message of a call that the plugin itself must refuse."""
    with pytest.raises(CallFailed) as caught:
        worker.invoke(function, payload)
    assert caught.value.code == "plugin-failed"
    assert caught.value.backtrace == []
    return caught.value.message


def store(kept: dict[str, str]) -> Callable[[str, dict[str, str]], bytes]:
    """Answers the kv calls of a worker from a dictionary."""

    def answer(call: str, args: dict[str, str]) -> bytes:
        if call == "kv.get":
            return frames.host_reply_body(kept.get(args["key"]))
        if call == "kv.set":
            kept[args["key"]] = args["value"]
            return frames.host_reply_body(None)
        if call == "kv.delete":
            return frames.host_reply_body(kept.pop(args["key"], None) is not None)
        assert call == "kv.keys"
        return frames.host_reply_body(sorted(key for key in kept if key.startswith(args["prefix"])))

    return answer


# ---- all of them ----


@pytest.mark.parametrize("name", ["example", *NAMES])
def test_manifest_is_accepted_and_named_after_its_example(name: str) -> None:
    said = manifests.parse(manifest_path(name).read_bytes())
    assert said.name == name
    assert said.description
    assert all(capability.reason for capability in said.capabilities)


def open_quote(command: str) -> bool:
    """Whether a shell would ask for a further line."""
    try:
        shlex.split(command)
    except ValueError:
        return True
    return False


def commands(text: str) -> list[tuple[list[str], str]]:
    """The `circlectl plugin invoke` lines of a README, split into words, with the output shown below each."""
    found = []
    for shown in re.findall(r"^    \$ (circlectl plugin invoke .*\n(?:    (?!\$ ).*\n)*)", text, re.M):
        command, *output = shown.replace("\n    ", "\n").splitlines()
        while open_quote(command):
            command += "\n" + output.pop(0)
        found.append((shlex.split(command)[3:], "\n".join(output)))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_readme_shows_what_really_happens(name: str, plugin: Starter) -> None:
    shown = commands((EXAMPLES / name / "README.md").read_text(encoding="utf-8"))
    assert shown
    worker = plugin(name, new=True)
    worker.answer = store({})
    for words, output in shown:
        called, function, payload = words
        assert called == name
        try:
            reply = worker.invoke(function, payload).removesuffix("\n")
        except CallFailed as failed:
            reply = f"circlectl: {failed.message} [{failed.code}]"
        # What differs from call to call is left out.
        assert re.fullmatch(".+".join(map(re.escape, output.split("…"))), reply), reply


@pytest.mark.parametrize("name", [name for name in ("example", *NAMES) if name not in BUILT_HERE])
def test_artifact_is_what_its_source_gives(name: str, tmp_path: Path) -> None:
    kept = artifact_path(name).read_bytes()
    built = make(name, tmp_path).read_bytes()
    if built != kept:
        for tool, made_by in (
            (["clang", "--version"], rb"clang\W+(\d+\.\d+\.\d+)"),
            (["wasm-tools", "--version"], None),
        ):
            version = tool_version(tool)
            then = re.search(made_by or rb"wit-component\W+0\.(\d+\.\d+)", kept)
            if then and version and not version.endswith(then[1].decode()):
                pytest.skip(f"the artifact was built with {tool[0]} {then[1].decode()}, here is {version}")
    assert built == kept


def tool_version(command: list[str]) -> str | None:
    if shutil.which(command[0], path=SEARCH) is None:
        return None
    output = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout
    found = re.search(r"\d+\.\d+\.\d+", output)
    return found and found[0]


# The JavaScript tool stores random seeds in what it builds.
@pytest.mark.parametrize("name", [name for name in ("example", *NAMES) if name != "webhook-format"])
def test_two_builds_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    first = make(name, tmp_path / "first")
    second = make(name, tmp_path / "a-longer-name-for-the-second")
    assert first.read_bytes() == second.read_bytes()


def test_a_clang_that_finds_the_target_deprecated_builds_the_wasi_program_all_the_same(tmp_path: Path) -> None:
    newer = tmp_path / "clang"
    newer.write_text(
        """#!/bin/sh
case " $* " in
*" -Wno-deprecated "*) ;;
*" -Werror "*) echo "argument '--target=wasm32-wasi' is deprecated" >&2; exit 1 ;;
esac
exec clang "$@"
""",
        encoding="utf-8",
    )
    newer.chmod(0o755)
    make("wordcount", tmp_path, f"CLANG={newer}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [(b"(module (func (i64.cnst 0)))", "unknown operator"), (b"\0asm\xff", "can't decode"), (None, "No such file")],
)
def test_what_is_wrong_with_a_text_is_said_with_its_name(text: bytes | None, reason: str, tmp_path: Path) -> None:
    source, target = tmp_path / "typo.wat", tmp_path / "typo.wasm"
    if text is not None:
        source.write_bytes(text)
    command = [sys.executable, str(PLUGINS / "wat2wasm.py"), str(source)]
    done = subprocess.run([*command, str(target)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.startswith(f"{source}: ")) == (1, True), done.stderr
    assert reason in done.stderr
    assert not target.exists()
    assert "wat2wasm.py IN.wat OUT.wasm" in subprocess.run(command, capture_output=True, text=True, check=False).stderr


def test_a_missing_tool_is_named_and_the_others_are_built(tmp_path: Path) -> None:
    result = subprocess.run(
        [
            *("make", "-C", str(PLUGINS), f"PYTHON={sys.executable}", f"OUT={tmp_path}"),
            *("CLANG=no-clang", "WASM_TOOLS=no-wasm-tools", "COMPONENTIZE_QJS=no-qjs"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "skipped json-filter.wasm: it needs clang and lld (Debian: apt-get install clang lld)" in result.stderr
    assert "skipped webhook-format.wasm: it needs componentize-qjs (npm: npm install " in result.stderr
    assert artifact_path("example", tmp_path).exists()
    assert not artifact_path("json-filter", tmp_path).exists()


# ---- example ----


def counted(text: str) -> str:
    """What `handle` of the example says about a text."""

    def number(count: int, unit: str) -> str:
        return f"{count} {unit}" if count == 1 else f"{count} {unit}s"

    words = [word for word in re.split(r"[ \t\n\v\f\r]+", text) if word]
    return (
        f"{number(len(text.encode()), 'byte')}, {number(len(text), 'character')}, {number(len(words), 'word')}: {text}"
    )


def texts(alphabet: str, seed: int) -> list[str]:
    """Texts of many lengths, the same at every run."""
    source = random.Random(seed)
    return ["".join(source.choices(alphabet, k=length)) for length in (*range(40), 1000, 70_000)]


def test_example_counts_bytes_characters_and_words(plugin: Starter) -> None:
    worker = plugin("example")
    assert worker.invoke("handle", "hello") == "5 bytes, 5 characters, 1 word: hello"
    assert worker.invoke("handle", "x") == "1 byte, 1 character, 1 word: x"
    assert worker.invoke("handle", "") == "0 bytes, 0 characters, 0 words: "
    assert worker.invoke("handle", "naïve  café") == "13 bytes, 11 characters, 2 words: naïve  café"
    for text in texts("ab \t\n\v\f\r é€😀\u00a0\u2003", 1):
        assert worker.invoke("handle", text) == counted(text)


def test_example_logs_one_line_a_call(plugin: Starter) -> None:
    worker = plugin("example", new=True)
    worker.invoke("handle", "hello")
    worker.invoke("handle", "h")
    assert [(level, text) for _, level, text in worker.logs] == [(1, "handled 5 bytes"), (1, "handled 1 byte")]


def test_example_raises_ascii_letters_only(plugin: Starter) -> None:
    worker = plugin("example")
    for text in texts("azmAZ`{@[09 é€😀ß", 2):
        assert worker.invoke("upper", text).encode() == text.encode().upper()


def test_example_computes_the_crc_that_zlib_computes(plugin: Starter) -> None:
    worker = plugin("example")
    assert worker.invoke("crc32", "123456789") == "cbf43926"
    for text in texts("azmAZ é€😀ß", 3):
        assert worker.invoke("crc32", text) == f"{zlib.crc32(text.encode()):08x}"


def test_example_takes_one_mebibyte_and_no_more(plugin: Starter) -> None:
    worker = plugin("example")
    longest = "ab cé\n" * ((1 << 20) // 7)
    longest += "x" * ((1 << 20) - len(longest.encode()))
    assert len(longest.encode()) == 1 << 20
    assert worker.invoke("handle", longest) == counted(longest)
    assert worker.invoke("crc32", longest) == f"{zlib.crc32(longest.encode()):08x}"
    with pytest.raises(CallFailed) as caught:
        worker.invoke("handle", longest + "x")
    assert caught.value.code == "limit"


# ---- reverse ----


def test_reverse_turns_code_points_around(plugin: Starter) -> None:
    worker = plugin("reverse")
    assert worker.invoke("handle", "añb€") == "€bña"
    for text in texts("abc é€😀\u0301\u0000", 4):
        assert worker.invoke("handle", text) == text[::-1]


# ---- json-filter ----

DOCUMENT: Final = """\
 {"users": [{"name": "Zo\\u00eb \\"Z\\"", "age": 1.50e+3}, null, [], "\\ud83d\\ude00\\ud83d"],
  "": {"a.b": true, "\\u0061": "escaped name"}, "x": 1, "x": [ 2 , 3 ] } """


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (".", DOCUMENT.strip()),
        (".users[0].name", '"Zo\\u00eb \\"Z\\""'),
        (".users[0].age", "1.50e+3"),
        (".users[1]", "null"),
        (".users[2]", "[]"),
        ('[""]["a.b"]', "true"),
        ('[""].a', '"escaped name"'),
        ('[""]["\\u0061"]', '"escaped name"'),
        (".x", "[ 2 , 3 ]"),
        ('["x"][1]', "3"),
        (".users[0].age\r", "1.50e+3"),
    ],
)
def test_json_filter_picks_the_value_as_it_stands(path: str, value: str, plugin: Starter) -> None:
    assert plugin("json-filter").invoke("handle", f"{path}\n{DOCUMENT}") == value


def test_json_filter_gives_the_text_of_a_string(plugin: Starter) -> None:
    worker = plugin("json-filter")
    assert worker.invoke("text", f".users[0].name\n{DOCUMENT}") == 'Zoë "Z"'
    assert worker.invoke("text", f".users[3]\n{DOCUMENT}") == "😀\ufffd"
    assert worker.invoke("text", f".users[0].age\n{DOCUMENT}") == "1.50e+3"
    assert worker.invoke("text", '.\n"\\"\\\\\\/\\b\\f\\n\\r\\t"') == '"\\/\b\f\n\r\t'


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (".a", "expected a path, a line break and a JSON document"),
        ("\n{}", "path, character 1: expected . or [, found the end"),
        ("a\n{}", "path, character 1: expected . or [, found a"),
        (".é.\n{}", "path, character 4: expected a name after the dot, found the end"),
        (".a[x]\n{}", "path, character 4: expected an index or a name in quotes, found x"),
        (".a[1\n{}", "path, character 5: expected ], found the end"),
        ('["a\\q"]\n{}', 'path, character 5: expected one of " \\ / b f n r t u after a backslash, found q'),
        (".\n", "line 1, character 1: expected a value, found the end"),
        ('.\n{"é": 1,\n "b": }', "line 2, character 7: expected a value, found }"),
        ('.\n{"é": tru}', "line 1, character 7: expected a value, found t"),
        (".\n[1 2]", "line 1, character 4: expected , or ], found 2"),
        ('.\n{"a":1 "b"}', 'line 1, character 8: expected , or }, found "'),
        ('.\n{"a" 1}', "line 1, character 6: expected : after the member's name, found 1"),
        (".\n{é}", "line 1, character 2: expected a string, found é"),
        (".\n[01]", "line 1, character 3: expected no digit after a leading zero, found 1"),
        (".\n[-]", "line 1, character 3: expected a digit, found ]"),
        ('.\n"\\u12g4"', "line 1, character 6: expected four hexadecimal digits after \\u, found g"),
        (
            '.\n"a\tb"',
            "line 1, character 3: expected an escape such as \\n for a control character, "
            "found the control character 9",
        ),
        ('.\n"ab', "line 1, character 4: expected the string's closing quote, found the end"),
        (".\n{} {}", "line 1, character 4: expected nothing after the value, found {"),
        (
            ".\n" + "[" * 257 + "]" * 257,
            "line 1, character 257: expected no more than 256 arrays and objects within each other, found [",
        ),
        ('.a.b\n\n {"a": {"c": 1}}', "line 2, character 8: .a has no member b"),
        (".a\n[1]", "line 1, character 1: . is an array, not an object"),
        ('["a"]\n[1]', "line 1, character 1: . is an array, not an object"),
        ("[123456789012]\n[1]", "line 1, character 1: . has 1 element, none with the index 123456789012"),
        ('.a[7]\n{"a": [1]}', "line 1, character 7: .a has 1 element, none with the index 7"),
        ('.a[0]\n{"a": "x"}', "line 1, character 7: .a is a string, not an array"),
        (".a[99999999999999999999]\n{}", "line 1, character 1: . has no member a"),
        ("." + "é" * 99 + "\n{}", "line 1, character 1: . has no member " + "é" * 40 + "…"),
    ],
)
def test_json_filter_says_where_something_is_wrong(payload: str, message: str, plugin: Starter) -> None:
    assert error_of(plugin("json-filter"), "handle", payload) == message


def mutants(count: int, seed: int) -> Iterator[str]:
    """Documents with a few characters changed, some of them still correct; the same at every run."""
    source = random.Random(seed)
    seeds = [
        DOCUMENT,
        "[]",
        '"\\ud83d\\ude00"',
        "-0.5e-7",
        '[[[{"a":[1,2,{"b":"c"}]}]]]',
        json.dumps({"k": list(range(9)), "t": [True, False, None], "n": {"x": {"y": {"z": "é"}}}}),
    ]
    pieces = [*'{}[]",:\\/.+-eE0123456789tfnu \t\n\r', "é", "😀", "\x00", "\\u", "\\ud800", "\\udc00", "null", '"a":']
    for _ in range(count):
        text = source.choice(seeds)
        for _ in range(source.randrange(4)):
            at = source.randrange(len(text) + 1)
            kind = source.randrange(4)
            if kind == 0:
                text = text[:at] + text[at + source.randrange(1, 5) :]
            elif kind == 1:
                text = text[:at] + source.choice(pieces) + text[at:]
            elif kind == 2:
                text = text[:at] + source.choice(pieces) + text[at + 1 :]
            else:
                end = min(len(text), at + source.randrange(20))
                text = text[:end] + text[at:end] + text[end:]
        yield text


def test_json_filter_agrees_with_python_about_what_is_json(plugin: Starter) -> None:
    worker = plugin("json-filter")
    accepted = refused = 0
    for text in mutants(4000, 5):
        try:
            value = json.loads(text, parse_constant=float.fromhex)
        except ValueError:
            assert error_of(worker, "handle", f".\n{text}").startswith("line "), text
            refused += 1
            continue
        reply = worker.invoke("handle", f".\n{text}")
        assert reply == text.strip(" \t\n\r")
        if isinstance(value, dict):
            for key, member in value.items():
                picked = worker.invoke("handle", f"[{json.dumps(key)}]\n{text}")
                assert json.loads(picked) == member, text
        accepted += 1
    assert min(accepted, refused) > 500


def any_calls() -> bytes:
    """Payloads for json-filter of any bytes, each after its length."""
    source = random.Random(6)
    paths = [
        *[b"."] * 8,
        b".users[0].name",
        b'["a.b"]["\\u0061"]',
        b".k[3]",
        b".n.x.y.z",
        b'[0][0][0].a[2]["b"]',
        b"",
        b"..",
    ]
    calls = bytearray()
    for text in mutants(40_000, 7):
        payload = bytearray(source.choice(paths) + b"\n" + text.encode())
        if source.randrange(2):
            payload[source.randrange(len(payload))] = source.randrange(256)
        if source.randrange(4) == 0:
            del payload[source.randrange(1, len(payload) + 1) :]
        calls += len(payload).to_bytes(4, sys.byteorder) + payload
    return bytes(calls)


def test_json_filter_stays_within_its_memory_whatever_it_is_sent(tmp_path: Path) -> None:
    """The plugin's own source, compiled for this machine under AddressSanitizer, with any bytes as its payload."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is not here")
    program = tmp_path / "fuzz"
    subprocess.run(
        [
            *(compiler, "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
            *("-I", str(Path(__file__).parent / "plugin_headers" / "native")),
            *("-o", str(program), str(EXAMPLES / "json-filter" / "json-filter.c")),
        ],
        check=True,
    )
    result = subprocess.run(
        [program],
        input=any_calls(),
        capture_output=True,
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
        check=False,
    )
    assert result.returncode == 0, result.stderr.decode("utf-8", "replace")
    succeeded, failed = map(int, result.stdout.split())
    assert succeeded + failed == 80_000
    assert min(succeeded, failed) > 4000


# ---- counter ----


def test_counter_counts_each_key_and_goes_on_in_the_next_process(plugin: Starter) -> None:
    kept: dict[str, str] = {}
    for first in (1, 3):
        worker = plugin("counter", new=True)
        worker.answer = store(kept)
        assert worker.invoke("handle", "visits") == str(first)
        assert worker.invoke("handle", "visits") == str(first + 1)
        assert worker.invoke("peek", "visits") == str(first + 1)
    assert worker.invoke("handle", "naïve") == "1"
    assert worker.invoke("counters", "") == "naïve 1\nvisits 4\n"
    assert worker.invoke("counters", "v") == "visits 4\n"
    assert worker.invoke("reset", "visits") == "4"
    assert worker.invoke("peek", "visits") == "0"
    assert kept == {"naïve": "1"}


def test_counter_lists_thousands(plugin: Starter) -> None:
    kept = {f"{'k' * 50}{number:05}": str(number) for number in range(3000)}
    worker = plugin("counter", new=True, time=60)
    worker.answer = store(kept)
    assert worker.invoke("counters", "") == "".join(f"{key} {count}\n" for key, count in kept.items())


def test_counter_says_what_is_wrong(plugin: Starter) -> None:
    kept = {"text": "many", "empty": "", "full": str(2**64 - 1), "over": str(2**64)}
    worker = plugin("counter", new=True)
    worker.answer = store(kept)
    assert error_of(worker, "handle", "") == "expected the name of a counter"
    assert error_of(worker, "handle", "text") == "no number is stored for text"
    assert error_of(worker, "peek", "empty") == "no number is stored for empty"
    assert error_of(worker, "peek", "over") == "no number is stored for over"
    assert error_of(worker, "handle", "full") == "cannot count further: full"
    assert worker.invoke("peek", "full") == str(2**64 - 1)


def test_counter_passes_on_what_the_host_refuses(plugin: Starter) -> None:
    denied = "denied: this plugin has not been granted the capability kv"
    worker = plugin("counter", granted=())
    for function in ("handle", "peek", "reset", "counters"):
        assert error_of(worker, function, "visits") == denied
    worker = plugin("counter", new=True)
    worker.answer = lambda call, args: frames.host_error_body("limit", "the store is full")
    assert error_of(worker, "handle", "visits") == "limit: the store is full"


# ---- wordcount ----

SENTENCE: Final = "The cat's hat, the CAT; 'the' naïve Naïve 7 7 — x'"


def test_wordcount_counts_words_most_frequent_first(plugin: Starter) -> None:
    assert plugin("wordcount").invoke("handle", SENTENCE) == ("3 the\n2 7\n2 naïve\n1 cat\n1 cat's\n1 hat\n1 x\n1 —\n")
    assert plugin("wordcount").invoke("handle", "") == ""


def test_wordcount_prints_as_many_as_its_configuration_says(plugin: Starter) -> None:
    granted = ("config",)
    assert plugin("wordcount", config={"TOP": "1"}, granted=granted).invoke("handle", SENTENCE) == "3 the\n"
    assert len(plugin("wordcount").invoke("handle", " ".join(map(str, range(50)))).splitlines()) == 20
    ungranted = plugin("wordcount", config={"TOP": "1"}, granted=())
    assert len(ungranted.invoke("handle", SENTENCE).splitlines()) == 8


def test_wordcount_fails_with_its_last_line_of_stderr(plugin: Starter) -> None:
    worker = plugin("wordcount", config={"TOP": "many"}, granted=("config",))
    message = error_of(worker, "handle", "a")
    assert message.startswith("exited with status 1")
    assert "expected a number of lines in TOP" in message


def test_wordcount_counts_a_long_text(plugin: Starter) -> None:
    source = random.Random(8)
    words = ["".join(source.choices("abcdé", k=source.randrange(1, 6))) for _ in range(100_000)]
    expected = sorted(Counter(words).items(), key=lambda item: (-item[1], item[0].encode()))
    reply = plugin("wordcount", granted=()).invoke("handle", " ".join(words))
    assert reply == "".join(f"{count} {word}\n" for word, count in expected)


# ---- webhook-format ----


def push(**fields: object) -> str:
    return json.dumps(
        {
            "ref": "refs/heads/main",
            "created": False,
            "deleted": False,
            "forced": False,
            "compare": "https://git.example/acme/site/compare/1...2",
            "pusher": {"name": "alice"},
            "repository": {"full_name": "acme/site"},
            "commits": [{"message": "Add a page"}, {"message": "Fix the header\n\nIt was too high."}],
            "head_commit": {"message": "Fix the header\n\nIt was too high."},
            **fields,
        }
    )


LINK: Final = "https://git.example/acme/site/compare/1...2"


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (push(), f"alice pushed 2 commits to acme/site main: Fix the header (and 1 more) {LINK}"),
        (
            push(forced=True, commits=[{"message": "One"}], head_commit=None),
            f"alice force-pushed 1 commit to acme/site main: One {LINK}",
        ),
        (
            push(ref="refs/heads/a/b", created=True, commits=[], compare=None),
            "alice created branch a/b in acme/site",
        ),
        (push(ref="refs/tags/v1", deleted=True), "alice deleted tag v1 in acme/site"),
        (
            push(ref="refs/tags/v1", commits=[{}], head_commit={}, compare="javascript:x"),
            "alice pushed 1 commit to acme/site tag v1: (no message)",
        ),
        (
            push(pusher={"name": "a\x1b[31m\r\nb\u2028c"}, sender={"login": "x"}, commits=[], compare=""),
            "a [31m b c moved branch main in acme/site",
        ),
        (
            push(repository={"full_name": "😀" * 101}, commits=[], compare=""),
            "alice moved branch main in " + "😀" * 99 + "…",
        ),
        (json.dumps({"ref": "refs/heads/x"}), "someone moved branch x in an unnamed repository"),
    ],
)
def test_webhook_format_makes_one_line_of_a_push(event: str, line: str, plugin: Starter) -> None:
    assert plugin("webhook-format").invoke("handle", event) == line


def test_webhook_format_refuses_what_is_no_push(plugin: Starter) -> None:
    worker = plugin("webhook-format")
    assert error_of(worker, "handle", "{").startswith("expected a JSON document: ")
    for other in ("{}", "null", "[]", "7", '{"ref": 7}', '{"zen": "Keep it logically awesome."}'):
        assert error_of(worker, "handle", other) == "expected a push event: an object with a member ref"
    assert error_of(worker, "handle", '{"ref": "main"}') == (
        "expected a ref that begins with refs/heads/ or refs/tags/, found main"
    )


# ---- native-hello ----


def test_native_hello_greets(plugin: Starter) -> None:
    worker = plugin("native-hello")
    assert worker.invoke("handle", "Zoë") == "hello, Zoë!"
    assert worker.invoke("handle", "") == "hello, world!"
    assert error_of(worker, "handle", "a\nb") == "expected one name, found several lines"


def test_native_hello_tells_where_it_runs(plugin: Starter) -> None:
    worker = plugin("native-hello", new=True)
    system = os.uname()
    assert worker.invoke("where") == (
        f"process {worker.process.pid}, user {os.getuid()}, Linux {system.release} on {system.machine}"
    )
    assert [(level, text) for _, level, text in worker.logs] == [(1, "told where it runs")]
