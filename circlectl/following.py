"""`system history --follow`: the ledgers of all services as one stream."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from circlectl.asking import Asking
from circlectl.ordering import merged
from circleosd.errors import Unavailable

TOGETHER = 0.1  # seconds within which rows of different services are sorted by time
RETRY = 1.0  # seconds until a service that went away is asked again


def follow(
    ask: Asking, query: Mapping[str, Any], rows: Sequence[Any], known: Mapping[str, int], since: float
) -> Iterator[Any]:
    """The known `rows`, then new ones as they come; never ends.

    `known`: the number of each service's last known row; 0: only rows since `since`. Raises the error of the first
    service that refuses, or whose rows are malformed.
    """
    yield from rows
    waiting: queue.Queue[Any] = queue.Queue()
    for service, last in known.items():
        threading.Thread(
            target=_follow_one, args=(ask, service, dict(query), last, since, waiting.put), daemon=True
        ).start()
    while True:
        together = [waiting.get()]
        until = time.monotonic() + TOGETHER
        while (left := until - time.monotonic()) > 0:
            try:
                together.append(waiting.get(timeout=left))
            except queue.Empty:
                break
        errors = [item for item in together if isinstance(item, Exception)]
        new = [item for item in together if not isinstance(item, Exception)]
        yield from merged([[row for row in new if row["service"] == name] for name in known], time.time())
        if errors:
            raise errors[0]


def _follow_one(ask: Asking, service: str, query: dict[str, Any], last: int, since: float, put: Any) -> None:
    """Put the rows of one service; ask again when it went away, as for an upgrade."""
    while True:
        request = {**query, "action": "follow", "after": last}
        if not last:
            request["since"] = since
        try:
            for row in ask.stream(service, request):
                last = row["seq"]
                put(row)
        except Unavailable:
            time.sleep(RETRY)
        except Exception as error:  # noqa: BLE001  # `follow` raises it
            put(error)
            return
