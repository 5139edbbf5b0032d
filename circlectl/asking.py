"""Requests to the services, on behalf of the user who runs circlectl."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from circleosd import client, paths
from circleosd.api.contract import cut
from circleosd.errors import Internal

# What Python raises for a reply that does not have the form that its contract declares.
MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


@contextlib.contextmanager
def going_by_replies() -> Iterator[None]:
    """Around what uses the data of replies: raises `Internal` if they are malformed."""
    try:
        yield
    except MALFORMED as exc:
        what = cut(f"{type(exc).__name__}: {exc}")
        step = "is circlectl newer than the service? see: circlectl system status"
        raise Internal(f"a reply does not have the form that circlectl expects ({what}); {step}") from exc


class Asking:
    """Requests to the services that listen below `runtime`, with the session's token and the files opened for passing.

    `said` is called with the message that a reply may carry.
    """

    def __init__(
        self,
        runtime: str,
        token: str | None,
        files: Sequence[int] = (),
        said: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.runtime = runtime
        self._envelope = {"token": token} if token else {}
        self._files = files
        self.said = said

    def once(self, service: str, request: dict[str, Any], *, timeout: float | None = None) -> Any:
        """The data of the only reply, which may take `timeout` seconds (None: no limit). Raises `Timeout`."""
        path = paths.socket_path(service, self.runtime)
        request = {**request, **self._envelope}
        return next(client.call(path, request, files=self._files, timeout=timeout, said=self.said))

    def stream(self, service: str, request: dict[str, Any]) -> Iterator[Any]:
        """The data of each reply that has some; any amount of time may pass between two."""
        path = paths.socket_path(service, self.runtime)
        for data in client.call(path, {**request, **self._envelope}, stream=True):
            if data is not None:
                yield data
