"""Native plugins in a real worker: the C interface, its bounds, and what the process may not do."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from circleosd.worker import frames, sandbox
from circleosd.worker.limits import hard_deadline
from tests import PROJECT
from tests.native_source import native, shared_object
from tests.worker_driver import CallFailed, WorkerEnded, start

CALL = """
static int count;
HANDLER(counted) { UNUSED; SAY("%d", ++count); return 0; }
HANDLER(fail) { UNUSED; host->write(reply, payload, length); return 1; }
HANDLER(silent) { UNUSED; return 42; }
HANDLER(logs) { UNUSED; host->log(2, payload, length); host->log(99, "a\\xff", 2);
  host->log(-1, "b", 1); return 0; }
HANDLER(call) { UNUSED; const char *a; size_t n; int s = host->call(payload, length, &a, &n);
  if (a[n] != 0) abort(); host->write(reply, a, n); return s; }
HANDLER(ends) { UNUSED; SAY("%d", payload[length]); return 0; }
HANDLER(flood) { UNUSED; int i, s = 0; for (i = 0; i < 100000 && s == 0; i++) s = host->write(reply, "0123456789", 10);
  if (s != -1) abort(); return 0; }
HANDLER(broken) { UNUSED; host->write(reply, "ab\\xff", 3); return 0; }
HANDLER(on_event) { UNUSED; host->write(reply, payload, length); return 0; }
"""
PLUGIN_NAMES = ("counted", "fail", "silent", "logs", "call", "ends", "flood", "broken", "on_event")


def plugin() -> bytes:
    return native(CALL, *PLUGIN_NAMES, more='.description = "tries everything"')


@pytest.mark.parametrize("compiler", ["gcc -xc", "clang -xc++"])
def test_the_example_in_the_header_works(compiler: str) -> None:
    if not shutil.which(compiler.split()[0]):
        pytest.skip("needs clang")
    header = (PROJECT / "plugins/include/circleosd_plugin.h").read_text()
    example = header.partition("#include <circleosd_plugin.h>\n")[2].partition(" *     cc -shared")[0]
    source = "\n".join(line.removeprefix(" *") for line in example.splitlines())
    with start(shared_object(source, *compiler.split()), plugin_type="native") as worker:
        ready = worker.ready()
        assert (ready.abi, ready.functions, ready.description) == ("native", ["handle"], "greets")
        assert worker.invoke("handle", "wörld") == "hello, wörld"


def test_calls_replies_errors_and_state() -> None:
    with start(plugin(), plugin_type="native") as worker:
        assert worker.ready().description == "tries everything"
        for payload in ("", "x", "größe", "x" * 1_000_000):
            assert worker.invoke("echo", payload) == payload
        assert [worker.invoke("counted") for _ in range(2)] == ["1", "2"]
        assert worker.invoke("ends", "some text") == "0"
        with pytest.raises(CallFailed) as failed:
            worker.invoke("fail", "my own words")
        assert (failed.value.code, failed.value.message) == ("plugin-failed", "my own words")
        with pytest.raises(CallFailed, match=r"^plugin-failed: returned 42$"):
            worker.invoke("silent")
        with pytest.raises(CallFailed, match="has no function 'other': it has echo, counted"):
            worker.invoke("other")
        assert worker.wait_for(worker.send("t", "p", frames.EVENT)).body == b'{"topic":"t","payload":"p"}'


def test_log_and_host_calls() -> None:
    with start(plugin(), plugin_type="native", granted=("kv",)) as worker:
        worker.answer = lambda call, args: frames.host_reply_body(args)
        worker.ready()
        worker.invoke("logs", "grüße")
        assert worker.logs == [(1, 2, "grüße"), (1, 3, "a\ufffd"), (1, 3, "b")]
        assert worker.invoke("call", '{"call":"kv.get","args":{"key":"ä"}}') == '{"key":"ä"}'
        with pytest.raises(CallFailed, match="denied: this plugin has not been granted the capability services:read"):
            worker.invoke("call", '{"call":"services.list"}')
        with pytest.raises(CallFailed, match="bad-request: the host call is not JSON"):
            worker.invoke("call", "")


SPEAK = r"""
static const char *keys = "{\"call\":\"kv.keys\",\"args\":{\"prefix\":\"\"}}";
HANDLER(says) { UNUSED; for (;;) { host->log(1, "still here", 10); usleep(20000); } return 0; }
HANDLER(asks) { UNUSED; host->log(1, "to be", 5); host->log(1, "unread", 6);
  host->call(keys, strlen(keys), 0, 0); return 0; }"""


@pytest.mark.parametrize("does", ["says", "asks"])
def test_a_plugin_that_speaks_to_a_manager_that_has_gone_ends_with_it_and_quietly(does: str) -> None:
    with start(native(SPEAK, "says", "asks"), plugin_type="native", granted=("kv",), time=60) as worker:
        worker.ready()
        worker.send(does)
        worker.receive()
        assert worker.close() == 0
    assert worker.errors == ""


def test_replies_are_held_to_the_limit_and_to_utf8() -> None:
    with start(plugin(), plugin_type="native", output=50_000) as worker:
        worker.ready()
        with pytest.raises(CallFailed, match="wrote more than its limit for output of 50000 bytes") as caught:
            worker.invoke("flood")
        assert caught.value.code == "limit"
        assert worker.invoke("echo", "x" * 50_000) == "x" * 50_000
        with pytest.raises(CallFailed, match="wrote more than its limit for output of 50000 bytes"):
            worker.invoke("echo", "x" * 50_001)
        with pytest.raises(CallFailed, match="gave a reply that is not UTF-8: invalid start byte at byte 2"):
            worker.invoke("broken")
        assert worker.invoke("echo", "fine") == "fine"


def test_another_entry_can_be_named() -> None:
    source = """
