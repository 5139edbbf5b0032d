# The full-stack acceptance test of CircleOSD, over the machine of the NixOS test driver (nixos/lib/test-driver).
#
# The NixOS VM test runs this file as its testScript; tests/systemd runs the same file over a booted container. Both
# offer CircleOSD installed and enabled; nginx.service, not started, and broken.service, a oneshot that exits with
# status 3, both in the catalog; alice (uid 1000) and bob (1001), members of the group circleosd, and mallory (1002),
# who is not; plugins/ in /etc/circleosd-test/plugins, and nixos-test/plugins/, built, in /etc/circleosd-test/hostile;
# and server.idle_exit set to 3 seconds.

import json
import shlex

PLUGINS = "/etc/circleosd-test/plugins"
HOSTILE = "/etc/circleosd-test/hostile"
# The plugin that tests/integration/made.py calls `caller`: its function `call` makes the host call that is its payload.
CALLER = (
    "AGFzbQEAAAABEQNgAn9/AX9gAX8Bf2ABfwF+Ai8CCWNpcmNsZW9zZAlob3N0X2NhbGwAAAljaXJjbGVvc2QLaG9zdF9hbnN3ZXIAAAMEAwECAgUD"
    "AQAoBgYBfwBBAQsHRAUGbWVtb3J5AgANY2lyY2xlb3NkX2FiaQMAEGNpcmNsZW9zZF9idWZmZXIAAgRjYWxsAAMNdW50aWxfcmVmdXNlZAAECmID"
    "EABBgAhBACAAQYCAwABNGwsiAQF/QYAIIAAQACEBQYAIQYCAwAAQARpCgAhCIIYgAa2ECywBAX8DQEGACCAAEAAhASABQQBODQALQYAIQYCAwAAQ"
    "ARpCgAhCIIYgAa2ECwBTBG5hbWUBHwMACWhvc3RfY2FsbAELaG9zdF9hbnN3ZXIDBGNhbGwCHwIDAgADbGVuAQZhbnN3ZXIEAgADbGVuAQZhbnN3"
    "ZXIDCgEEAQAFYWdhaW4="
)
SERVICES = {"auth": "auth-service", "registry": "service-registry", "plugins": "plugin-manager"}


def line(arguments, user=None):
    """The shell command that runs circlectl as a user."""
    command = f"circlectl {arguments}"
    return f"su {user} -c {shlex.quote(command)}" if user else command


def ctl(arguments, user=None):
    """Run circlectl, which must succeed, and return its output."""
    return machine.succeed(f"{line(arguments, user)} 2>&1")


def data(arguments, user=None):
    """Run circlectl and return the reply's data."""
    return json.loads(machine.succeed(line(f"{arguments} --json", user)))


def refused(arguments, status, text, user=None):
    """Run circlectl, which must fail with an exit status and a message."""
    got, output = machine.execute(f"{line(arguments, user)} 2>&1")
    assert got == status, f"circlectl {arguments}: exit status {got}, expected {status}: {output}"
    assert text in output, f"circlectl {arguments}: {output}"


def within(seconds, command):
    """Repeat a shell command until it succeeds. Older drivers take time spans as integers, newer ones as timedeltas."""
    machine.succeed(f"timeout {seconds} bash -c {shlex.quote(f'until {command}; do sleep 0.2; done')} 2>&1")


def write(name, artifact, **manifest):
    """Put a plugin and its manifest into /tmp/plugins; `artifact` is a command that prints it."""
    text = shlex.quote(json.dumps({"name": name, **manifest}))
    path = f"/tmp/plugins/{name}.wasm"
    machine.succeed(f"mkdir -p /tmp/plugins && {artifact} >{path} && echo {text} >/tmp/plugins/{name}.json")
    return path


def active(unit):
    return machine.get_unit_property(unit, "ActiveState")


def in_background(command, output="/dev/null"):
    """Run a command for as long as it takes; nothing of it holds the test driver's shell."""
    machine.succeed(f"( {command} ) >{output} 2>&1 </dev/null &")


