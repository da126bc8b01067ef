"""Frames: every record comes back as it was; every other byte string is refused."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading

import msgspec
import pytest

from octavo.engine.client_channel import ClientChannel
from octavo.engine.transport import (
    MAX_FRAME_BYTES,
    EngineChannel,
    FrameBuffer,
    TransportError,
    decode_from_engine,
    decode_to_engine,
    encode,
)
from octavo.types import (
    AbortRequest,
    AddRequest,
    CacheParams,
    CacheStats,
    Capacity,
    EngineFailed,
    EngineProgress,
    EngineReady,
    EngineRequest,
    EngineStats,
    EngineUpdates,
    FromEngine,
    KVPool,
    PrefixCacheReset,
    RequestRejected,
    ResetPrefixCache,
    SamplingParams,
    StartEngine,
    ToEngine,
    TokenLogprob,
    TokenUpdate,
)

REQUEST = EngineRequest(
    request_id="a",
    prompt_ids=[1, 2, 70_000],
    params=SamplingParams(
        stop=("x", "ÿ"), stop_token_ids=(3,), logit_bias={5: -100.0}, seed=2**64 - 1, logprobs=2
    ),
    priority=-1,
    cache=CacheParams(salt="é", scope="k", pin_s=1.5),
)
TO_ENGINE: list[ToEngine] = [
    StartEngine(config={"model": "/m", "threads": 2, "max_model_len": None}),
    AddRequest(request=REQUEST),
    AbortRequest(request_id="a"),
    AbortRequest(request_id="a", index=3),
    ResetPrefixCache(2**40),
]
UPDATE = TokenUpdate(
    "a", 0, (1, 2), (TokenLogprob(1, -0.5, ((1, -0.5), (2, -1.0))),), "stop", 7, 16
)
FROM_ENGINE: list[FromEngine] = [
    EngineProgress(phase="weights", fraction=0.5),
    EngineReady(
        capacity=Capacity(
            model="m", architecture="A", num_parameters=1, max_model_len=2,
            kv_pool=KVPool(num_blocks=3, block_size=16, num_bytes=4),
            weights_bytes=5, vocab_size=6, backend="cpu",
        )
    ),
    EngineFailed(message="no"),
    EngineUpdates(
        updates=[UPDATE, TokenUpdate("b", 1)],
        stats=EngineStats(cache=CacheStats(num_blocks=3, num_hits=2), num_steps=1),
    ),
    RequestRejected(request_id="a", error="OverloadedError", message="full", retry_after_s=2.5),
    PrefixCacheReset(3, 17),
]  # fmt: skip


def test_every_record_comes_back() -> None:
    for sent in TO_ENGINE:
        assert decode_to_engine(encode(sent)[4:]) == sent
    for answer in FROM_ENGINE:
        assert decode_from_engine(encode(answer)[4:]) == answer


@pytest.mark.parametrize("piece", [1, 3, 7, 1000])
def test_frames_are_cut_from_any_pieces(piece: int) -> None:
    stream = b"".join(encode(record) for record in TO_ENGINE)
    buffer = FrameBuffer()
    bodies: list[bytes] = []
    for start in range(0, len(stream), piece):
        bodies += buffer.feed(stream[start : start + piece])
    assert [decode_to_engine(body) for body in bodies] == TO_ENGINE


def test_a_frame_over_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(TransportError, match="over the limit"):
        FrameBuffer().feed(struct.pack("<I", MAX_FRAME_BYTES + 1))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x80",
        b"\x93\x01\x02\x03",
        msgspec.msgpack.encode({"type": "unknown"}),
        msgspec.msgpack.encode({"type": "add", "request": 7}),
        msgspec.msgpack.encode({"type": "add"}),
        msgspec.msgpack.encode({"type": "abort", "request_id": 5}),
        b"\x91" * 100_000,
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
    ],
)
def test_what_is_no_record_is_refused(body: bytes) -> None:
    for decode in (decode_to_engine, decode_from_engine):
        with pytest.raises(TransportError):
            decode(body)


def test_random_frames_become_a_record_or_a_transport_error() -> None:
    """SEC-02: random bytes, and true frames with random damage, 10^5 for each decoder."""
    dice = random.Random(0)
    for decode, records in ((decode_to_engine, TO_ENGINE), (decode_from_engine, FROM_ENGINE)):
        bodies = [bytearray(encode(record)[4:]) for record in records]
        types = {type(record) for record in records}
        num_refused = 0
        for _ in range(100_000):
            if dice.random() < 0.3:
                body = bytearray(dice.randbytes(dice.randrange(40)))
            else:
                body = bytearray(dice.choice(bodies))
                for _ in range(dice.randint(1, 4)):
                    body[dice.randrange(len(body))] = dice.randrange(256)
                if dice.random() < 0.2:
                    del body[dice.randrange(len(body)) :]
            try:
                assert type(decode(body)) in types
            except TransportError:
                num_refused += 1
        assert num_refused > 50_000


def test_the_engines_end_waits_only_when_told_to() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = EngineChannel(theirs)
        assert channel.receive(wait=False) == []
        ours.sendall(encode(TO_ENGINE[1]) + encode(TO_ENGINE[2])[:5])
        assert channel.receive(wait=True) == [TO_ENGINE[1]]
        ours.sendall(encode(TO_ENGINE[2])[5:])
        assert channel.receive(wait=False) == [TO_ENGINE[2]]
        ours.close()
        assert channel.receive(wait=True) is None


def test_both_ends_talk() -> None:
    async def client(sock: socket.socket) -> list[FromEngine | None]:
        channel = await ClientChannel.open(sock)
        for record in TO_ENGINE:
            channel.send(record)
        answers = [await channel.receive() for _ in FROM_ENGINE]
        await channel.close()
        channel.send(TO_ENGINE[0])  # swallowed
        return answers

    def engine(sock: socket.socket, got: list[ToEngine]) -> None:
        channel = EngineChannel(sock)
        while len(got) < len(TO_ENGINE):
            got += channel.receive(wait=True) or []
        for record in FROM_ENGINE:
            channel.send(record)
        assert channel.receive(wait=True) is None

    ours, theirs = socket.socketpair()
    got: list[ToEngine] = []
    with theirs:
        thread = threading.Thread(target=engine, args=(theirs, got))
        thread.start()
        assert asyncio.run(client(ours)) == FROM_ENGINE
        thread.join(5)
    assert got == TO_ENGINE


@pytest.mark.parametrize("half", [b"", b"\x05", encode(FROM_ENGINE[0])[:-1]])
def test_a_stream_that_breaks_off_is_the_end(half: bytes) -> None:
    async def client(sock: socket.socket) -> FromEngine | None:
        channel = await ClientChannel.open(sock)
        try:
            return await channel.receive()
        finally:
            await channel.close()

    ours, theirs = socket.socketpair()
    theirs.sendall(half)
    theirs.close()
    assert asyncio.run(client(ours)) is None