static const circleosd_handler handlers[] = { {"echo", echo} };
static const circleosd_plugin plugin = { 1, 1, "x", 0, handlers, 0 };
CIRCLEOSD_EXPORT const circleosd_plugin *start_here(void) { return &plugin; }"""
    artifact = shared_object(source)
    with start(artifact, plugin_type="native", entry="start_here") as worker:
        worker.ready()
        assert worker.invoke("echo", "x") == "x"
    with start(artifact, plugin_type="native") as worker:
        with pytest.raises(CallFailed, match="it exports no function plugin_init") as caught:
            worker.ready()
        assert caught.value.code == "bad-request"


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        ("return 0;", "its plugin_init returned NULL"),
        ("static circleosd_plugin p = { 2, 1, 0, 0, 0, 0 }; return &p;", "it has version 2 of the native ABI, not 1"),
        ("static circleosd_plugin p = { 1, 0, 0, 0, 0, 0 }; return &p;", "it has 0 handlers, not 1 to 256"),
        ("static circleosd_plugin p = { 1, 1, 0, 0, 0, 0 }; return &p;", "its pointer to its handlers is NULL"),
        (
            "static circleosd_handler h[257]; static circleosd_plugin p = { 1, 257, 0, 0, h, 0 }; return &p;",
            "it has 257 handlers, not 1 to 256",
        ),
        (
            'static circleosd_handler h[] = { { "a", echo }, { "a", echo } };'
            " static circleosd_plugin p = { 1, 2, 0, 0, h, 0 }; return &p;",
            "its handler 1 has no name, no function, or a name twice",
        ),
        (
            "static char d[5000]; memset(d, 'x', 4999); static circleosd_handler h = { \"a\", echo };"
            " static circleosd_plugin p = { 1, 1, 0, d, &h, 0 }; return &p;",
            "its description is longer than 4096 bytes",
        ),
        (
            "static circleosd_handler h = { 0, echo }; static circleosd_plugin p = { 1, 1, 0, 0, &h, 0 }; return &p;",
            "its handler 0 has no name, no function, or a name twice",
        ),
        (
            'static circleosd_handler h = { "a\\xff", echo };'
            " static circleosd_plugin p = { 1, 1, 0, 0, &h, 0 }; return &p;",
            "its handler's name is not UTF-8",
        ),
        (
            'static circleosd_handler h = { "a", echo };'
            " static circleosd_plugin p = { 1, 1, 0, 0, &h, echo }; return &p;",
            "",
        ),
        (
            'HANDLER(no); static circleosd_handler h = { "a", echo };'
            " static circleosd_plugin p = { 1, 1, 0, 0, &h, no }; return &p;",
            "its init failed: no licence",
        ),
    ],
)
def test_what_plugin_init_returns_is_checked(init: str, reason: str) -> None:
    source = f"""HANDLER(no) {{ UNUSED; SAY("no licence"); return 1; }}
