"""`circleosd COMMAND`: the composition root, the only place that picks implementations."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from circleosd import __version__, paths
from circleosd.activation import passed_socket
from circleosd.errors import CircleError, Unavailable, shortage

if TYPE_CHECKING:
    import socket
    from pathlib import Path

    from circleosd.config import Settings
    from circleosd.database import Database
    from circleosd.handlers import Handlers, Identify
    from circleosd.ledger import Ledger
    from circleosd.registry.units import UnitManager
    from circleosd.service import Service

    Composed = tuple[Service, Database, int]

USAGE = """usage: circleosd COMMAND

  up [--dir DIR]      run all of CircleOSD in the foreground, without systemd
  auth-service        users, logins, sessions        } started by systemd or by `circleosd up`,
  service-registry    names and the units behind them} each with its socket
  plugin-manager      loads and invokes plugins      }
  worker NAME         runs the code of one plugin; started for plugin-manager
  polkit-rule [DIR]   write the polkit rule for the cataloged units; started by systemd, as root
  check-settings      check whether services would start with the settings of this host
  --version
"""


def main() -> NoReturn:
    """Run one command and exit with its status."""
    gc.disable()  # nothing becomes garbage before everything is imported: see `serve`
    argv = sys.argv[1:]
    sys.stderr = sys.stderr or _null()  # if it is closed, print() would use standard output
    try:
        sys.exit(run(argv))
    except CircleError as error:
        from circleosd.systemd import journal

        journal.complain(f"circleosd: {error}")
        sys.exit(error.exit_status)
    except KeyboardInterrupt:  # while it starts; later, `up` ends in order
        sys.exit(130)  # as a shell counts SIGINT


def _null() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def run(argv: list[str]) -> int:
    """Carry out a command line; return the exit status."""
    match argv:
        case ["worker", name] if _is_name(name):
            from circleosd.scheduling import take_short_turns
            from circleosd.worker.main import main as worker

            take_short_turns()
            worker(name)
        case [service] if service in paths.SERVICES:
            serve(service)
        case ["polkit-rule"]:
            from circleosd import polkit

            polkit.main()
        case ["polkit-rule", directory] if _is_name(directory):
            from pathlib import Path

            from circleosd import polkit
            from circleosd.systemd import journal

            text, problems = polkit.of_draft(Path(directory))
            for problem in problems:
                journal.complain(f"circleosd: {problem}")
            _print(text)
            return 1 if problems else 0
        case ["check-settings"]:
            from circleosd import config
            from circleosd.plugins import capabilities

            environment, may_write = _as_services()
            config.load(environment, capabilities.check_configured, may_write)
        case ["up"]:
            up(None)
        case ["up", "--dir", directory] if _is_name(directory):
            up(directory)
        case ["--version"]:
            _print(f"circleosd {__version__}\n")
        case [*_, "--help" | "-h"]:
            _print(USAGE)
        case _:
            import shlex

            print(USAGE, end="", file=sys.stderr)
            if argv:
                print(f"circleosd: invalid command line: circleosd {shlex.join(argv)}", file=sys.stderr)
            return 2
    return 0


def _print(text: str) -> None:
    """Write to standard output. Raises `Unavailable`; exits if nobody reads it any more."""
    try:
        print(text, end="", flush=True)
    except OSError as exc:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python tries again at exit, and would report that too
        if isinstance(exc, BrokenPipeError):
            sys.exit(141)  # as a shell counts SIGPIPE
        raise Unavailable(f"cannot write the output: {exc.strerror or exc}") from exc


def _as_services() -> tuple[dict[str, str], paths.Check]:
    """The variables that determine which settings are read, and whose. Root becomes a user of the system's services, if
    there is one.

    Root can read files that the services cannot, and may have some at home that they do not look for. A directory that
    is given explicitly may be a draft.
    """
    import pwd

    environment = dict(os.environ)
    if os.geteuid() == 0 and not os.environ.get("CIRCLEOSD_CONFIG_DIR"):
        with contextlib.suppress(KeyError):
            service = pwd.getpwnam("circleosd-auth")
            os.setgroups([])
            os.setgid(service.pw_gid)
            os.setuid(service.pw_uid)
            environment.pop("XDG_CONFIG_HOME", None)
            environment["HOME"] = service.pw_dir
            return environment, paths.only(0)
    return environment, paths.anybody


def _is_name(word: str) -> bool:
    """Whether this can be a name: it is not empty, and not a flag."""
    return word != "" and not word.startswith("-")


def serve(name: str) -> None:
    """Run one of the three services on the passed socket. A service that cannot start tells waiting clients why."""
    from circleosd.refusal import refuse

    try:
        listener = passed_socket(os.environ, os.getpid())
    except OSError as exc:
        raise Unavailable(f"cannot start {name}: {exc}") from exc
    with contextlib.ExitStack() as stack:
        try:
            _import_asyncio()
            from circleosd import threads
            from circleosd.systemd import journal

            journal.set_up()
            runner = stack.enter_context(threads.runner())
            settings, composed = runner.run(_composed(name, listener))
        except Exception as exc:
            known = exc if isinstance(exc, (CircleError, OSError)) else shortage(exc)
            if not known:
                import logging

                logging.getLogger(__name__).exception("%s cannot start", name)
            why = Unavailable(f"{name} cannot start: {known or 'an internal error; see its log'}")
            refuse(listener, why)
            raise why from exc  # the unit is not restarted for this exit status
        gc.freeze()
        gc.enable()
        runner.run(_serve(listener, settings, composed))


def _import_asyncio() -> None:
    """Import asyncio without OpenSSL, which nothing here needs: a tenth of the start and of the memory."""
    sys.modules["ssl"] = None  # type: ignore[assignment]  # how the import system is told that there is none
    import asyncio  # noqa: F401

    del sys.modules["ssl"]


async def _serve(listener: socket.socket, settings: Settings, composed: Composed) -> None:
    import asyncio
    import signal

    from circleosd.server import Server
    from circleosd.systemd.notify import Notifier

    service, database, max_line = composed
    ahead = {0, *_uids().values()}  # root, and the services, which need one another
    try:
        server = Server(
            service, listener, settings.server, max_line=max_line, manager=Notifier(), busy=service.busy, ahead=ahead
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, server.stop)
        await server.run()
    finally:
        await service.close()
        database.close()


async def _composed(name: str, listener: socket.socket) -> tuple[Settings, Composed]:
    """The settings and the service, ready to serve."""
    from circleosd import config

    if name == "plugin-manager":
        from circleosd.plugins import capabilities

        settings = config.load(os.environ, capabilities.check_configured, _may_write())
    else:
        settings = config.load(os.environ, may_write=_may_write())
    # The other services listen next to this one, in every mode and directory.
    runtime = os.path.dirname(listener.getsockname())
    state = os.environ.get("STATE_DIRECTORY") or f"{paths.state_home(os.environ)}/circleosd/{name}"
    os.makedirs(state, mode=0o700, exist_ok=True)
    _hold(state)
    compose = {"auth-service": _auth, "service-registry": _registry, "plugin-manager": _plugins}[name]
    composed = await compose(settings, runtime, state)
    await composed[0].start()
    return settings, composed


def _hold(directory: str) -> None:
    """Keep further processes of a service out of its state directory until this one ends: they would take its acts for
    interrupted ones, and remove the files that it is writing. Raises `Unavailable`.
    """
    import fcntl

    held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise Unavailable(f"another process uses {directory}, perhaps a CircleOSD that is running elsewhere") from None
    except OSError:  # not every file system locks directories
        os.close(held)


async def _auth(settings: Settings, runtime: str, state: str) -> Composed:
    from circleosd.api import auth as contracts
    from circleosd.auth.callers import Callers
    from circleosd.auth.service import AuthService
    from circleosd.auth.sessions import Sessions
    from circleosd.auth.store import MIGRATIONS
    from circleosd.database import Database

    database = Database(f"{state}/auth.db", MIGRATIONS)
    sessions = Sessions(database, settings.auth)
    callers = Callers(database, sessions, frozenset(_uids().values()))
    handlers = AuthService(database, settings.auth, sessions, callers)
    ledger = _ledger(contracts, database, settings)
    return _service(contracts, handlers, callers.identify, ledger, settings), database, settings.auth.max_line


async def _registry(settings: Settings, runtime: str, state: str) -> Composed:
    from pathlib import Path

    from circleosd.api import auth, plugins
    from circleosd.api import registry as contracts
    from circleosd.database import Database
    from circleosd.identities import Identities
    from circleosd.policy import Grant
    from circleosd.registry import catalog
    from circleosd.registry.service import MIGRATIONS, RegistryService

    database = Database(f"{state}/registry.db", MIGRATIONS)
    directories = [Path(path) / "services.d" for path in paths.config_dirs(os.environ)]
    units = _unit_manager(settings.registry.unit_timeout)
    handlers = RegistryService(catalog.Reader(directories, _may_write()), units)
    # The plugin manager runs its workers as units, and reads and restarts the services that plugins were granted.
    workers = tuple(Grant(f"service:{verb}", "plugin@*") for verb in ("start", "stop"))
    workers += tuple(Grant(f"service:{verb}", "*") for verb in ("status", "restart"))
    identities = Identities(
        paths.socket_path(auth.SERVICE, runtime),
        timeout=settings.server.request_timeout,
        trusted={uid: workers for service, uid in _uids().items() if service == plugins.SERVICE},
    )
    ledger = _ledger(contracts, database, settings)
    service = _service(contracts, handlers, identities.identify, ledger, settings)
    return service, database, settings.registry.max_line


def _unit_manager(timeout: float) -> UnitManager:
    if supervisor := os.environ.get("CIRCLEOSD_SUPERVISOR"):
        from circleosd.registry.embedded import SupervisedUnits

        return SupervisedUnits(supervisor, timeout=timeout)
    from circleosd.systemd.units import SystemdUnits

    return SystemdUnits(scope="system" if _is_of_the_system() else "user", timeout=timeout)


def _is_of_the_system() -> bool:
    """Whether this is a service of the system's manager, not of a user's or of the embedded mode."""
    # A user manager sets this for its services, the system manager does not (systemd.exec(5)).
    return not os.environ.get("CIRCLEOSD_SUPERVISOR") and not os.environ.get("XDG_RUNTIME_DIR")


def _may_write() -> paths.Check:
    """Whose settings, catalog and signers this service goes by: they decide what others may do, to which unit."""
    given = os.environ.get("CIRCLEOSD_CONFIG_DIR")  # by whoever starts the service
    return paths.only(0) if _is_of_the_system() and not given else paths.anybody


def _take_short_turns() -> None:
    with contextlib.suppress(ImportError, OSError, MemoryError):  # if it cannot be read now, go on without
        from circleosd.scheduling import take_short_turns  # it imports ctypes, which a start need not wait for

        take_short_turns()


async def _plugins(settings: Settings, runtime: str, state: str) -> Composed:
    import asyncio
    from pathlib import Path

    from circleosd.api import auth, registry
    from circleosd.api import plugins as contracts
    from circleosd.database import Database
    from circleosd.identities import Identities
    from circleosd.plugins.artifacts import Artifacts
    from circleosd.plugins.compiled import Compiled
    from circleosd.plugins.runner import Runners
    from circleosd.plugins.service import HOST_MIGRATIONS, PluginService
    from circleosd.plugins.signatures import Signatures
    from circleosd.plugins.store import MIGRATIONS

    database = Database(f"{state}/plugins.db", MIGRATIONS)
    artifacts = Artifacts(Path(state, "store"))
    registry_path = paths.socket_path(registry.SERVICE, runtime)
    compiled = Compiled(Path(os.environ.get("CACHE_DIRECTORY") or f"{state}/compiled"), settings.plugins.cache)
    compiled.sweep(starting=True)
    directories = [Path(path) for path in paths.config_dirs(os.environ)]
    ledger = _ledger(contracts, database, settings)
    handlers = PluginService(
        database,
        Database(f"{state}/kept.db", HOST_MIGRATIONS),
        artifacts,
        Signatures(directories, os.environ, _may_write()),
        ledger,
        settings.plugins,
        registry_path,
    )
    sockets, host, failing = Path(runtime, "plugins"), handlers.host.of, handlers.quarantine
    runners = Runners(registry_path, sockets, compiled, artifacts.open, host, failing, settings.plugins)
    await handlers.start(runners)
    identities = Identities(paths.socket_path(auth.SERVICE, runtime), timeout=settings.server.request_timeout)
    asyncio.get_running_loop().call_later(1.0, _take_short_turns)
    service = _service(contracts, handlers, identities.identify, ledger, settings)
    return service, database, settings.plugins.max_line


def _ledger(contracts: Any, database: Database, settings: Settings) -> Ledger:
    from circleosd.ledger import Ledger
    from circleosd.systemd.journal import Mirror

    return Ledger(database, contracts.SERVICE, Mirror(), settings.ledger)


def _service(contracts: Any, handlers: Handlers, identify: Identify, ledger: Ledger, settings: Settings) -> Service:
    """The service that serves one module of contracts."""
    from circleosd.service import Service

    return Service(
        contracts.SERVICE,
        contracts.GROUP,
        contracts.CONTRACTS,
        handlers,
        identify=identify,
        ledger=ledger,
        request_timeout=settings.server.request_timeout,
    )


def _uids() -> dict[str, int]:
    """The uids of the services' system users (units/circleosd.sysusers.conf) that exist, by service."""
    import pwd

    uids = {}
    for service, part in paths.SERVICES.items():
        with contextlib.suppress(KeyError):
            uids[service] = pwd.getpwnam(f"circleosd-{part}").pw_uid
    return uids


