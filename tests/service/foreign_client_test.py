#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""A stock client against the daemon: grpcio and protobuf as Debian ships them, no code of ours.

    foreign_client_test.py KIVID DESCRIPTORS [UNITTEST-ARGUMENT]...

KIVID is the daemon's rpc layer over tests/service/fake_engine.c, whose made-up layers and digests
provoke what a test needs; DESCRIPTORS the descriptor set of the contract, from which the
messages are made. What is tested is what a stranger sees: codes, metadata, order, limits, health,
reflection, a stop in the middle of work, and what the daemon's memory does under clients that do
not behave.
"""

import atexit
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

KIVID, DESCRIPTORS = (os.path.abspath(path) for path in sys.argv[1:3])
OK = grpc.StatusCode.OK


def load_messages():
    """Full name -> message class, for everything in the descriptor set."""
    files = descriptor_pb2.FileDescriptorSet.FromString(open(DESCRIPTORS, "rb").read())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    return pool, message_factory.MessageFactory(pool)


POOL, FACTORY = load_messages()


def message(name, /, **fields):
    if not name.startswith(("kivi.", "grpc.")):
        name = "kivi.v1." + name
    return FACTORY.GetPrototype(POOL.FindMessageTypeByName(name))(**fields)


class Stub:
    """service.Method as a callable of the right shape, from the descriptors."""

    def __init__(self, channel, service="kivi.v1.Kivi"):
        for method in POOL.FindServiceByName(service).methods:
            proto = descriptor_pb2.MethodDescriptorProto()
            method.CopyToProto(proto)
            shape = ("stream" if proto.client_streaming else "unary") + "_" + (
                "stream" if proto.server_streaming else "unary")
            answer = FACTORY.GetPrototype(method.output_type)
            setattr(self, method.name, getattr(channel, shape)(
                f"/{service}/{method.name}",
                request_serializer=lambda request: request.SerializeToString(),
                response_deserializer=answer.FromString))


class Kivid:
    """A running daemon, in a directory of its own."""

    def __init__(self, **keys):
        self.directory = tempfile.TemporaryDirectory(prefix="kv")
        self.path = os.path.join(self.directory.name, "run", "kivid.sock")
        self.log = open(os.path.join(self.directory.name, "log"), "w+b")
        keys = {"listen": "unix://" + self.path, "arena_bytes": "4MiB", "tail_bytes_max": "1MiB",
                "disk_path": "", "blocks_max": 1024, "sessions_max": 1024, "log_level": "debug",
                **keys}
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in keys.items()]
        self.process = subprocess.Popen([KIVID, *flags], stderr=self.log, stdin=subprocess.DEVNULL)
        self.told_to_stop = False
        atexit.register(self.process.kill)  # whatever becomes of the test
        self.target = "unix://" + self.path
        for _ in range(200):
            if ": ready" in self.said() or self.process.poll() is not None:
                break
            time.sleep(0.05)

    def channel(self, **options):
        """A connection of its own: grpcio shares one between equal channels otherwise."""
        options = {"grpc.use_local_subchannel_pool": 1, "grpc.max_send_message_length": -1, **options}
        return grpc.insecure_channel(self.target, options=list(options.items()))

    def memory(self, key="VmRSS"):
        for line in open(f"/proc/{self.process.pid}/status"):
            if line.startswith(key):
                return int(line.split()[1]) * 1024
        raise AssertionError("the daemon is gone")

    def said(self):
        self.log.flush()
        with open(self.log.name) as log:
            return log.read()

    def terminate(self):
        self.told_to_stop = True
        self.process.send_signal(signal.SIGTERM)

    def stop(self, expect=0):
        """Waits for the end; a second signal would end the grace, so there is at most one here."""
        if self.process.poll() is None and not self.told_to_stop:
            self.terminate()
        code = self.process.wait(30)
        said = self.said()
        self.log.close()
        self.directory.cleanup()
        if code != expect:
            raise AssertionError(f"kivid ended with {code} instead of {expect}:\n{said}")


def layout(**changes):
    fields = dict(layers=4, kv_heads=1, query_heads=2, head_dim=64, dtype=1, **changes)
    return message("Layout", **fields)


def frame(session, expected, tokens=1, **fields):
    return message("AppendRequest", session=session, expected_length=expected, tokens=tokens,
                   data=b"\1" * (tokens * 2 * 64 * 2), **fields)


def attend_frame(session, layer=0, rows=1, ident=1):
    item = message("AttendRequest.Item", session=session, rows=rows)
    return message("AttendRequest", id=ident, layer=layer, items=[item], data=b"\0" * 128)


def trailer(call, key):
    return dict(call.trailing_metadata() or ()).get(key)


class Sender:
    """The sending half of a stream, one message at a time."""

    def __init__(self):
        self.messages = queue.Queue()

    def send(self, one):
        self.messages.put(one)

    def done(self):
        self.messages.put(None)

    def __iter__(self):
        return self

    def __next__(self):
        one = self.messages.get()
        if one is None:
            raise StopIteration
        return one


class Case(unittest.TestCase):
    keys = {}

    @classmethod
    def setUpClass(cls):
        cls.kivid = Kivid(**cls.keys)
        cls.channel = cls.kivid.channel()
        cls.kivi, cls.admin = Stub(cls.channel), Stub(cls.channel, "kivi.v1.Admin")
        info = cls.kivi.RegisterLayout(
            message("RegisterLayoutRequest", layout=layout()), timeout=10).info
        cls.fingerprint = info.fingerprint

    @classmethod
    def tearDownClass(cls):
        cls.channel.close()
        cls.kivid.stop()

    def open(self, name):
        return self.kivi.OpenSession(message(
            "OpenSessionRequest", name=name, fingerprint=self.fingerprint), timeout=10).session

    def fails(self, code, call, *arguments, text=None, field=None, **keywords):
        """The call ends with this code; its message says, and its metadata name, the field."""
        with self.assertRaises(grpc.RpcError) as caught:
            answer = call(*arguments, timeout=keywords.pop("timeout", 10), **keywords)
            if hasattr(answer, "__next__"):
                list(answer)
        error = caught.exception
        self.assertEqual(error.code(), code, error)
        if field is not None:
            self.assertEqual(trailer(error, "kivi-field"), field)
            self.assertTrue(error.details().startswith(field + ": "), error.details())
        if text is not None:
            self.assertIn(text, error.details())
        return error


class UnaryTest(Case):
    def test_layout_comes_back_with_every_default(self):
        info = self.kivi.RegisterLayout(message("RegisterLayoutRequest", layout=layout())).info
        self.assertEqual(info.layout.codec.preset, "kivi2")
        self.assertEqual(info.layout.block_tokens, 128)
        self.assertEqual(info.layout.exact.window_tokens, 128)
        self.assertEqual(info.layout.exact.sink_blocks, 1)
        self.assertAlmostEqual(info.layout.softmax_scale, 1 / 8)
        self.assertEqual(len(self.admin.Layouts(message("LayoutsRequest")).layouts), 1)

    def test_bad_layouts_name_the_field(self):
        def refused(field, **changes):
            self.fails(grpc.StatusCode.INVALID_ARGUMENT, self.kivi.RegisterLayout,
                       message("RegisterLayoutRequest", layout=message("Layout", **{
                           **dict(layers=4, kv_heads=1, query_heads=2, head_dim=64, dtype=1),
                           **changes})), field=field)
        refused("layout.head_dim", head_dim=80)
        refused("layout.layers", layers=1 << 31)
        refused("layout.kv_heads", kv_heads=65536 + 1)
        refused("layout.model", model="m" * 257)
        refused("layout.codec.preset", codec=message("Codec", preset="kivi3"))
        refused("layout.codec.mixes", codec=message("Codec", kind=3, mixes=[4, 4, 0]))
        refused("layout.codec.kind", codec=message("Codec", kind=77, group=32))
        refused("layout.codec", codec=message("Codec", preset="kivi2", kind=1))
        self.fails(grpc.StatusCode.INVALID_ARGUMENT, self.kivi.RegisterLayout,
                   message("RegisterLayoutRequest"), field="layout")

    def test_bad_names_and_digests_name_the_field(self):
        def refused(field, **changes):
            self.fails(grpc.StatusCode.INVALID_ARGUMENT, self.kivi.OpenSession, message(
                "OpenSessionRequest", **{**dict(name="n", fingerprint=self.fingerprint),
                                         **changes}), field=field)
        refused("name", name="")
        refused("name", name="n" * 201)
        refused("name", name="a\nb")
        refused("name", name="a\0b")
        refused("fingerprint", fingerprint=b"short")
        refused("salt", salt=b"s" * 65)

    def test_a_layout_that_differs_is_failed_precondition(self):
        self.fails(grpc.StatusCode.FAILED_PRECONDITION, self.kivi.OpenSession, message(
            "OpenSessionRequest", name="n", fingerprint=b"x" * 32), field="fingerprint")

    def test_stats(self):
        stats = self.admin.Stats(message("StatsRequest"))
        self.assertEqual((stats.backend, stats.ready), ("fake", True))

    def test_a_damaged_message_is_invalid(self):
        call = self.channel.unary_unary("/kivi.v1.Kivi/OpenSession")
        for bytes_ in (b"\x0a\xff", b"\x00\x01", b"\x0b", b"\xff" * 40):
            self.fails(grpc.StatusCode.INVALID_ARGUMENT, call, bytes_)

    def test_a_message_that_unpacks_to_a_hundred_times_its_size_is_refused(self):
        call = self.channel.stream_stream("/kivi.v1.Kivi/Attend")
        error = self.fails(grpc.StatusCode.INVALID_ARGUMENT, call, iter([b"\x1a\0" * 2000000]))
        self.assertIn("parts", error.details())

    def test_unknown_methods_are_unimplemented_at_once(self):
        for path in "/kivi.v1.Kivi/Nonsense", "/nobody.Here/Call":
            began = time.monotonic()
            self.fails(grpc.StatusCode.UNIMPLEMENTED, self.channel.unary_unary(path), b"",
                       text="there is no method")
            self.assertLess(time.monotonic() - began, 5)

    def test_what_is_not_served_yet_says_so(self):
        self.fails(grpc.StatusCode.UNIMPLEMENTED, self.kivi.Fork,
                   message("ForkRequest", name="x"), text="not served by this version")
        self.fails(grpc.StatusCode.UNIMPLEMENTED, self.admin.Drain,
                   message("DrainRequest"), text="not served by this version")

    def test_compressed_messages_are_refused(self):
        """A few bytes must not become a gigabyte."""
        self.fails(grpc.StatusCode.UNIMPLEMENTED, self.kivi.OpenSession, message(
            "OpenSessionRequest", name="n" * 100, fingerprint=self.fingerprint),
            compression=grpc.Compression.Gzip)


class StreamTest(Case):
    def test_append_answers_each_frame_in_order(self):
        session = self.open("append")
        answers = self.kivi.Append(iter([frame(session, i) for i in range(100)]), timeout=10)
        self.assertEqual([answer.length for answer in answers], list(range(1, 101)))

    def test_the_first_bad_frame_ends_an_append_and_what_follows_is_not_done(self):
        session = self.open("append-bad")
        call = self.kivi.Append(iter([frame(session, 0), frame(session, 1), frame(session, 7),
                                      frame(session, 2), frame(session, 3)]), timeout=10)
        lengths = []
        with self.assertRaises(grpc.RpcError):
            for answer in call:
                lengths.append(answer.length)
        self.assertEqual(lengths, [1, 2])
        self.assertEqual(call.code(), grpc.StatusCode.ABORTED)
        self.assertEqual(trailer(call, "kivi-field"), "expected_length")
        self.assertEqual(self.kivi.OpenSession(message(
            "OpenSessionRequest", name="append-bad", fingerprint=self.fingerprint)).length, 2)

    def test_bad_sizes_name_the_field(self):
        session = self.open("sizes")
        short = frame(session, 0)
        short.data = b"123"
        self.fails(grpc.StatusCode.INVALID_ARGUMENT, self.kivi.Append, iter([short]), field="data")
        ids = frame(session, 0, tokens=3)
        ids.token_ids.extend([1, 2])
        self.fails(grpc.StatusCode.INVALID_ARGUMENT, self.kivi.Append, iter([ids]),
                   field="token_ids")
        self.fails(grpc.StatusCode.INVALID_ARGUMENT, self.kivi.Attend,
                   iter([message("AttendRequest")]), field="items")
        rows = attend_frame(session)
        rows.items[0].visible.extend([1, 2, 3])
        self.fails(grpc.StatusCode.INVALID_ARGUMENT, self.kivi.Attend, iter([rows]),
                   field="items[0].visible")
        rows = attend_frame(session, rows=129)
        self.fails(grpc.StatusCode.INVALID_ARGUMENT, self.kivi.Attend, iter([rows]),
                   field="items[0].rows")

    def test_attend_gives_a_status_per_item(self):
        session = self.open("attend")
        item = lambda handle: message("AttendRequest.Item", session=handle, rows=2)
        request = message("AttendRequest", id=9, items=[item(session), item(999), item(session)])
        answer = list(self.kivi.Attend(iter([request]), timeout=10))[0]
        self.assertEqual([one.code for one in answer.items], [0, 5, 0])
        self.assertEqual(answer.items[1].message, "session: there is no such session")
        self.assertEqual((answer.id, len(answer.data)), (9, 2 * 2 * 65 * 4))

    def test_large_answers_arrive_whole(self):
        """Above 16 KiB the payload is sent from the engine's own memory."""
        session = self.open("large")
        items = [message("AttendRequest.Item", session=session, rows=128) for _ in range(64)]
        request = message("AttendRequest", items=items)
        for answer in self.kivi.Attend(iter([request] * 20), timeout=30):
            self.assertEqual(len(answer.data), 64 * 128 * 65 * 4)
            self.assertEqual(answer.data[-4:], b"\0\0\x7c\x42")  # 63.0

    def test_put_answers_once_a_block(self):
        def page(digest, layer, **fields):
            return message("PutRequest", fingerprint=self.fingerprint, digest=digest * 32,
                           layer=layer, data=b"p" * 100000, **fields)
        pages = [page(digest, layer) for layer in range(4) for digest in (b"a", b"b", b"\xdd")]
        for one in pages[1:]:
            one.fingerprint = b""  # the first message's holds
        answers = {answer.digest[:1]: answer for answer in self.kivi.Put(iter(pages), timeout=10)}
        self.assertEqual(set(answers), {b"a", b"b", b"\xdd"})
        self.assertEqual(answers[b"a"].code, 0)
        self.assertEqual(answers[b"a"].credit, 8)
        self.assertEqual(answers[b"\xdd"].code, grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        self.fails(grpc.StatusCode.INVALID_ARGUMENT, self.kivi.Put, iter([page(b"a", 99)]),
                   field="layer")
        nameless = page(b"a", 0)
        nameless.fingerprint = b""
        self.fails(grpc.StatusCode.INVALID_ARGUMENT, self.kivi.Put, iter([nameless]),
                   field="fingerprint")

    def test_get_is_layer_major_and_fails_per_block(self):
        digests = [b"a" * 32, b"\xee" * 32, b"\xbb" * 32, b"\xdd" * 32]
        answers = list(self.kivi.Get(message(
            "GetRequest", fingerprint=self.fingerprint, digests=digests), timeout=10))
        self.assertEqual([(one.layer, one.index, one.code, len(one.data)) for one in answers], [
            (0, 0, 0, 1024), (0, 1, 5, 0), (0, 2, 0, 1 << 20), (0, 3, 15, 0),
            (1, 0, 0, 1024), (1, 2, 0, 1 << 20), (2, 0, 0, 1024), (2, 2, 0, 1 << 20),
            (3, 0, 0, 1024), (3, 2, 0, 1 << 20)])
        one = list(self.kivi.Get(message("GetRequest", fingerprint=self.fingerprint,
                                         digests=digests[1:2]), timeout=10))
        self.assertEqual([(answer.layer, answer.code) for answer in one], [(0, 5)])
        self.fails(grpc.StatusCode.FAILED_PRECONDITION, self.kivi.Get, message(
            "GetRequest", fingerprint=b"?" * 32, digests=digests), field="fingerprint")
        self.fails(grpc.StatusCode.INVALID_ARGUMENT, self.kivi.Get, message(
            "GetRequest", fingerprint=self.fingerprint), field="digests")

    def test_fetch_covers_the_range_in_runs(self):
        session = self.open("fetch")
        list(self.kivi.Append(iter([frame(session, 0, tokens=300)]), timeout=10))
        answers = list(self.kivi.Fetch(message(
            "FetchRequest", session=session, layers=[2, 0], begin=100), timeout=10))
        runs = [(100, 28), (128, 128), (256, 44)]
        self.assertEqual([(one.layer, one.begin, one.tokens) for one in answers],
                         [(layer, *run) for layer in (2, 0) for run in runs])
        self.assertTrue(all(one.data == bytes([one.layer]) * (one.tokens * 256)
                            for one in answers))
        self.fails(grpc.StatusCode.INVALID_ARGUMENT, self.kivi.Fetch,
                   message("FetchRequest", session=session, end=301), field="end")
        self.fails(grpc.StatusCode.NOT_FOUND, self.kivi.Fetch,
                   message("FetchRequest", session=999), field="session")

    def test_list_goes_on_behind_each_page(self):
        names = [f"list-{i:02}" for i in range(11)]
        for name in names:
            self.open(name)
        listed = lambda **fields: [one.name for one in self.kivi.List(
            message("ListRequest", prefix="list-", **fields), timeout=10)]
        self.assertEqual(listed(), names)
        self.assertEqual(listed(limit=4), names[:4])
        self.assertEqual(listed(after="list-07"), names[8:])

    def test_a_deadline_ends_a_request_that_hangs(self):
        session = self.open("deadline")
        began = time.monotonic()
        self.fails(grpc.StatusCode.DEADLINE_EXCEEDED, self.kivi.Attend,
                   iter([attend_frame(session, layer=201)]), timeout=0.3)
        self.assertLess(time.monotonic() - began, 5)
        self.check_nothing_is_left_behind()

    def test_a_cancelled_call_frees_its_request(self):
        session = self.open("cancel")
        sender = Sender()
        call = self.kivi.Attend(sender)
        sender.send(attend_frame(session, layer=201))
        time.sleep(0.2)
        call.cancel()
        self.check_nothing_is_left_behind()

    def test_a_stream_cut_in_the_middle_of_a_frame_leaves_nothing(self):
        """A connection that dies inside a message, while another frame is in the engine."""
        session = self.open("cut")
        channel = self.kivid.channel()
        sender = Sender()
        call = Stub(channel).Attend(sender)
        sender.send(attend_frame(session, layer=201))
        sender.send(message("AttendRequest", data=b"x" * 4000000))
        time.sleep(0.1)
        channel.close()
        del call
        self.check_nothing_is_left_behind()

    def check_nothing_is_left_behind(self):
        """More streams than there are staging buffers can still be served, one after the other."""
        session = self.open("after")
        for _ in range(40):
            self.assertEqual(
                len(list(self.kivi.Attend(iter([attend_frame(session)]), timeout=10))), 1)

    def test_a_message_over_the_limit_is_refused_and_the_connection_lives(self):
        session = self.open("limit")
        self.fails(grpc.StatusCode.RESOURCE_EXHAUSTED, self.kivi.Append,
                   iter([message("AppendRequest", session=session, data=b"x" * (6 << 20))]))
        self.fails(grpc.StatusCode.INVALID_ARGUMENT, self.kivi.Append,
                   iter([message("AppendRequest", session=session,
                                 data=b"x" * ((4 << 20) + 60000))]), field="data")
        self.assertEqual(len(list(self.kivi.Append(iter([frame(session, 0)])))), 1)


class StandardTest(Case):
    """Health and reflection, as stock tools use them."""

    def health(self, service):
        return Stub(self.channel, "grpc.health.v1.Health").Check(
            message("grpc.health.v1.HealthCheckRequest", service=service), timeout=10).status

    def test_health_check(self):
        for service in "", "kivi.v1.Kivi", "kivi.v1.Admin", "live":
            self.assertEqual(self.health(service), 1)
        with self.assertRaises(grpc.RpcError) as caught:
            self.health("no.Such")
        self.assertEqual(caught.exception.code(), grpc.StatusCode.NOT_FOUND)

    def test_health_watch_of_an_unknown_service(self):
        watch = Stub(self.channel, "grpc.health.v1.Health").Watch(
            message("grpc.health.v1.HealthCheckRequest", service="no.Such"), timeout=10)
        self.assertEqual(next(watch).status, 3)
        watch.cancel()

    def reflect(self, version, **question):
        service = f"grpc.reflection.{version}.ServerReflection"
        request = message(f"grpc.reflection.{version}.ServerReflectionRequest", **question)
        return list(Stub(self.channel, service).ServerReflectionInfo(iter([request]), timeout=10))[0]

    def test_reflection_lists_and_describes_in_both_versions(self):
        for version in "v1", "v1alpha":
            names = [one.name for one in
                     self.reflect(version, list_services="").list_services_response.service]
            self.assertEqual(sorted(names), [
                "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection",
                "grpc.reflection.v1alpha.ServerReflection", "kivi.v1.Admin", "kivi.v1.Kivi"])
            for symbol, file in (("kivi.v1.Kivi", "kivi/v1/kivi.proto"),
                                 ("kivi.v1.Kivi.Attend", "kivi/v1/kivi.proto"),
                                 ("kivi.v1.AttendRequest.Item", "kivi/v1/kivi.proto"),
                                 ("kivi.v1.AttendRequest.Item.rows", "kivi/v1/kivi.proto"),
                                 ("kivi.v1.AttendRequest.Mask", "kivi/v1/kivi.proto"),
                                 ("kivi.v1.Tier", "kivi/v1/types.proto"),
                                 ("kivi.v1.Admin.Stats", "kivi/v1/admin.proto")):
                answer = self.reflect(version, file_containing_symbol=symbol)
                found = descriptor_pb2.FileDescriptorProto.FromString(
                    answer.file_descriptor_response.file_descriptor_proto[0])
                self.assertEqual(found.name, file, symbol)
            for symbol in "kivi.v1.Kiv", "kivi.v1.Kivi.", "kivi.v1", "kivi.v1.Nothing", "":
                answer = self.reflect(version, file_containing_symbol=symbol)
                self.assertEqual(answer.error_response.error_code, 5, symbol)

    def test_reflection_alone_is_enough_to_call(self):
        """What grpcurl does: start from nothing, fetch the files by name with all they import."""
        pool, waiting, done = descriptor_pool.DescriptorPool(), ["kivi/v1/kivi.proto"], {}
        while waiting:
            name = waiting.pop()
            answer = self.reflect("v1", file_by_filename=name)
            file = descriptor_pb2.FileDescriptorProto.FromString(
                answer.file_descriptor_response.file_descriptor_proto[0])
            done[name] = file
            waiting.extend(one for one in file.dependency if one not in done)
        while done:  # those first whose imports are all there
            ready = [name for name in done if not set(done[name].dependency) & set(done)]
            for name in ready:
                pool.Add(done.pop(name))
        self.assertIn("Attend", pool.FindServiceByName("kivi.v1.Kivi").methods_by_name)


class DrainTest(unittest.TestCase):
    def start(self, **keys):
        kivid = Kivid(**keys)
        channel = kivid.channel()
        kivi = Stub(channel)
        info = kivi.RegisterLayout(message("RegisterLayoutRequest", layout=layout()), timeout=10).info
        session = kivi.OpenSession(message("OpenSessionRequest", name="d",
                                           fingerprint=info.fingerprint)).session
        return kivid, channel, kivi, session

    def test_a_drain_finishes_the_streams_in_flight_and_refuses_new_calls(self):
        kivid, channel, kivi, session = self.start()
        watch = Stub(channel, "grpc.health.v1.Health").Watch(
            message("grpc.health.v1.HealthCheckRequest"))
        self.assertEqual(next(watch).status, 1)
        sender = Sender()
        call = kivi.Attend(sender, timeout=20)
        sender.send(attend_frame(session, layer=200, ident=1))
        time.sleep(0.1)

        kivid.terminate()
        self.assertEqual(next(watch).status, 2)  # NOT_SERVING
        self.assertEqual(next(call).id, 1)
        for ident in range(2, 6):  # a stream that goes on is let go on
            sender.send(attend_frame(session, layer=200, ident=ident))
            self.assertEqual(next(call).id, ident)
        self.assertFalse(os.path.exists(kivid.path))
        fresh = kivid.channel()
        with self.assertRaises(grpc.RpcError) as caught:
            Stub(fresh).List(message("ListRequest"), timeout=2).next()
        self.assertIn(caught.exception.code(), (grpc.StatusCode.UNAVAILABLE,
                                                grpc.StatusCode.DEADLINE_EXCEEDED))
        sender.done()
        self.assertEqual(list(call), [])
        self.assertEqual(call.code(), OK)
        fresh.close()
        channel.close()
        kivid.stop(expect=0)

    def test_an_idle_stream_does_not_hold_a_drain_up(self):
        kivid, channel, kivi, session = self.start(grace_ms=20000)
        sender = Sender()
        call = kivi.Append(sender)
        sender.send(frame(session, 0))
        next(call)
        began = time.monotonic()
        kivid.terminate()
        with self.assertRaises(grpc.RpcError):
            next(call)
        self.assertEqual(call.code(), grpc.StatusCode.UNAVAILABLE)
        sender.done()
        kivid.stop(expect=0)
        self.assertLess(time.monotonic() - began, 10)
        channel.close()

    def test_after_the_grace_a_hanging_call_is_cut_off(self):
        kivid, channel, kivi, session = self.start(grace_ms=300)
        sender = Sender()
        call = kivi.Attend(sender)
        sender.send(attend_frame(session, layer=201))
        time.sleep(0.2)
        kivid.stop(expect=1)
        with self.assertRaises(grpc.RpcError):
            next(call)
        sender.done()
        channel.close()

    def test_a_second_signal_ends_the_grace(self):
        kivid, channel, kivi, session = self.start(grace_ms=60000)
        sender = Sender()
        call = kivi.Attend(sender)
        sender.send(attend_frame(session, layer=201))
        time.sleep(0.2)
        began = time.monotonic()
        kivid.terminate()
        time.sleep(0.3)
        kivid.terminate()
        kivid.stop(expect=1)
        self.assertLess(time.monotonic() - began, 20)
        sender.done()
        del call
        channel.close()


class SocketTest(unittest.TestCase):
    def test_only_the_owner_may_open_the_socket(self):
        kivid = Kivid()
        self.assertEqual(os.stat(kivid.path).st_mode & 0o777, 0o600)
        self.assertEqual(os.stat(os.path.dirname(kivid.path)).st_mode & 0o777, 0o700)
        kivid.stop()

    def test_a_socket_in_use_is_left_alone_and_a_stale_one_replaced(self):
        first = Kivid()
        second = subprocess.run([KIVID, "--listen=" + first.target, "--disk-path="],
                                stderr=subprocess.PIPE, timeout=30)
        self.assertEqual(second.returncode, 3, second.stderr)
        self.assertIn(b"someone answers", second.stderr)
        first.process.kill()  # leaves its socket behind
        first.process.wait()
        self.assertTrue(os.path.exists(first.path))
        third = Kivid(listen=first.target)
        third.path, third.target = first.path, first.target
        self.assertTrue(Stub(third.channel(), "kivi.v1.Admin").Stats(
            message("StatsRequest"), timeout=10).ready)
        third.stop()
        first.stop(expect=-signal.SIGKILL)

    def test_what_is_not_a_socket_is_not_removed(self):
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "precious")
            with open(path, "w") as file:
                file.write("data")
            run = subprocess.run([KIVID, "--listen=unix://" + path, "--disk-path="],
                                 stderr=subprocess.PIPE, timeout=30)
            self.assertEqual(run.returncode, 3)
            with open(path) as file:
                self.assertEqual(file.read(), "data")

    def test_tcp_on_the_loopback(self):
        kivid = Kivid(listen="", listen_tcp="127.0.0.1:0")
        port = int(kivid.said().split("tcp port ")[1].split()[0])
        channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self.assertTrue(Stub(channel, "kivi.v1.Admin").Stats(message("StatsRequest"), timeout=10).ready)
        channel.close()
        kivid.stop()

    def test_connections_are_bounded_and_come_back(self):
        kivid = Kivid(connections_max=4)

        def connect():
            one = socket.socket(socket.AF_UNIX)
            one.connect(kivid.path)
            one.settimeout(0.5)
            return one

        held = [connect() for _ in range(4)]
        fifth = connect()
        self.assertEqual(fifth.recv(100), b"")  # closed at once
        for one in (*held, fifth):
            one.close()
        time.sleep(0.3)
        channel = kivid.channel()
        self.assertTrue(Stub(channel, "kivi.v1.Admin").Stats(message("StatsRequest"), timeout=10).ready)
        channel.close()
        kivid.stop()

    def test_running_out_of_descriptors_is_survived(self):
        """gRPC 1.51's own listener would be deaf for good (CVE-2023-4785)."""
        kivid = Kivid()
        soft = subprocess.run(["prlimit", f"--pid={kivid.process.pid}", "--nofile=40:40"])
        self.assertEqual(soft.returncode, 0)
        held = []
        for _ in range(60):
            one = socket.socket(socket.AF_UNIX)
            one.connect(kivid.path)
            held.append(one)
        time.sleep(0.5)
        for one in held:
            one.close()
        time.sleep(0.5)
        channel = kivid.channel()
        self.assertTrue(Stub(channel, "kivi.v1.Admin").Stats(message("StatsRequest"), timeout=10).ready)
        channel.close()
        kivid.stop()