CIRCLEOSD_EXPORT const circleosd_plugin *plugin_init(void) {{ {init.replace("HANDLER(no); ", "")} }}"""
    with start(shared_object(source), plugin_type="native") as worker:
        if not reason:
            worker.ready()
            return
        with pytest.raises(CallFailed) as caught:
            worker.ready()
        assert reason in caught.value.message


def test_a_library_that_cannot_be_linked_is_refused_with_the_linkers_words() -> None:
    artifact = shared_object("extern int no_such_thing(void); int f(void) { return no_such_thing(); }")
    refused = pytest.raises(CallFailed, match=r"^bad-request: undefined symbol: no_such_thing$")
    with start(artifact, plugin_type="native") as worker, refused:
        worker.ready()


@pytest.mark.parametrize("form", ["-pie", "-static-pie"])
def test_a_program_is_refused_as_what_it_is(form: str, tmp_path: Path) -> None:
    """A position-independent one has the type of a shared object (ET_DYN, elf(5))."""
    gcc = ["gcc", "-xc", "-fPIE", form, "-o", "program", "-"]
    subprocess.run(gcc, cwd=tmp_path, input=b"int main(void) { return 0; }", check=True)
    refused = pytest.raises(CallFailed, match=r"it is an executable, not a shared object: link it with -shared$")
    with start((tmp_path / "program").read_bytes(), plugin_type="native") as worker, refused:
        worker.ready()


@pytest.mark.parametrize("size", ["2 << 20", "200 << 20", "1 << 30"])
def test_a_library_whose_variables_are_larger_than_its_memory_is_refused_for_that(size: str) -> None:
    fill = f"static char room[{size}]; HANDLER(fill) {{ UNUSED; memset(room, 1, sizeof room); return 0; }}"
    refused = pytest.raises(CallFailed, match=r"^limit: its variables take \d+ bytes: its limit .* is 1048576 bytes$")
    with start(native(fill, "fill"), plugin_type="native", memory=1 << 20) as worker, refused:
        worker.ready()


def test_what_a_library_only_reads_does_not_count_as_its_memory() -> None:
    artifact = native("const char room[2 << 20] = {1}; HANDLER(look) { UNUSED; return 0; }", "look")
    with start(artifact, plugin_type="native", memory=1 << 20) as worker:
        worker.ready()
        assert worker.invoke("look") == ""


def test_a_library_that_spreads_over_more_addresses_than_its_worker_has_is_refused_for_that() -> None:
    artifact = shared_object("int variable = 1;", "gcc", "-xc", "-Wl,--section-start=.data=0x20000000")
    refused = pytest.raises(CallFailed, match=r"^limit: failed to map .* than its limit for memory of 1048576 bytes$")
    with start(artifact, plugin_type="native", memory=1 << 20) as worker, refused:
        worker.ready()


def test_a_library_that_wants_a_newer_one_is_told_which_version_is_missing(tmp_path: Path) -> None:
    (tmp_path / "map").write_text("GLIBC_9.9 { cos; };")
    (tmp_path / "cos.c").write_text("double cos(double x) { return x; }")
    (tmp_path / "plugin.c").write_text("double cos(double); double f(double x) { return cos(x); }")
    gcc = ["gcc", "-shared", "-fPIC", "-fno-builtin"]
    newer = [*gcc, "-Wl,-soname,libm.so.6", "-Wl,--version-script=map", "-o", "libm.so.6", "cos.c"]
    subprocess.run(newer, cwd=tmp_path, check=True)
    subprocess.run([*gcc, "-o", "plugin.so", "plugin.c", "libm.so.6"], cwd=tmp_path, check=True)
    refused = pytest.raises(CallFailed, match=r"libm\.so\.6: version .GLIBC_9\.9. not found \(required by it\)$")
    with start((tmp_path / "plugin.so").read_bytes(), plugin_type="native") as worker, refused:
        worker.ready()


def test_handlers_run_side_by_side_when_the_limits_say_so() -> None:
    meet = """
