"""Cuts the data received by manager or worker into frames (frames.py). No I/O here."""

from __future__ import annotations

from typing import Final, Protocol

from circleosd.worker.frames import COMPILED, HEADER, Frame, FrameError, check

PIECE: Final = 64 * 1024  # bytes to receive at once; a longer body gets its own buffer


class Sink(Protocol):
    """The destination of a worker's compilation."""

    def write(self, data: memoryview) -> None: ...

    def finish(self) -> None: ...


class Receiver:
    """Says where to put the next bytes, and which frames are complete with them. `bounds`: limits of their kinds.

    One compilation may arrive while there is a `sink` for it, which is then released.
    """

    def __init__(self, bounds: dict[int, int]) -> None:
        self.sink: Sink | None = None
        self._bounds = bounds
        # `_piece` up to `_filled`, or the body of the frame `_kind`, `_call_id` that did not fit there.
        self._piece = memoryview(bytearray(PIECE))
        self._filled = 0
        self._kind = self._call_id = 0
        self._body: bytearray | None = None
        self._rest = memoryview(b"")
        self._sunk = 0  # remaining bytes of a compilation

    @property
    def within_a_frame(self) -> bool:
        """Whether a frame has begun that is not complete."""
        return self._body is not None or self._filled > 0

    def buffer(self) -> memoryview:
        """Where the next bytes go."""
        return self._rest if self._body is not None else self._piece[self._filled :]

    def received(self, count: int) -> list[Frame]:
        """Note that `count` bytes were put into `buffer`; return the complete frames. Raises `FrameError`."""
        if self._body is None:
            self._filled += count
            return self._whole()
        self._rest = self._rest[count:]
        if self._rest:
            return []
        body, self._body, self._rest = self._body, None, memoryview(b"")  # which is freed with its frame
        return [Frame(self._kind, self._call_id, body)]

    def _whole(self) -> list[Frame]:
        """Take the complete frames out of `_piece`."""
        piece, start, filled = self._piece, 0, self._filled
        whole: list[Frame] = []
        while True:
            if self._sunk:
                count = min(self._sunk, filled - start)
                self._sink_in(piece[start : start + count])
                start += count
                if self._sunk:
                    break
            available = filled - start - HEADER.size
            if available < 0:
                break
            length, kind, number = HEADER.unpack_from(piece, start)
            check(kind, length, self._bounds)
            if kind == COMPILED:
                # Only once: code of the plugin runs only after that, and could forge another one.
                if self.sink is None:
                    raise FrameError("it sent a compilation that nobody is waiting for")
                self._sunk = length
                start += HEADER.size
                if length == 0:  # the given compilation fits
                    self.sink = None
                continue
            if available >= length:
                begin = start + HEADER.size
                start = begin + length
                whole.append(Frame(kind, number, bytes(piece[begin:start])))
                continue
            if length > PIECE - HEADER.size:
                body = bytearray(length)
                view = memoryview(body)
                view[:available] = piece[start + HEADER.size : filled]
                self._kind, self._call_id, self._body, self._rest = kind, number, body, view[available:]
                start = filled
            break
        if start and start < filled:
            piece[: filled - start] = bytes(piece[start:filled])
        self._filled = filled - start
        return whole

    def _sink_in(self, data: memoryview) -> None:
        assert self.sink is not None
        self.sink.write(data)
        self._sunk -= len(data)
        if not self._sunk:
            self.sink.finish()
            self.sink = None