start_all()

with subtest("the sockets listen and nothing runs"):
    machine.wait_for_unit("circleosd.target")
    for short in SERVICES:
        assert active(f"circleosd-{short}.socket") == "active"
        assert active(f"circleosd-{short}.service") == "inactive", short
    mode = machine.succeed("stat -c '%a %U %G' /run/circleosd/*.sock")
    assert set(mode.splitlines()) == {"660 root circleosd"}, mode
    machine.succeed("systemctl start 'circleosd-*.socket'")
    # Without --all systemctl's patterns leave out what is inactive.
    machine.succeed("systemctl stop 'circleosd-*.socket' && systemctl start --all 'circleosd-*.socket'")
    assert active("circleosd-auth.socket") == "active"

with subtest("the first call starts a service, as a user of its own"):
    for short in SERVICES:
        unit = f"circleosd-{short}.service"
        assert {row["service"] for row in data("system status")} == set(SERVICES.values())
        # Without another request it exits after 3 seconds, in which a busy machine gets little done.
        user = f"stat -c %U /proc/$(systemctl show -P MainPID {unit})"
        status = f"systemctl show -P StatusText {unit} | grep listening"
        shown = machine.wait_until_succeeds(f"circlectl system status >/dev/null && {user} && {status}")
        assert shown.splitlines()[0] == f"circleosd-{short}"

with subtest("users, and what they may do"):
    machine.succeed("echo correct-horse | circlectl user create alice --role operator --uid 1000 --password-stdin")
    assert data("user whoami", "alice")["role"] == "operator"
    refused("service list", 4, "needs the role viewer", "bob")
    refused("service list", 12, "only members of the group", "mallory")
    machine.succeed("echo battery-staple | circlectl user create bob --password-stdin")
    machine.succeed(f"echo battery-staple | {line('user login bob --password-stdin', 'bob')}")
    assert data("user whoami", "bob")["user"] == "bob"
    assert "nginx" in ctl("service list", "bob")
    refused("service start nginx", 4, "needs the role operator", "bob")
    refused("user create eve --uid 4321", 4, "needs the role admin", "bob")

with subtest("a real service is started, watched, failed and restarted"):
    in_background(f"timeout 60 {line('service watch nginx')}", "/tmp/watched")
    machine.wait_until_succeeds("grep -q inactive /tmp/watched")
    assert data("service start nginx", "alice")["state"] == "active"
    machine.succeed("systemctl is-active nginx")
    machine.wait_until_succeeds("grep -q 'nginx: active' /tmp/watched")
    machine.succeed("systemctl kill --signal=KILL nginx")
    machine.wait_until_succeeds("grep -q 'nginx: failed' /tmp/watched")
    status = data("service status nginx", "alice")
    assert (status["state"], status["result"]) == ("failed", "signal"), status
    assert data("service restart nginx", "alice")["state"] == "active"
    assert data("service reload nginx", "alice")["state"] == "active"
    assert data("service status nginx")["pid"] == int(machine.get_unit_property("nginx.service", "MainPID"))
    assert "nginx" in ctl("service logs nginx --lines 5", "alice").lower()
    assert data("service stop nginx", "alice")["state"] == "inactive"
    machine.fail("systemctl is-active nginx")

with subtest("a unit that cannot start says why"):
    refused("service start broken", 11, "exit status 3", "alice")
    refused("service start broken", 11, "this service is broken", "alice")
    refused("service start sshd", 5, "no service sshd in the catalog", "alice")

