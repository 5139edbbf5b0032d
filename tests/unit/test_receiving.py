"""What is received, cut into frames however it arrives."""

from __future__ import annotations

import pytest

from circleosd.worker.frames import HEADER, LOG, RESULT, TO_MANAGER, Frame
from circleosd.worker.receiving import PIECE, Receiver

FITS = PIECE - HEADER.size  # bytes of the longest body that has no buffer of its own


def received(receiver: Receiver, sent: list[Frame], most: int) -> list[Frame]:
    """What comes of frames of which at most so many bytes come at once."""
    rest = memoryview(b"".join(HEADER.pack(len(body), kind, number) + body for kind, number, body in sent))
    found: list[Frame] = []
    while rest:
        count = min(most, len(buffer := receiver.buffer()), len(rest))
        assert count, "asyncio takes no empty buffer"
        buffer[:count] = rest[:count]
        rest = rest[count:]
        found += receiver.received(count)
    return found


@pytest.mark.parametrize("most", [1, HEADER.size + 1, PIECE - 1, PIECE])
@pytest.mark.parametrize("length", [0, 1, FITS - 1, FITS, FITS + 1, PIECE, PIECE + 1])
def test_frames_are_whole_again_whatever_their_length_and_however_much_comes_at_once(length: int, most: int) -> None:
    sent = [Frame(LOG, 1, b"before"), Frame(RESULT, 2, b"x" * length), Frame(RESULT, 3, b"behind")]
    assert received(Receiver(TO_MANAGER), sent, most) == sent


def test_a_long_body_is_held_by_its_frame_alone() -> None:
    receiver = Receiver(TO_MANAGER)
    ((_, _, body),) = received(receiver, [Frame(RESULT, 1, b"x" * PIECE)], PIECE)
    assert isinstance(body, bytearray)
    body.clear()  # of what somebody else still looks at no size can be changed