static pthread_barrier_t barrier;
__attribute__((constructor)) static void prepare(void) { pthread_barrier_init(&barrier, 0, 3); }
HANDLER(meet) { UNUSED; pthread_barrier_wait(&barrier); return host->write(reply, payload, length); }"""
    with start(native(meet, "meet"), plugin_type="native", concurrency=3) as worker:
        worker.ready()
        sent = {worker.send("meet", name): name for name in ("first", "second", "third")}
        received = {frame.call_id: bytes(frame.body).decode() for frame in (worker.receive() for _ in sent)}
        assert received == sent


@pytest.mark.parametrize(("concurrency", "thread"), [(1, "the same"), (2, "another")])
def test_handlers_run_on_the_thread_that_loaded_the_plugin_unless_several_do(concurrency: int, thread: str) -> None:
    """Runtimes of other languages know only the thread on which they were started."""
    where = """
static pthread_t first;
HANDLER(begin) { UNUSED; first = pthread_self(); return 0; }
HANDLER(where) { UNUSED; SAY(pthread_equal(first, pthread_self()) ? "the same" : "another"); return 0; }"""
    data = native(where, "where", more=".init = begin")
    with start(data, plugin_type="native", concurrency=concurrency) as worker:
        worker.ready()
        assert [worker.invoke("where") for _ in range(3)] == [thread] * 3


def test_the_stacks_of_a_plugins_threads_count_for_its_memory_as_the_reference_says() -> None:
    run = """
static void *wait(void *gate) { return pthread_barrier_wait(gate), NULL; }
HANDLER(run) { UNUSED; pthread_t threads[40]; int count = 0; pthread_attr_t attributes; pthread_barrier_t gate;
  pthread_attr_init(&attributes); pthread_attr_setstacksize(&attributes, (size_t)atoi(payload) << 10);
  pthread_barrier_init(&gate, 0, 41);
  while (count < 40 && pthread_create(&threads[count], &attributes, wait, &gate) == 0) count++;
  SAY("%d", count);
  if (count == 40) { pthread_barrier_wait(&gate); for (int i = 0; i < 40; i++) pthread_join(threads[i], NULL); }
  return 0; }"""
    with start(native(run, "run"), plugin_type="native", memory=64 << 20) as worker:
        worker.ready()
        assert worker.invoke("run", "256") == "40"
        assert 8 <= int(worker.invoke("run", "8192")) < 40
    assert "threads, whose stacks count for `memory`" in (PROJECT / "plugins" / "ABI.md").read_text()


ENDS = {
    "segfault": ("*(volatile int *)8 = 1;", -11),
    "a floating-point exception": ("raise(SIGFPE);", -8),
    "abort": ("abort();", -6),
    "_exit": ("_exit(3);", 3),
    "exit": ("exit(0);", 0),
    "kill itself": ("kill(getpid(), SIGKILL);", -9),
    "deep recursion": ("volatile char big[1 << 16]; big[0] = 1; crash(host, payload, length, reply); big[1] = 2;", -11),
}


@pytest.mark.parametrize("end", list(ENDS))
def test_a_crash_ends_its_worker_and_nothing_else(end: str) -> None:
    code, status = ENDS[end]
    artifact = native(f"HANDLER(crash) {{ UNUSED; {code} return 0; }}", "crash")
    with start(artifact, plugin_type="native") as worker, start(artifact, plugin_type="native") as other:
        worker.ready()
        other.ready()
        with pytest.raises(WorkerEnded) as ended:
            worker.invoke("crash")
        assert ended.value.status == status
        assert other.invoke("echo", "fine") == "fine"


def test_a_line_that_is_printed_is_there_though_its_worker_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # whose part this is not
    crash = """