with subtest("a rule allows one act on one object, and the record tells of the rest"):
    machine.succeed("circlectl user grant bob service:restart nginx")
    assert data("service restart nginx", "bob")["state"] == "active"
    refused("service stop nginx", 4, "bob", "bob")
    refused("service restart broken", 4, "bob", "bob")
    assert data("user can bob service:restart nginx")["allowed"] is True
    assert data("user can bob service:stop nginx")["allowed"] is False
    machine.succeed("circlectl user grant bob service:restart 'ng*' --deny")
    # Every service knows within a second.
    within(20, f"! {line('service restart nginx', 'bob')}")
    refused("service restart nginx", 4, "bob", "bob")
    acts = [(row["action"], row["object"], row["error"]) for row in data("system history --user bob --lines 100")]
    assert ("restart", "nginx", None) in acts, acts
    assert ("stop", "nginx", "denied") in acts, acts
    assert ("restart", "broken", "denied") in acts, acts
    machine.succeed("circlectl system history --verify")
    assert data("service stop nginx", "alice")["state"] == "inactive"

with subtest("stopping what is started on demand says so"):
    stop = '{"action":"stop","name":"auth-service"}'
    reply = machine.succeed(f"echo '{stop}' | socat -t10 - UNIX:/run/circleosd/service-registry.sock")
    assert "circleosd-auth.socket is still listening" in reply, reply
    assert data("user list")

with subtest("plugins run each in a unit of its own"):
    assert data(f"plugin load {PLUGINS}/example.wasm")["abi"] == "core"
    assert ctl("plugin invoke example handle 'from a unit'").strip() == "11 bytes, 11 characters, 3 words: from a unit"
    assert active("circleosd-plugin@example.service") == "active"
    pid = machine.get_unit_property("circleosd-plugin@example.service", "MainPID")
    owner = machine.succeed(f"stat -c %u /proc/{pid}").strip()
    assert 61184 <= int(owner) <= 65519, f"the worker runs as uid {owner}, which is no dynamic user"
    assert "plugin@example" in ctl("service list", "alice")
    refused(f"plugin load {HOSTILE}/hostile-native.so", 4, "--trust")
    ctl(f"plugin load {HOSTILE}/hostile-native.so --trust")
    ctl(f"plugin load {HOSTILE}/hostile-wasm.wasm")
    for name in ("hostile-native", "hostile-wasm"):
        assert ctl(f"plugin invoke {name} ok here").strip() == "here"
        assert active(f"circleosd-plugin@{name}.service") == "active"

with subtest("a plugin that crashes, hangs or eats memory costs its own unit, and nobody else notices"):
    for name in ("hostile-native", "hostile-wasm"):
        refused(f"plugin invoke {name} crash x", 10, "SIGSEGV" if name == "hostile-native" else "unreachable")
        assert ctl(f"plugin invoke {name} ok again").strip() == "again"
        refused(f"plugin invoke {name} hang x", 9, "timeout")
        assert ctl("plugin invoke example upper meanwhile").strip() == "MEANWHILE"
        assert ctl(f"plugin invoke {name} ok again").strip() == "again"
        ctl(f"plugin invoke {name} eat x")
        assert ctl(f"plugin invoke {name} ok again").strip() == "again"
    escaped = ctl("plugin invoke hostile-native escape")
    for refusal in ("fork refused", "exec refused", "socket refused"):
        assert refusal in escaped, escaped
    places = ("/etc", "/run", "/tmp", "/var/tmp", "/dev/shm", "/var/lib", "/run/circleosd", "/var/cache", "/home/alice")
    paths = shlex.quote("\n".join(f"{place}/x" for place in places))
    assert ctl(f"plugin invoke hostile-native scribble {paths}").strip() == "", "the plugin could write somewhere"
    pid = machine.get_unit_property("circleosd-plugin@hostile-native.service", "MainPID")
    interfaces = machine.succeed(f"nsenter --target {pid} --net cat /proc/net/dev | tail -n +3 | cut -d: -f1").split()
    assert interfaces in ([], ["lo"]), f"the worker has the network interfaces {interfaces}"