def up(directory: str | None) -> None:
    """Run the embedded mode in the foreground, below `directory` if that is given."""
    _import_asyncio()
    import logging
    from pathlib import Path

    from circleosd import threads
    from circleosd.embedded.up import run as supervise

    gc.enable()
    logging.basicConfig(level=logging.INFO, format="circleosd: %(message)s", stream=sys.stderr)
    environment = os.environ
    if directory is None:
        state = Path(paths.state_home(environment))
        cache = Path(paths.cache_home(environment))
        given = environment.get("CIRCLEOSD_RUNTIME_DIR")
        runtime = Path(given or paths.user_runtime_dir(environment))
    else:
        runtime, state, cache = (Path(directory).absolute() / name for name in ("run", "state", "cache"))
    try:
        with threads.runner() as runner:
            runner.run(supervise(runtime, state, cache, _unit_directories()))
    except OSError as exc:
        raise Unavailable(f"cannot run CircleOSD at {runtime}: {exc.strerror or exc}") from exc


def _unit_directories() -> tuple[Path, ...]:
    """Directories with unit files: CircleOSD's in the source tree or next to the installation, then systemd's."""
    from pathlib import Path

    package = Path(__file__).parent  # in the source tree, or in PREFIX/lib/pythonX.Y/site-packages
    own = [package.parent / "units", *(prefix / "share/circleosd/units" for prefix in package.parents[3:4])]
    given = [Path(item) for item in os.environ.get("CIRCLEOSD_UNIT_PATH", "").split(":") if item]
    system = (Path("/etc/systemd/system"), Path("/usr/lib/systemd/system"), Path("/lib/systemd/system"))
    return (*given, *(path for path in own if path.is_dir()), *system)


if __name__ == "__main__":
    main()