__attribute__((constructor)) static void begin(void) { dup2(2, 1); }
HANDLER(crash) { UNUSED; printf("so far, so good\\n"); abort(); }"""
    with start(native(crash, "crash"), plugin_type="native", forked=False) as worker:
        worker.ready()
        with pytest.raises(WorkerEnded):
            worker.invoke("crash")
    assert worker.errors == "so far, so good\n"


@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_line_that_was_printed_without_its_end_is_there_when_the_worker_ends(
    monkeypatch: pytest.MonkeyPatch, concurrency: int
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    words = """
__attribute__((constructor)) static void begin(void) { dup2(2, 1); }
HANDLER(say) { UNUSED; printf("the last words"); return 0; }"""
    with start(native(words, "say"), plugin_type="native", concurrency=concurrency, forked=False) as worker:
        worker.ready()
        worker.invoke("say")
        assert worker.close() == 0
    assert worker.errors == "the last words"


def test_a_debugger_finds_the_plugin_by_the_name_that_its_process_knows_it_by() -> None:
    named = 'HANDLER(file) { UNUSED; Dl_info found; dladdr(file, &found); SAY("%s", found.dli_fname); return 0; }'
    artifact = native(f"#include <dlfcn.h>\n{named}", "file")
    with start(artifact, plugin_type="native") as worker:
        worker.ready()
        file = Path(worker.invoke("file"))
        assert file.parent == Path(f"/proc/{worker.process.pid}/fd")
        if os.geteuid() == 0:  # a worker is nobody else's to look into (PR_SET_DUMPABLE)
            assert file.read_bytes() == artifact


@pytest.mark.parametrize("end", ["for (;;) pause();", "abort();"])
@pytest.mark.parametrize("concurrency", [1, 2])
def test_nothing_of_a_plugin_is_run_when_its_worker_ends(end: str, concurrency: int) -> None:
    artifact = native(f"__attribute__((destructor)) static void end(void) {{ {end} }}")
    with start(artifact, plugin_type="native", concurrency=concurrency, forked=False) as worker:
        worker.ready()
        assert worker.invoke("echo", "fine") == "fine"
        assert worker.close() == 0


@pytest.mark.parametrize(
    "hang",
    ["for (;;) pause();", "for (;;) ;", "sigset_t s; sigfillset(&s); sigprocmask(SIG_BLOCK, &s, 0); for (;;) pause();"],
)
def test_a_hang_ends_with_its_worker_unless_the_plugin_has_blocked_the_signal(hang: str) -> None:
    with start(
        native(f"HANDLER(hang) {{ UNUSED; {hang} return 0; }}", "hang"), plugin_type="native", time=0.2
    ) as worker:
        worker.ready()
        began = time.monotonic()
        if "BLOCK" in hang:
            worker.send("hang")
            time.sleep(1)
            assert worker.process.poll() is None, "then the manager's own deadline is what is left"
            worker.process.kill()
            return
        with pytest.raises(WorkerEnded) as ended:
            worker.invoke("hang")
        assert ended.value.status == -14
        assert time.monotonic() - began < 7  # ten times what it may take


def test_a_hang_beside_other_calls_ends_with_its_worker_however_many_they_are() -> None:
    handlers = """HANDLER(hang) { UNUSED; for (;;) pause(); return 0; }