with subtest("a signed plugin is loaded, and what was changed since is not"):
    counter = write("counter", f"cat {PLUGINS}/examples/counter/counter.wasm", capabilities=["kv"])
    machine.succeed("ssh-keygen -q -t ed25519 -N '' -f /tmp/plugins/key")
    ctl(f"plugin sign {counter} --key /tmp/plugins/key")
    machine.succeed("echo alice@example.org $(cat /tmp/plugins/key.pub) >>/etc/circleosd/trusted-signers")
    assert "good signature by alice@example.org" in ctl(f"plugin verify {counter}")
    assert data(f"plugin load {counter} --grant kv")["signer"] == "alice@example.org"
    assert [ctl("plugin invoke counter handle visits").strip() for _ in range(2)] == ["1", "2"]
    machine.succeed('sed -i \'s/"kv"/"clock"/\' /tmp/plugins/counter.json')
    refused(f"plugin load {counter}", 4, "changed after signing")

with subtest("a plugin restarts the service that it was granted and no other, and the record names it"):
    healer = write("healer", f"echo {CALLER} | base64 -d", capabilities=["services:read", "services:restart:*"])
    data(f"plugin load {healer} --grant services:read --grant services:restart:nginx")

    def heals(call, **args):
        request = json.dumps({"call": f"services.{call}", "args": args})
        return f"plugin invoke healer call {shlex.quote(request)}"

    assert "nginx" in {service["name"] for service in json.loads(data(heals("list")))}
    assert json.loads(data(heals("status", name="nginx")))["state"] == "inactive"
    ctl(heals("restart", name="nginx"))
    machine.succeed("systemctl is-active nginx")
    refused(heals("restart", name="broken"), 10, "the capability services:restart:broken")
    assert "plugin healer" in ctl("system history --object nginx")
    ctl("plugin revoke healer services:restart:nginx")
    refused(heals("restart", name="nginx"), 10, "the capability services:restart:nginx")
    ctl("service stop nginx")
    for name in ("healer", "counter"):
        ctl(f"plugin unload {name}")

with subtest("every service comes back from SIGKILL under load, and nothing acknowledged is lost"):
    machine.succeed("for i in $(seq 5); do echo long-enough | circlectl user create before$i --password-stdin; done")
    for short in SERVICES:
        in_background("for i in $(seq 40); do circlectl system status; circlectl plugin invoke example upper x; done")
        machine.succeed(f"systemctl kill --signal=KILL circleosd-{short}.service")
        within(60, "circlectl system status")
        assert ctl("plugin invoke example upper back").strip() == "BACK"
    names = {user["name"] for user in data("user list")}
    assert {f"before{number}" for number in range(1, 6)} <= names

with subtest("after a reboot the state is back"):
    machine.shutdown()
    machine.start()
    machine.wait_for_unit("circleosd.target")
    assert {"alice", "bob", "before1"} <= {user["name"] for user in data("user list")}
    assert ctl("plugin invoke example crc32 hello").strip() == "3610a686"
    assert any(row["object"] == "alice" for row in data("system history --lines 1000"))
    assert data("user whoami", "bob")["user"] == "bob", "the session has survived"

with subtest("idle, no process of CircleOSD is left"):
    commands = "(auth-service|service-registry|plugin-manager|worker)"
    within(90, f"! pgrep -f 'circleosd(-wrapped)?[ ]{commands}'")
    for short in SERVICES:
        assert active(f"circleosd-{short}.socket") == "active"
        assert active(f"circleosd-{short}.service") == "inactive"

with subtest("the journal holds the structured record of it"):
    refusals = "-t circleosd-service-registry MESSAGE_ID=a85b7acb4f1f4652a20f4c30fd25298e"
    denied = machine.succeed(f"journalctl -o json {refusals} CIRCLEOSD_OBJECT=nginx CIRCLEOSD_ACTION=start")
    row = json.loads(denied.splitlines()[-1])
    assert (row["CIRCLEOSD_ACTION"], row["CIRCLEOSD_USER"], row["CIRCLEOSD_UID"]) == ("start", "bob", "1001"), row
    explained = machine.succeed("journalctl -x -t circleosd-service-registry CIRCLEOSD_ACTION=start | cat")
    assert "CircleOSD refused a request" in explained