class HostileTest(unittest.TestCase):
    """Clients that do not behave cost what the configuration says, and others are served."""

    keys = dict(message_bytes_max="1MiB", staging_count=8, rpc_bytes_max="64MiB", stall_ms=3000,
                connections_max=256)

    def allowed(self):
        check = subprocess.run([KIVID, "--check-config", "--disk-path=", "--arena-bytes=4MiB",
                                "--tail-bytes-max=1MiB", "--blocks-max=1024",
                                "--sessions-max=1024",
                                *(f"--{key.replace('_', '-')}={value}"
                                  for key, value in self.keys.items())],
                               stdout=subprocess.PIPE, check=True, text=True)
        return int(check.stdout.split("total ")[1].split()[0]) << 20

    def test_64_that_never_read_and_64_that_say_nothing(self):
        kivid = Kivid(**self.keys)
        channel = kivid.channel()
        kivi = Stub(channel)
        info = kivi.RegisterLayout(message("RegisterLayoutRequest", layout=layout()), timeout=10).info
        session = kivi.OpenSession(message("OpenSessionRequest", name="h",
                                           fingerprint=info.fingerprint)).session
        items = [message("AttendRequest.Item", session=session, rows=128) for _ in range(32)]
        big = message("AttendRequest", items=items, data=b"q" * 900000)  # and 1 MB back
        peak, hostile, silent = [0], [], []
        stop = threading.Event()

        def measure():
            while not stop.wait(0.05):
                peak[0] = max(peak[0], kivid.memory())

        threading.Thread(target=measure, daemon=True).start()
        for _ in range(64):
            one = kivid.channel()
            sender = Sender()
            hostile.append((one, sender, Stub(one).Attend(sender)))
            for _ in range(8):
                sender.send(big)
        for _ in range(64):
            one = socket.socket(socket.AF_UNIX)
            one.connect(kivid.path)
            silent.append(one)
            quiet = Stub(channel).Append(Sender())
            silent.append(quiet)

        # Beside all that, one client works.
        served, worst, mistaken = 0, 0, 0
        until = time.monotonic() + 8
        while time.monotonic() < until:
            began = time.monotonic()
            try:
                answer = list(kivi.Attend(iter([attend_frame(session)]), timeout=20))
            except grpc.RpcError as error:
                # On a machine that starves this client it can look as if it did not read.
                self.assertIn(error.code(), (grpc.StatusCode.RESOURCE_EXHAUSTED,
                                             grpc.StatusCode.INTERNAL))
                mistaken += 1
                continue
            worst = max(worst, time.monotonic() - began)
            served += len(answer)
        stop.set()
        print(f"peak {peak[0] >> 20} MiB of {self.allowed() >> 20}, {served} calls served beside, "
              f"the slowest {worst:.2f} s", flush=True)
        with open(KIVID, "rb") as program:
            text = program.read()
        sanitized = b"__asan_init" in text or b"__tsan_init" in text
        if not sanitized:  # a sanitizer's own memory is in nobody's configuration
            self.assertLess(peak[0], self.allowed())
        self.assertGreater(served, 10)
        self.assertLess(mistaken, 1 + served // 10)
        self.assertIn("does not read", kivid.said())
        for one, sender, call in hostile:
            sender.done()
            one.close()
        for one in silent:
            one.close() if isinstance(one, socket.socket) else one.cancel()
        channel.close()
        kivid.stop()


if __name__ == "__main__":
    program = unittest.main(argv=[sys.argv[0], *sys.argv[3:]], verbosity=2, exit=False,
                            warnings="ignore")
    sys.stderr.flush()
    atexit._run_exitfuncs()
    # At once: a stream that a failed test left open would keep grpcio's threads, and us, for ever.
    os._exit(not program.result.wasSuccessful())