HANDLER(nap) { UNUSED; usleep(200000); return 0; }"""
    with start(native(handlers, "hang", "nap"), plugin_type="native", concurrency=3, time=0.4) as worker:
        worker.ready()
        worker.send("hang")
        for _ in range(60):  # six seconds of them, two at a time
            worker.send("nap")
        naps: list[frames.Frame] = []
        with pytest.raises(WorkerEnded) as ended:
            naps.extend(iter(worker.receive, None))
        assert ended.value.status == -14
        assert len(naps) < 30


def test_a_hang_ends_a_worker_of_several_threads_where_it_is_alone_and_nothing_ends_an_idle_one() -> None:
    hang = "HANDLER(hang) { UNUSED; for (;;) pause(); return 0; }"
    with start(native(hang, "hang"), plugin_type="native", concurrency=3, time=0.2) as worker:
        worker.ready()
        assert worker.invoke("echo", "x") == "x"
        time.sleep(hard_deadline(0.2) + 0.2)
        assert worker.invoke("echo", "still here") == "still here"
        with pytest.raises(WorkerEnded) as ended:
            worker.invoke("hang")
        assert ended.value.status == -14


@pytest.mark.parametrize(
    "where", ["__attribute__((constructor)) static void begin(void) { for (;;) pause(); }", "init"]
)
def test_a_hang_while_loading_ends_with_its_worker(where: str) -> None:
    if where == "init":
        artifact = shared_object("const circleosd_plugin *plugin_init(void) { for (;;) pause(); }")
    else:
        artifact = native(where)
    with start(artifact, plugin_type="native", time=0.2) as worker:
        with pytest.raises(WorkerEnded) as ended:
            worker.ready()
        assert ended.value.status == -14


def test_memory_is_bounded_and_the_worker_survives_a_plugin_that_checks() -> None:
    grab = """HANDLER(grab) { UNUSED; size_t got = 0; char *p[4096];
      while (got < 4096 && (p[got] = malloc(1 << 20))) { memset(p[got], 1, 1 << 20); got++; }
      SAY("%zu", got); while (got) free(p[--got]); return 0; }"""
    with start(native(grab, "grab"), plugin_type="native", memory=64 << 20) as worker:
        worker.ready()
        assert 32 <= int(worker.invoke("grab")) <= 128
        assert worker.invoke("echo", "x" * 100_000) == "x" * 100_000


@pytest.mark.parametrize(("concurrency", "memory"), [(1, 1 << 16), (16, 64 << 20)])
def test_what_was_sent_and_answered_takes_nothing_of_a_plugins_memory_later(concurrency: int, memory: int) -> None:
    with start(native(""), plugin_type="native", concurrency=concurrency, memory=memory, output=8 << 20) as worker:
        worker.ready()
        for _ in range(2 * concurrency + 2):
            assert len(worker.invoke("echo", "x" * (8 << 20))) == 8 << 20


FORBIDDEN = """
#include <sys/fanotify.h>
#include <sys/inotify.h>
HANDLER(forks) { UNUSED; int n = 0; pid_t p; while (n < 50 && (p = fork()) != -1) { if (p == 0) _exit(0); n++; }
  SAY("%d %d", n, errno); return 0; }
HANDLER(executes) { UNUSED; execl("/bin/true", "true", (char *)0); SAY("%d", errno); return 0; }
HANDLER(connects) { UNUSED; int s = socket(AF_UNIX, SOCK_STREAM, 0); SAY("%d", s < 0 ? errno : 0); return 0; }
HANDLER(pairs) { UNUSED; int s[2]; SAY("%d", socketpair(AF_UNIX, SOCK_STREAM, 0, s) ? errno : 0); return 0; }
HANDLER(queues) { UNUSED; unsigned long context = 0;
  SAY("%d", syscall(SYS_io_setup, 1, &context) ? errno : 0); return 0; }
HANDLER(watches) { UNUSED; int a = inotify_init() < 0 ? errno : 0, b = inotify_init1(0) < 0 ? errno : 0;
  SAY("%d %d %d", a, b, fanotify_init(FAN_REPORT_FID, 0) < 0 ? errno : 0); return 0; }
HANDLER(signals) { UNUSED; SAY("%d", kill(atoi(payload), SIGKILL) ? errno : 0); return 0; }
HANDLER(opens) { UNUSED; int fd, n = 0; while (n < 5000 && (fd = open("/dev/null", O_RDONLY)) >= 0) n++;
  SAY("%d %d", n, errno); int i; for (i = 3; i < 5003; i++) if (i > 8) close(i); return 0; }
HANDLER(reads) { UNUSED; int fd = open(payload, O_RDONLY);
  SAY("%d", fd < 0 ? errno : 0); if (fd >= 0) close(fd); return 0; }
HANDLER(writes) { UNUSED; int fd = open(payload, O_WRONLY | O_CREAT | O_TRUNC, 0600);
  SAY("%d", fd < 0 ? errno : 0); if (fd >= 0) close(fd); return 0; }
HANDLER(removes) { UNUSED; SAY("%d", unlink(payload) ? errno : 0); return 0; }
HANDLER(makes) { UNUSED; SAY("%d", mkdir(payload, 0700) ? errno : 0); return 0; }
HANDLER(privileges) { UNUSED; SAY("%d %d", setuid(0) ? errno : 0, chown(payload, 1, 1) ? errno : 0); return 0; }
static void *nothing(void *x) { return x; }
HANDLER(threads) { UNUSED; pthread_t t; int e = pthread_create(&t, 0, nothing, 0); if (!e) pthread_join(t, 0);
  SAY("%d", e); return 0; }
