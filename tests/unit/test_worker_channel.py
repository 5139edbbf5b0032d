"""The worker's end of its connection: however the stream comes in, whole frames or an error."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterable

import pytest

from circleosd.worker import frames
from circleosd.worker.channel import Channel
from circleosd.worker.frames import Frame, FrameError


def received(pieces: Iterable[bytes]) -> list[Frame]:
    """The frames that a worker takes out of a stream that comes in these pieces and ends."""
    mine, its = socket.socketpair()

    def send() -> None:
        with mine:
            for piece in pieces:
                mine.sendall(piece)

    sending = threading.Thread(target=send)
    sending.start()
    with its:
        try:
            channel, found = Channel(its), []
            while (frame := channel.receive()) is not None:
                found.append(frame)
            return found
        finally:
            its.shutdown(socket.SHUT_RD)
            sending.join()


@pytest.mark.parametrize("piece", [1, 2, 3, 8, 9, 10, 1000])
def test_frames_come_out_whole_however_the_stream_is_cut(piece: int) -> None:
    bodies = [b"", b"x", b"yy" * 50]
    stream = b"".join(frames.encode(frames.HOST_REPLY, number, body) for number, body in enumerate(bodies))
    found = received(stream[start : start + piece] for start in range(0, len(stream), piece))
    assert [(frame.call_id, bytes(frame.body)) for frame in found] == list(enumerate(bodies))


@pytest.mark.parametrize("most", [1, 8, 9, 20, 100_000])
def test_a_stream_that_ends_within_a_frame_is_an_error(most: int) -> None:
    with pytest.raises(FrameError, match="ends within it"):
        received([frames.encode(frames.HOST_REPLY, 1, b"x" * 200_000)[:most]])


@pytest.mark.parametrize(("kind", "bound"), list(frames.TO_WORKER.items()))
def test_a_frame_beyond_its_kinds_bound_is_refused_by_its_header_alone(kind: int, bound: int) -> None:
    with pytest.raises(FrameError, match="bound"):
        received([frames.HEADER.pack(bound + 1, kind, 1)])


def test_a_manager_cannot_send_what_only_a_worker_sends() -> None:
    with pytest.raises(FrameError, match="unknown here"):
        received([frames.encode(frames.RESULT, 1, b"f")])


def test_random_bytes_give_frames_or_a_frame_error_and_nothing_else() -> None:
    randomness = random.Random(4)
    for _ in range(500):
        data = randomness.randbytes(randomness.randrange(64))
        try:
            found = received([data])
        except FrameError:
            continue
        assert sum(frames.HEADER.size + len(frame.body) for frame in found) == len(data)
