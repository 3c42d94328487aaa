"""A gRPC client that knows nothing but the address: everything else comes from reflection."""

import itertools

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


class Service:
    """Calls the methods of one service by name, with messages made from the descriptors."""

    def __init__(self, address, name):
        self.channel = grpc.insecure_channel(address)
        self.database = ProtoReflectionDescriptorDatabase(self.channel)
        self.descriptor = descriptor_pool.DescriptorPool(self.database).FindServiceByName(name)

    def message(self, method, **fields):
        return message_factory.GetMessageClass(self.descriptor.FindMethodByName(method).input_type)(**fields)

    def call(self, method, timeout=30, **fields):
        m = self.descriptor.FindMethodByName(method)
        kind = self.channel.unary_stream if m.server_streaming else self.channel.unary_unary
        stub = kind(
            f"/{self.descriptor.full_name}/{method}",
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(m.output_type).FromString,
        )
        return stub(self.message(method, **fields), timeout=timeout)


@pytest.fixture(scope="module")
def inference(address):
    return Service(address, "moesaic.v1.Inference")


QUESTION = {"messages": [{"role": "user", "content": "347+586="}]}


def test_reflection_lists_the_services(inference):
    assert {"moesaic.v1.Inference", "grpc.health.v1.Health"} <= set(inference.database.get_services())


def test_health(address):
    answer = Service(address, "grpc.health.v1.Health").call("Check")
    assert answer.status == 1, "SERVING"


def test_models_and_tokenize(inference):
    models = inference.call("ListModels").models
    assert [m.name for m in models] == ["tiny-r1"]
    assert models[0].numerics == "f32" and len(models[0].fingerprint) == 32
    assert list(inference.call("Tokenize", text="3+4").ids) == [67, 59, 68]


def test_streaming_counts_every_position_once(inference):
    answers = list(inference.call("Generate", chat=QUESTION, sampling={"temperature": 0}, logprobs=1))
    position = 0
    for answer in answers:
        if answer.tokens:
            assert answer.position == position
            position += len(answer.tokens)
    finish = answers[-1].finish
    assert finish.reason == 1 and finish.completion_tokens == position
    assert "".join(a.text for a in answers).endswith("933")
    assert all(t.logprob <= 0 and len(t.top) == 1 for a in answers for t in a.tokens)


def test_abort_ends_the_stream(inference):
    stream = inference.call(
        "Generate", request_id="to-abort", text="1", sampling={"temperature": 0}, ignore_eos=True, max_tokens=3000
    )
    list(itertools.islice(stream, 3))
    with pytest.raises(grpc.RpcError) as taken:
        list(inference.call("Generate", request_id="to-abort", text="1"))
    assert taken.value.code() == grpc.StatusCode.ALREADY_EXISTS
    assert inference.call("Abort", request_id="to-abort").aborted
    rest = list(stream)
    assert rest[-1].finish.reason == 3
    assert rest[-1].finish.completion_tokens < 3000
    assert not inference.call("Abort", request_id="to-abort").aborted


@pytest.mark.parametrize(
    "fields, code, words",
    [
        ({"text": "1", "model": "none"}, grpc.StatusCode.NOT_FOUND, "none"),
        ({}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        ({"tokens": {"ids": [1, 288]}}, grpc.StatusCode.INVALID_ARGUMENT, "288"),
        ({"text": "1", "sampling": {"temperature": float("nan")}}, grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
        ({"text": "1", "sampling": {"top_p": -0.5}}, grpc.StatusCode.INVALID_ARGUMENT, "top_p"),
        ({"text": "1", "max_tokens": 0}, grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
        ({"text": "1", "stop": [""]}, grpc.StatusCode.INVALID_ARGUMENT, "stop"),
        ({"text": "1" * 5000}, grpc.StatusCode.INVALID_ARGUMENT, "4096"),
        ({"text": "1", "request_id": "x" * 200}, grpc.StatusCode.INVALID_ARGUMENT, "request_id"),
    ],
)
def test_bad_requests_name_the_field(inference, fields, code, words):
    with pytest.raises(grpc.RpcError) as caught:
        list(inference.call("Generate", **fields))
    assert caught.value.code() == code
    assert words in caught.value.details()


def test_malformed_protobuf_is_an_error_and_no_more(inference):
    stub = inference.channel.unary_stream("/moesaic.v1.Inference/Generate")
    with pytest.raises(grpc.RpcError) as caught:
        list(stub(b"\xff\xff\xff\xff", timeout=10))
    assert caught.value.code() in {grpc.StatusCode.INTERNAL}
    assert inference.call("ListModels").models