"""
NAMES = (
    "forks",
    "executes",
    "connects",
    "pairs",
    "queues",
    "watches",
    "signals",
    "opens",
    "reads",
    "writes",
    "removes",
    "makes",
    "privileges",
    "threads",
)


def test_what_a_native_plugin_may_not_do_even_without_systemds_sandbox(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_text("untouched")
    with start(native(FORBIDDEN, *NAMES), plugin_type="native") as worker:
        sandbox = worker.ready().sandbox
        if not any(item.startswith("landlock") for item in sandbox) or "seccomp" not in sandbox:
            pytest.skip(f"this kernel offers only {sandbox}")
        assert worker.invoke("forks") == "0 1"
        assert worker.invoke("executes") == "1"
        assert worker.invoke("connects") == "1"
        assert worker.invoke("pairs") == "1"
        assert worker.invoke("queues") == "1"
        assert worker.invoke("watches") == "1 1 1"
        assert worker.invoke("signals", str(os.getpid())) == "1"
        opened, error = worker.invoke("opens").split()
        assert 0 < int(opened) < 64
        assert error == "24"
        assert worker.invoke("reads", str(there)) == "13"
        assert worker.invoke("reads", "/etc/passwd") == "13"
        assert worker.invoke("reads", f"/proc/{os.getpid()}/maps") == "13"
        assert worker.invoke("reads", "/proc/self/environ") == "13"
        for path in (
            there,
            tmp_path / "new",
            Path("/tmp/new"),
            Path("/dev/shm/new"),
            Path("/etc/new"),
            Path("/proc/self/comm"),
        ):
            assert worker.invoke("writes", str(path)) == "13", path
        assert worker.invoke("removes", str(there)) == "13"
        assert worker.invoke("makes", str(tmp_path / "directory")) == "13"
        assert worker.invoke("privileges", str(there)).endswith("1")
        assert worker.invoke("threads") == "0"
        assert worker.invoke("echo", "fine") == "fine"
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert there.read_text() == "untouched"


@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_garbage_collector_finds_the_stack_to_look_through(concurrency: int) -> None:
    """The C library reads the bounds of the first thread's from /proc/self/maps, at each call."""
    stack = """
HANDLER(stack) { UNUSED; pthread_attr_t attributes; void *lowest; size_t room;
  int error = pthread_getattr_np(pthread_self(), &attributes);
  if (!error) error = pthread_attr_getstack(&attributes, &lowest, &room);
  SAY("%d %d", error, !error && (size_t)((char *)&room - (char *)lowest) < room); return 0; }"""
    with start(native(stack, "stack"), plugin_type="native", concurrency=concurrency) as worker:
        worker.ready()
        assert [worker.invoke("stack") for _ in range(2)] == ["0 1", "0 1"]


ENVIRONMENT = """
extern char **environ;
HANDLER(everything) { UNUSED; for (char **at = environ; *at; at++) SAY("%s;", *at); return 0; }
"""


def test_a_native_plugin_sees_nothing_of_its_callers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET_KEY", "open sesame")
    monkeypatch.setenv("LANG", "C.UTF-8")
    monkeypatch.setenv("LC_TIME", "C")
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    with start(native(ENVIRONMENT, "everything"), plugin_type="native", forked=False) as worker:
        worker.ready()
        seen = dict(line.split("=", 1) for line in worker.invoke("everything").split(";") if line)
        assert {name for name in seen if not name.startswith("LC_")} == {"LANG", "TZ"}
        assert seen["LC_TIME"] == "C"
        assert seen["TZ"] == "Asia/Kathmandu"
        if os.geteuid() == 0:
            assert not Path(f"/proc/{worker.process.pid}/environ").read_bytes().strip(b"\0")


def test_a_worker_of_a_native_plugin_does_without_wasmtimes_memory() -> None:
    with start(plugin(), plugin_type="native", forked=False) as worker:
        worker.ready()
        worker.invoke("echo", "hello")
        assert int(worker.status()["VmRSS"].split()[0]) < 22 * 1024


