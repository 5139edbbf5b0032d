"""What a connection receives at once."""

from __future__ import annotations

import socket

from circleosd.connection import PIECE, Descriptors, PassingSocket


def test_a_piece_stays_below_what_malloc_maps() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs, PassingSocket(fileno=ours.detach()) as passing:
        passing.descriptors = Descriptors()
        theirs.sendall(bytes(2 * PIECE))
        assert len(passing.recv(4 * PIECE)) == PIECE
    assert PIECE < 128 * 1024  # M_MMAP_THRESHOLD of mallopt(3)
