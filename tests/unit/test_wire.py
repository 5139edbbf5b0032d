"""The wire, as bytes in and bytes out."""

from __future__ import annotations

import json
import random

import pytest

from circleosd import wire
from circleosd.errors import BadRequest, Internal, Limit, NotFound


def test_lines_come_out_whole_however_small_the_pieces() -> None:
    stream = b'{"a":1}\n\n{"b":"\xc3\xa9"}\n'
    for size in (1, 2, 7, len(stream)):
        buffer, lines = wire.LineBuffer(100), []
        for start in range(0, len(stream), size):
            buffer.feed(stream[start : start + size])
            while (line := buffer.next_line()) is not None:
                lines.append(line)
        assert lines == [b'{"a":1}', b"", b'{"b":"\xc3\xa9"}']
        assert len(buffer) == 0


def test_a_line_of_the_limit_passes_and_one_byte_more_does_not() -> None:
    buffer = wire.LineBuffer(5)
    buffer.feed(b"12345\n")
    assert buffer.next_line() == b"12345"
    buffer.feed(b"123456")
    with pytest.raises(Limit, match="at most 5 bytes"):
        buffer.next_line()


def test_a_long_line_is_refused_also_when_its_end_is_there_already() -> None:
    buffer = wire.LineBuffer(5)
    buffer.feed(b"123456\n")
    with pytest.raises(Limit):
        buffer.next_line()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"", "not JSON"),
        (b"nonsense", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[1]", "a JSON object"),
        (b'"text"', "a JSON object"),
        (b"null", "a JSON object"),
        (b'{"action":NaN}', "not JSON"),
        (b'{"action":1e999}', "too large"),
        (b'{"action":"x","tag":[{"a":-1e309}]}', "too large"),
        (b'{"action":"x","v":"\\ud800"}', "half a surrogate pair"),
        (b'{"action":"x","v":"\\uD800"}', "half a surrogate pair"),
        (b'{"action":"x","tag":' + b"[" * 9_000 + b"]" * 9_000 + b"}", "nested too deeply"),
        (b'{"action":' + b"9" * 5000 + b"}", "a number that is too large$"),
        (b'{"action":"x","tag":' + b"[" * 100 + b"]" * 100 + b"}", "nested too deeply"),
        (b'{"action":"x","v":[1,' + b'{"a":' * 500 + b"1" + b"}" * 500 + b"]}", "nested too deeply"),
        (b'{"action":null}', "needs an action"),
        (b"{}", "needs an action"),
        (b'{"action":"x","token":5}', "the token must be a string"),
        (b'{"action":"x","token":""}', "the token must be a string"),
        (b'{"action":"x","token":"' + b"t" * 300 + b'"}', "the token must be a string"),
    ],
)
def test_what_is_no_request_is_refused_with_the_reason(line: bytes, says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        wire.envelope(wire.decode_request(line))


@pytest.mark.parametrize("tag", ["t" * 1024, ["t" * 1020], 10**1023, None, {"a": "b"}])
def test_a_tag_is_echoed_unless_it_is_too_long(tag: object) -> None:
    assert wire.tag_of({"action": "x", "tag": tag}) == tag
    longer = {"a": [tag] * 1025}
    for value in ("t" * 1025, -(10**1023), longer):
        with pytest.raises(Limit, match="at most 1024 characters"):
            wire.tag_of({"action": "x", "tag": value})
    assert wire.tag_of({"action": "x"}) is wire.ABSENT


TEXT = 'all of it, [text] {and} "quoted\\", '


@pytest.mark.parametrize("value", ['""', "[]", "{}", "0", '"a\\\\"', '[{"a":1}]', '",[{"'])
def test_the_values_of_a_line_are_bounded_and_its_texts_are_not(value: str) -> None:
    few, many = (",".join([value] * number) for number in (wire.MAX_VALUES // 4, wire.MAX_VALUES + 1))
    request = f'{{"action":"x","text":{json.dumps(TEXT * 10_000)},"tag":[%s]}}'
    assert wire.decode_request((request % few).encode())["text"] == TEXT * 10_000
    with pytest.raises(Limit, match="at most 10000 values"):
        wire.decode_request((request % many).encode())


def test_what_is_nested_as_deeply_as_allowed_is_a_request() -> None:
    nested = b"[" * 99 + b"]" * 99
    assert wire.encode(wire.decode_request(b'{"tag":' + nested + b"}")) == b'{"tag":' + nested + b"}\n"
    wide = b'{"tag":[' + b",".join([b'[{"a":[]}]'] * 1000) + b"]}"
    assert len(wire.decode_request(wide)["tag"]) == 1000


def test_random_bytes_never_raise_anything_but_bad_request() -> None:
    chance = random.Random(1)
    valid = b'{"action":"invoke","id":"example","func":"handle","payload":"h\\u00e9llo","tag":[1,{"a":null}]}'
    for _ in range(5000):
        line = bytearray(valid)
        for _ in range(chance.randrange(1, 6)):
            line[chance.randrange(len(line))] = chance.randrange(256)
        try:
            wire.envelope(wire.decode_request(bytes(line)))
        except BadRequest:
            continue


def test_a_paired_surrogate_escape_is_text() -> None:
    assert wire.decode_object(b'{"action":"x","v":"\\ud83d\\ude00"}')["v"] == "\N{GRINNING FACE}"


def test_the_largest_numbers_are_echoed_as_they_came() -> None:
    text = b'{"action":"x","tag":[1.7976931348623157e+308,-5e-324,' + b"9" * 4300 + b"]}"
    assert wire.encode(wire.decode_object(text)) == text + b"\n"


def test_replies_have_the_documented_form() -> None:
    assert wire.success([1]) == b'{"ok":true,"message":null,"data":[1]}\n'
    assert wire.success("é", message="well", tag=None) == (
        '{"ok":true,"message":"well","data":"é","tag":null}\n'.encode()
    )
    assert json.loads(wire.success(1, more=True))["more"] is True
    assert wire.failure(NotFound("no such thing"), tag=7) == (
        b'{"ok":false,"message":"no such thing","data":null,"error":"not-found","tag":7}\n'
    )


def test_a_reply_is_read_as_what_it_was_or_as_the_error_that_it_names() -> None:
    assert wire.decode_reply(wire.success([1], more=True), "s")["data"] == [1]
    with pytest.raises(NotFound, match="no such thing"):
        wire.decode_reply(wire.failure(NotFound("no such thing")), "s")
    with pytest.raises(Internal, match="odd"):  # as of a newer service
        wire.decode_reply(b'{"ok":false,"message":"odd","data":null,"error":"new-code"}', "s")


@pytest.mark.parametrize(
    "line", [b"", b"rubbish", b"[1]", b'{"ok":true,"data":\xff}', b'{"ok":true,"data":' + b"[" * 10_000, b"{}",
             b'{"ok":false,"message":"odd"}']
)  # fmt: skip
def test_what_is_no_reply_is_the_fault_of_who_sent_it(line: bytes) -> None:
    with pytest.raises(Internal, match=r"^auth-service sent what is not a reply: "):
        wire.decode_reply(line, "auth-service")


def test_a_reply_is_one_line_whatever_it_holds() -> None:
    assert wire.success("a\nb\r\u2028").count(b"\n") == 1


def test_a_text_reply_is_the_json_that_the_encoder_makes() -> None:
    chance = random.Random(3)
    special = ['"', "\\", "\n", "\0", "\x1f", "\x7f", "\u2028", "é", "🙂", "a", " "]
    for _ in range(2000):
        text = "".join(chance.choices(special, k=chance.randrange(0, 20)))
        line = wire.success(text)
        assert line == wire.encode({"ok": True, "message": None, "data": text})
        assert json.loads(line)["data"] == text


@pytest.mark.parametrize(
    ("data", "line"),
    [(b"{}\n", b"{}"), (b"\n", b""), (b"12345\n", b"12345"), (b"123456\n", None), (b"{}", None), (b"", None),
     (b"a\nb\n", None), (b"a\nb", None)],
)  # fmt: skip
def test_input_that_is_one_line_is_taken_as_it_is(data: bytes, line: bytes | None) -> None:
    assert wire.only_line(data, 5) == line


def test_a_reply_is_always_a_line() -> None:
    assert json.loads(wire.failure(NotFound("half \ud800"), tag="\udfff"))["message"] == "half ?"
