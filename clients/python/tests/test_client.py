# SPDX-License-Identifier: Apache-2.0
"""The blocking and the asyncio client against a real kivid: what goes in comes out, what is wrong
is refused with the field's name, and what was committed survives kill -9."""

import asyncio
import signal

import numpy as np
import pytest

import kivi
import kivi._frames
import kivi.aio

RAW = kivi.Layout(layers=2, kv_heads=2, query_heads=8, head_dim=64, codec="raw16")
PACKED = kivi.Layout(layers=1, kv_heads=2, query_heads=8, head_dim=128, codec="kivi2")


def tokens(layout, count, seed=1):
    rng = np.random.default_rng(seed)
    shape = (2, count, layout.kv_heads, layout.head_dim)
    return rng.standard_normal(shape).astype(np.float16)


def queries(layout, rows, seed=2):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, layout.query_heads, layout.head_dim)).astype(np.float16)


def attention(layout, q, k, v, visible):
    """Plain attention in float64: (out, lse)."""
    group = layout.query_heads // layout.kv_heads
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = np.einsum("rhd,thd->rht", q, k) / np.sqrt(layout.head_dim)
    hidden = np.arange(len(k))[None, None] >= np.asarray(visible)[:, None, None]
    scores[np.broadcast_to(hidden, scores.shape)] = -np.inf
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("rht,thd->rhd", weights / total, v), (np.log(total) + top)[..., 0]


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_raw16_attends_as_exact_attention_does(client):
    k, v = tokens(RAW, 700)
    q = queries(RAW, 5)
    with client.session("a", RAW) as s:
        for layer in range(2):
            s.append(layer, k, v)
        out, lse = s.attend(1, q)
    want, want_lse = attention(RAW, q, k, v, [696, 697, 698, 699, 700])
    assert relative(out, want) < 1e-3
    assert np.abs(lse - want_lse).max() < 1e-3


def test_packed_attends_as_attention_on_what_fetch_gives(client):
    k, v = tokens(PACKED, 1000)
    q = queries(PACKED, 3)
    with client.session("a", PACKED) as s:
        s.append(0, k, v)
        out, _ = s.attend(0, q)
        parts = list(s.fetch([0]))
    fetched_k = np.concatenate([p.k for p in parts])
    fetched_v = np.concatenate([p.v for p in parts])
    assert fetched_k.shape == k.shape
    assert (fetched_k[:128] == k[:128]).all()      # the sink
    assert (fetched_k[-128:] == k[-128:]).all()    # the window
    assert (fetched_k[128:256] != k[128:256]).any()
    want, _ = attention(PACKED, q, fetched_k, fetched_v, [998, 999, 1000])
    assert relative(out, want) < 1e-3


def test_a_decode_step_appends_and_attends_in_one_call(client):
    k, v = tokens(RAW, 50)
    with client.session("a", RAW) as s:
        s.append(0, k[:49], v[:49])
        out, _ = s.attend(0, queries(RAW, 1), k[49:], v[49:])
        assert s.lengths[0] == 50
    want, _ = attention(RAW, queries(RAW, 1), k, v, [50])
    assert relative(out, want) < 1e-3


def test_partial_results_merge_to_the_whole(client):
    k, v = tokens(RAW, 400)
    q = queries(RAW, 1)
    with client.session("a", RAW) as a, client.session("b", RAW) as b:
        a.append(0, k[:150], v[:150])
        b.append(0, k[150:], v[150:])
        merged = kivi.merge(a.attend(0, q), b.attend(0, q))
    want, want_lse = attention(RAW, q, k, v, [400])
    assert relative(merged.out, want) < 1e-3
    assert np.abs(merged.lse - want_lse).max() < 1e-3


def test_committed_sessions_survive_kill_9(daemon, client):
    k, v = tokens(PACKED, 900)
    q = queries(PACKED, 2)
    s = client.session("a", PACKED)
    s.append(0, k, v)
    before = s.attend(0, q, energy=False)
    assert s.commit() >= kivi.Durability.WRITTEN
    daemon.kill()
    daemon.start()
    client.wait_ready()
    s.reopen()
    assert s.length == 900
    after = s.attend(0, q, energy=False)
    assert (before.out == after.out).all() and (before.lse == after.lse).all()


def test_blocks_are_put_looked_up_and_got(client):
    info = client.register(RAW)
    ids = np.arange(128, dtype=np.int32)
    k, v = tokens(RAW, 128)
    first = client.put(info, {0: (k, v), 1: (v, k)}, token_ids=ids)
    again = client.put(info, {0: (k, v), 1: (v, k)}, token_ids=ids)
    assert not first.existed and again.existed and first.digest == again.digest
    found = client.lookup(info, np.concatenate([ids, ids]))
    assert found.tokens == 128 and found.digests == [first.digest]
    got = {(index, layer): (a, b) for index, layer, a, b in client.get(info, found.digests)}
    assert (got[0, 0][0] == k).all() and (got[0, 1][0] == v).all()
    missing = list(client.get(info, [bytes(32)]))
    assert isinstance(missing[0][2], kivi.NotFound)


def test_a_known_prompt_is_in_place_when_a_session_opens(client):
    ids = np.arange(600) % 97
    k, v = tokens(PACKED, 600)
    with client.session("a", PACKED) as a:
        a.append(0, k, v, token_ids=ids)
        with client.session("b", PACKED, token_ids=ids) as b:
            assert b.length == 384  # sealed blocks; the newest 128 and the rest are a's own tail


