# SPDX-License-Identifier: Apache-2.0
"""What a caller may bring: element types and kinds of arrays, targets, TLS, a token, an absent service."""

import array
import concurrent.futures
import socket
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest
import torch

import kivi
from kivi import tensors
from kivi.v1 import kivi_pb2, kivi_pb2_grpc

LAYOUT = dict(layers=1, kv_heads=1, query_heads=1, head_dim=64)


def bits_of(values):
    """bfloat16 bit patterns of float32 values that are exact in it."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


class Dlpack:
    """An array of no library we know."""

    def __init__(self, held):
        self.held = held

    def __dlpack__(self, **arguments):
        return self.held.__dlpack__(**arguments)

    def __dlpack_device__(self):
        return self.held.__dlpack_device__()


def test_bf16_from_numpy_and_torch_comes_back(daemon):
    rng = np.random.default_rng(1)
    k = rng.integers(-8, 8, (5, 1, 64)).astype(np.float32)
    v = rng.integers(-8, 8, (5, 1, 64)).astype(np.float32)
    with kivi.Client(daemon.target) as client:
        layout = kivi.Layout(**LAYOUT, dtype="bf16", codec="raw16")
        with client.session("numpy", layout) as ours, client.session("torch", layout) as theirs:
            ours.append(0, bits_of(k), bits_of(v))
            theirs.append(0, torch.tensor(k, dtype=torch.bfloat16),
                          torch.tensor(v, dtype=torch.bfloat16))
            for session in (ours, theirs):
                part = next(iter(session.fetch()))
                np.testing.assert_array_equal(np.asarray(part.k, np.float32).reshape(k.shape), k)
                np.testing.assert_array_equal(np.asarray(part.v, np.float32).reshape(v.shape), v)


def test_uint16_is_taken_for_bf16_alone():
    bits = np.zeros((1, 1, 64), np.uint16)
    assert len(tensors.to_wire(bits, "bf16", (-1, 1, 64), "k")) == 128
    with pytest.raises(TypeError, match="^k: elements are uint16, the layout says f16"):
        tensors.to_wire(bits, "f16", (-1, 1, 64), "k")


def test_dlpack_and_the_buffer_protocol():
    wanted = np.arange(64, dtype=np.float32).reshape(1, 1, 64)
    assert bytes(tensors.to_wire(Dlpack(wanted), "f32", (-1, 1, 64), "k")) == wanted.tobytes()
    flat = array.array("f", wanted.reshape(-1).tolist())
    assert bytes(tensors.to_wire(flat, "f32", (64,), "k")) == wanted.tobytes()
    with pytest.raises(TypeError, match="uint16 bit patterns"):
        tensors.to_numpy(Dlpack(torch.zeros(3, dtype=torch.bfloat16)))


def test_torch_is_not_imported_for_the_caller():
    code = ("import sys, numpy, kivi.tensors; kivi.tensors.to_numpy(numpy.zeros(3)); "
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Stub(kivi_pb2_grpc.KiviServicer):
    """Answers Delete and remembers what came with it."""

    def __init__(self):
        self.metadata = []

    def Delete(self, request, context):
        self.metadata.append(dict(context.invocation_metadata()))
        return kivi_pb2.DeleteResponse()


def serve(add_port):
    stub = Stub()
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
    kivi_pb2_grpc.add_KiviServicer_to_server(stub, server)
    port = add_port(server)
    server.start()
    return stub, server, port


@pytest.mark.parametrize("target", ["127.0.0.1:{}", "dns:///localhost:{}"])
def test_targets_and_token(target):
    stub, server, port = serve(lambda s: s.add_insecure_port("localhost:0"))
    try:
        with kivi.Client(target.format(port), token="s3cret") as client:
            client.delete("x", timeout=10)
        with kivi.Client(target.format(port)) as client:
            client.delete("x", timeout=10)
    finally:
        server.stop(None)
    assert stub.metadata[0]["authorization"] == "Bearer s3cret"
    assert "authorization" not in stub.metadata[1]


def test_tls(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
                    "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
                    "-keyout", key, "-out", certificate], check=True, capture_output=True)
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    stub, server, port = serve(lambda s: s.add_secure_port("localhost:0", credentials))
    try:
        with kivi.Client(f"localhost:{port}", tls=kivi.Tls(root=str(certificate))) as client:
            client.delete("x", timeout=10)
        assert len(stub.metadata) == 1
        with kivi.Client(f"localhost:{port}", retries=0) as plain:
            with pytest.raises(kivi.Unavailable):
                plain.delete("x", timeout=10)
    finally:
        server.stop(None)
    assert len(stub.metadata) == 1


def test_what_is_safe_is_tried_again_until_the_service_is_there():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    started = []

    def later():
        time.sleep(0.15)
        started.append(serve(lambda s: s.add_insecure_port(f"127.0.0.1:{port}")))

    thread = threading.Thread(target=later)
    options = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.min_reconnect_backoff_ms", 50),
               ("grpc.max_reconnect_backoff_ms", 50)]
    with kivi.Client(f"127.0.0.1:{port}", retries=0, options=options) as client:
        with pytest.raises(kivi.Unavailable):
            client.delete("x", timeout=5)
    with kivi.Client(f"127.0.0.1:{port}", retries=8, options=options) as client:
        thread.start()
        client.delete("x", timeout=20)
    thread.join()
    stub, server, _ = started[0]
    server.stop(None)
    assert len(stub.metadata) == 1


def test_an_interrupted_evaluation_goes_on(tmp_path):
    from kivi.eval.__main__ import Results
    path = tmp_path / "run.partial"
    first = Results(path, "key")
    first.add("text", 0, "kivi2", {"nll": 1.5})
    with path.open("a") as file:
        file.write('{"key": "key", "part": "te')  # stopped while writing
    second = Results(path, "key")
    assert second.has("text", 0, "kivi2")
    second.add("text", 1, "kivi2", {"nll": 2.5})
    third = Results(path, "key")
    assert third.total("text", "kivi2") == {"nll": 4.0}