# What Landlock leaves to whoever has the same uid. `payload` is a process or a path.
MEDDLING = """
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/xattr.h>
#include <time.h>
HANDLER(limits) { UNUSED; struct rlimit none = {0, 0};
  SAY("%d", prlimit(atoi(payload), RLIMIT_NOFILE, &none, 0) ? errno : 0); return 0; }
HANDLER(turns) { UNUSED; cpu_set_t one; CPU_ZERO(&one); CPU_SET(0, &one); struct sched_param p = {0};
  int pid = atoi(payload), a = sched_setaffinity(pid, sizeof one, &one) ? errno : 0;
  int b = sched_setscheduler(pid, SCHED_IDLE, &p) ? errno : 0;
  SAY("%d %d %d", a, b, setpriority(PRIO_PROCESS, pid, 19) ? errno : 0); return 0; }
HANDLER(files) { UNUSED; int a = chmod(payload, 0) ? errno : 0, b = utimensat(AT_FDCWD, payload, 0, 0) ? errno : 0;
  SAY("%d %d %d", a, b, setxattr(payload, "user.x", "y", 1, 0) ? errno : 0); return 0; }
HANDLER(owns) { UNUSED; SAY("%d", fcntl(0, F_SETOWN, atoi(payload)) ? errno : 0); return 0; }
HANDLER(holds) { UNUSED; int file = open(payload, O_RDONLY | O_CLOEXEC), flags = 0;
  int a = fcntl(file, F_SETLEASE, F_RDLCK) ? errno : 0, b = ioctl(file, FS_IOC_GETFLAGS, &flags) ? errno : 0;
  SAY("%d %d", a, b); return 0; }
HANDLER(keeps) { UNUSED; int a = shmget(IPC_PRIVATE, 4096, 0600) < 0 ? errno : 0;
  SAY("%d %d", a, msgget(IPC_PRIVATE, 0600) < 0 ? errno : 0); return 0; }
static void *attributes(void *error) { uint32_t given[12] = {sizeof given}; pid_t me = gettid();
  syscall(SYS_sched_getattr, me, given, sizeof given, 0);
  *(int *)error = syscall(SYS_sched_setattr, me, given, 0) ? errno : 0; return NULL; }
HANDLER(threads) { UNUSED; int a, b; pthread_t other; attributes(&a); pthread_create(&other, NULL, attributes, &b);
  pthread_join(other, NULL); SAY("%d %d", a, b); return 0; }
HANDLER(timers) { UNUSED; timer_t timer; struct sigevent e = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR2};
  int a = timer_create(CLOCK_MONOTONIC, &e, &timer) ? errno : 0; sigset_t queued; sigemptyset(&queued);
  sigaddset(&queued, SIGRTMIN); sigprocmask(SIG_BLOCK, &queued, 0); SAY("%d %d", a, raise(SIGRTMIN) ? errno : 0);
  return 0; }
HANDLER(shares) { UNUSED; long got = 0; while (got < 4096 && mmap(0, 1 << 20, PROT_READ | PROT_WRITE,
  MAP_SHARED | MAP_ANONYMOUS, -1, 0) != MAP_FAILED) got++; SAY("%ld", got); return 0; }
"""


def test_a_native_plugin_meddles_with_no_process_and_no_file_of_its_own_uid(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_text("untouched")
    before = there.stat()
    me = str(os.getpid())
    names = ("limits", "turns", "threads", "files", "owns", "holds", "keeps", "timers", "shares")
    with start(native(MEDDLING, *names), plugin_type="native", memory=64 << 20) as worker:
        if "seccomp" not in worker.ready().sandbox:
            pytest.skip("this kernel offers no seccomp")
        open_files = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert worker.invoke("limits", me) == "1"
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == open_files
        assert worker.invoke("limits", "0") == "0"
        assert worker.invoke("turns", me) == "1 1 1"
        assert worker.invoke("threads") == "1 1"  # GLib takes what it may on its first one for what it may on all
        assert worker.invoke("files", str(there)) == "1 1 1"
        assert worker.invoke("owns", me) == "1"
        assert worker.invoke("holds", sandbox.__file__) == "1 1"
        assert worker.invoke("keeps") == "1 1"
        assert worker.invoke("timers") == "11 11"
        assert 32 <= int(worker.invoke("shares")) < 512
    assert there.stat() == before