def test_sessions_are_listed_described_and_deleted(client):
    k, v = tokens(RAW, 10)
    for name in ("x-2", "x-1", "y"):
        with client.session(name, RAW) as s:
            for layer in range(2):
                s.append(layer, k, v)
    assert [s.name for s in client.sessions("x-")] == ["x-1", "x-2"]
    assert client.describe("y").length == 10
    client.delete("y")
    with pytest.raises(kivi.NotFound):
        client.describe("y")


@pytest.mark.parametrize("change, field", [
    (dict(head_dim=80), "head_dim"), (dict(kv_heads=0), "kv_heads"), (dict(query_heads=7), "query_heads"),
    (dict(codec="kivi9"), "codec"), (dict(layers=100000), "layers"),
])
def test_a_layout_that_cannot_be_is_refused_by_field(client, change, field):
    import dataclasses
    with pytest.raises(kivi.InvalidArgument) as caught:
        client.register(dataclasses.replace(RAW, **change))
    assert field in caught.value.field
    assert field in str(caught.value)


def test_a_lost_race_is_aborted_and_changes_nothing(client):
    k, v = tokens(RAW, 10)
    with client.session("a", RAW) as s:
        s.append(0, k, v)
        with pytest.raises(kivi.Aborted):
            s.append(0, k, v, expected_length=3)
        assert s.append(0, k, v) == 20


def test_nan_is_refused(client):
    k, v = tokens(RAW, 10)
    v[3, 1, 5] = np.nan
    with client.session("a", RAW) as s:
        with pytest.raises(kivi.InvalidArgument) as caught:
            s.append(0, k, v)
        assert caught.value.field == "data"
        assert s.append(0, k, k) == 10


def test_wrong_shapes_and_types_are_refused_here(client):
    k, v = tokens(RAW, 10)
    with client.session("a", RAW) as s:
        with pytest.raises(TypeError, match="k: elements are float32"):
            s.append(0, k.astype(np.float32), v)
        with pytest.raises(ValueError, match="v: 9 tokens"):
            s.append(0, k, v[:9])
        with pytest.raises(ValueError, match="q: shape"):
            s.attend(0, k)


def test_the_same_name_with_another_layout_is_a_failed_precondition(client):
    with client.session("a", RAW):
        pass
    with pytest.raises(kivi.FailedPrecondition):
        client.session("a", PACKED)


def test_nobody_there_is_unavailable(tmp_path):
    with kivi.Client(f"unix://{tmp_path}/none.sock", retries=1, timeout=5) as nobody:
        with pytest.raises(kivi.Unavailable):
            nobody.stats()


@pytest.fixture(params=["direct", "iterator"])
def stream(request, monkeypatch):
    """Both ways to drive a stream; the second is what an unknown grpcio gets."""
    if request.param == "iterator":
        monkeypatch.setattr(kivi._frames, "cygrpc", None)
    return {"direct": kivi._frames._DirectStream, "iterator": kivi._frames._IteratorStream}[
        request.param]


def test_a_stream_answers_fails_and_opens_again(daemon, client, stream):
    k, v = tokens(RAW, 20)
    s = client.session("a", RAW)
    assert s.append(0, k, v) == 20
    assert isinstance(s._appends._stream, stream)
    with pytest.raises(kivi.Aborted):
        s.append(0, k, v, expected_length=3)
    assert s.append(0, k, v) == 40
    daemon.kill()
    with pytest.raises(kivi.Unavailable):
        s.append(0, k, v)
    daemon.start()
    client.wait_ready(30)
    s.reopen()
    assert s.append(0, k, v) == 20
    s.close()


def test_a_late_answer_is_deadline_exceeded(daemon, client, stream):
    k, v = tokens(RAW, 20)
    s = client.session("a", RAW)
    s.append(0, k, v)
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(kivi.DeadlineExceeded):
            s.append(0, k, v, timeout=0.3)
    finally:
        daemon.process.send_signal(signal.SIGCONT)


def test_asyncio_does_the_same(daemon):
    async def scenario():
        k, v = tokens(RAW, 300)
        q = queries(RAW, 1)
        async with kivi.aio.Client(daemon.target) as client:
            async with await client.session("a", RAW) as s:
                for layer in range(2):
                    await s.append(layer, k, v)
                partial = await s.attend(0, q)
                parts = [p async for p in s.fetch([1])]
                with pytest.raises(kivi.Aborted):
                    await s.append(0, k, v, expected_length=1)
                names = [info.name async for info in client.sessions()]
            info = await client.register(RAW)
            page, block = tokens(RAW, 128), np.arange(128, dtype=np.int32)
            put = await client.put(info, {0: page, 1: page}, token_ids=block)
            found = await client.lookup(info, block)
            assert found.digests == [put.digest] and not put.existed
            got = {layer: (a, b) async for _, layer, a, b in client.get(info, [put.digest])}
            assert (got[1][0] == page[0]).all() and (got[1][1] == page[1]).all()
            await client.delete("a")
            with pytest.raises(kivi.NotFound):
                await client.delete("a")
        assert names == ["a"]
        assert (np.concatenate([p.k for p in parts]) == k).all()
        want, _ = attention(RAW, q, k, v, [300])
        assert relative(partial.out, want) < 1e-3

    asyncio.run(scenario())
