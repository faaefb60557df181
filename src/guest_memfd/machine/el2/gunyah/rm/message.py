"""The message queue's format. A message is at most 240 bytes, and a body may need 63 of them.

Header, 8 bytes: api (version 1, header of 2 words: 0x21), type and number of further fragments, sequence number, message
id. Source: drivers/virt/gunyah/rsc_mgr.c (Linux series v17, patch 07); the limits are those of both sides.
"""

from __future__ import annotations

import struct
from collections import deque
from enum import IntEnum
from typing import NamedTuple

MAX_MESSAGE = 240
MAX_FRAGMENTS = 62
"""Continuations of one message."""
API = 0x21

_HEADER = struct.Struct("<BBHI")
BODY = MAX_MESSAGE - _HEADER.size
"""Bytes of a body in one message."""
MAX_BODY = (MAX_FRAGMENTS + 1) * BODY
"""The Resource Manager's limit; Linux sends at most MAX_REQUEST."""
MAX_REQUEST = MAX_FRAGMENTS * BODY


class MessageType(IntEnum):
    """Bits 1:0 of the second byte."""

    CONTINUATION = 0
    REQUEST = 1
    REPLY = 2
    NOTIFICATION = 3


class Message(NamedTuple):
    """One request, reply or notification, put together. The body of a reply begins with the error word."""

    type: MessageType
    seq: int
    id: int
    body: bytes


def fragments(message: Message) -> list[bytes]:
    """The messages that carry it, in order; raises ValueError beyond MAX_BODY bytes."""
    if len(message.body) > MAX_BODY:
        raise ValueError(f"a body of {len(message.body)} bytes does not fit {MAX_FRAGMENTS + 1} messages")
    # A message without a body is a message, too.
    pieces = [message.body[at:at + BODY] for at in range(0, len(message.body), BODY)] or [b""]
    further = len(pieces) - 1
    kinds = [message.type] + [MessageType.CONTINUATION] * further
    return [
        _HEADER.pack(API, kind | further << 2, message.seq, message.id) + piece
        for kind, piece in zip(kinds, pieces, strict=True)
    ]


class Receiver:
    """Puts fragments together again; one message at a time is under way, as in rsc_mgr.c.

    `dropped` counts what was thrown away: short messages, continuations of nothing, messages cut off by another one.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._first: Message | None = None
        self._pieces: list[bytes] = []
        self._missing = 0

    def drain(self, queue: deque[bytes]) -> list[Message]:
        """Take messages off the queue until it is empty or one has a wrong api byte: that one ends the round.

        A message shorter than a header is skipped. What remains in the queue is taken by the next call.
        """
        done = []
        while queue:
            raw = queue.popleft()
            if len(raw) < _HEADER.size or len(raw) > MAX_MESSAGE:
                self.dropped += 1
                continue
            api, kind, seq, message_id = _HEADER.unpack_from(raw)
            if api != API:
                self.dropped += 1
                break
            piece = raw[_HEADER.size:]
            if kind & 3 == MessageType.CONTINUATION:
                self._continue(seq, message_id, piece)
            else:
                self._begin(Message(MessageType(kind & 3), seq, message_id, piece), kind >> 2)
            if self._first is not None and not self._missing:
                done.append(self._first._replace(body=b"".join(self._pieces)))
                self._first = None
        return done

    def _begin(self, message: Message, further: int) -> None:
        # The sender has given the earlier one up. Its pieces must not become part of this one.
        if self._first is not None:
            self.dropped += 1
        if further > MAX_FRAGMENTS:
            self.dropped += 1
            self._first = None
            return
        self._first, self._pieces, self._missing = message, [message.body], further

    def _continue(self, seq: int, message_id: int, piece: bytes) -> None:
        # A late piece of a message that was cut off: appending it would give a whole message with a foreign part in
        # it.
        if self._first is None or (self._first.seq, self._first.id) != (seq, message_id):
            self.dropped += 1
            return
        self._pieces.append(piece)
        self._missing -= 1
