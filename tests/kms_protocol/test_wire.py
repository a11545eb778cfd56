import io
from collections.abc import Iterator
from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kms_protocol import admin, wire
from kms_protocol.wire import Answer, Body, DecryptIn, EncryptIn, EncryptOut, GenerateKeyIn, JobIn, Shape

SECRET = "hunter2"


def shapes(kind: type[Shape]) -> Iterator[type[Shape]]:
    for child in kind.__subclasses__():
        yield child
        yield from shapes(child)


EVERY = sorted(set(shapes(Shape)) - {Body, Answer}, key=lambda shape: shape.__name__)
assert {admin.AuditOut, wire.Submission} < set(EVERY)
every_shape = pytest.mark.parametrize("shape", EVERY, ids=lambda shape: shape.__name__)


def filled(shape: type[Shape]) -> Shape:
    """A shape with something secret in every field, types aside."""
    return shape(**dict.fromkeys(shape.__struct_fields__, SECRET))


def refusal(body: bytes, shape: type[Shape] = EncryptIn) -> str:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.json.decode(body, type=shape)
    return str(caught.value)


# -- nothing is shown --------------------------------------------------------------------------------


@every_shape
def test_no_shape_shows_its_values(shape: type[Shape]) -> None:
    body = filled(shape)

    for text in (repr(body), str(body), f"{body!r:>5}", repr([body])):
        assert SECRET not in text
    assert shape.__name__ in repr(body)


@every_shape
def test_nor_to_rich(shape: type[Shape]) -> None:
    assert filled(shape).__rich_repr__() == []


@every_shape
def test_no_shape_changes(shape: type[Shape]) -> None:
    body = filled(shape)

    with pytest.raises(AttributeError):
        setattr(body, shape.__struct_fields__[0], "")


# -- bodies are read strictly ------------------------------------------------------------------------


@every_shape
def test_bodies_refuse_unknown_fields_and_answers_pass_them_over(shape: type[Shape]) -> None:
    assert shape.__struct_config__.forbid_unknown_fields == issubclass(shape, Body)


def test_null_is_absent() -> None:
    body = msgspec.json.decode(b'{"plaintext":"","context":null,"key_id":null}', type=EncryptIn)

    assert body == EncryptIn(plaintext=b"")


def test_a_context_is_text_or_an_object() -> None:
    text = msgspec.json.decode(b'{"plaintext":"","context":"a=b"}', type=EncryptIn)
    pairs = msgspec.json.decode(b'{"plaintext":"","context":{"a":"b"}}', type=EncryptIn)

    assert text.context == "a=b"
    assert pairs.context == {"a": "b"}


@pytest.mark.parametrize(
    "body",
    [
        b'{"plaintext":"hunter2!"}',
        b'{"plaintext":"hunter2hunter2="}',
        b'{"plaintext":"aHVudGVyMg"}',
        b'{"plaintext":7}',
        b'{"plaintext":"","key_id":"hunter2/../x"}',
        b'{"plaintext":"","context":{"a":{"hunter2":1}}}',
        b'{"plaintext":"","context":["hunter2"]}',
        b'{"context":"hunter2"}',
        b'["hunter2"]',
    ],
    ids=["alphabet", "length", "unpadded", "number", "key id", "nested", "list", "missing", "array"],
)
def test_a_wrong_body_is_refused_and_not_quoted(body: bytes) -> None:
    assert SECRET not in refusal(body)


@pytest.mark.parametrize("key_id", ["", "a b", "a/b", "ü", "a" * 81, "../x", "transit://v"])
def test_a_key_id_is_a_plain_name(key_id: str) -> None:
    body = msgspec.json.encode({"ciphertext": "", "key_id": key_id})

    assert refusal(body, DecryptIn).startswith("Expected `str` matching regex")


@pytest.mark.parametrize("key_id", ["a", "a" * 80, "provisioning-master-key", "A.b_C-9", "-", "."])
def test_plain_names_are_key_ids(key_id: str) -> None:
    body = msgspec.json.encode({"ciphertext": "", "key_id": key_id})

    assert msgspec.json.decode(body, type=DecryptIn).key_id == key_id


@pytest.mark.parametrize(
    ("fields", "fits"),
    [
        ({"number_of_bytes": 1}, True),
        ({"number_of_bytes": 1024}, True),
        ({"number_of_bytes": 0}, False),
        ({"number_of_bytes": 1025}, False),
        ({"key_spec": "AES_256"}, True),
        ({"key_spec": "AES_192"}, False),
    ],
    ids=str,
)
def test_data_keys_have_sizes_within_bounds(fields: dict[str, object], *, fits: bool) -> None:
    body = msgspec.json.encode(fields)
    if fits:
        assert isinstance(msgspec.json.decode(body, type=GenerateKeyIn), GenerateKeyIn)
    else:
        assert refusal(body, GenerateKeyIn)


@pytest.mark.parametrize(("ttl_s", "fits"), [(59, False), (60, True), (2_592_000, True), (2_592_001, False)])
def test_a_job_lives_between_a_minute_and_thirty_days(ttl_s: int, *, fits: bool) -> None:
    body = msgspec.json.encode({"kind": "encrypt", "ttl_s": ttl_s})
    if fits:
        assert msgspec.json.decode(body, type=JobIn).ttl_s == ttl_s
    else:
        assert refusal(body, JobIn)


@pytest.mark.parametrize(("count", "fits"), [(0, False), (1, True), (1000, True), (1001, False)])
def test_a_batch_has_one_to_a_thousand_items(count: int, *, fits: bool) -> None:
    body = msgspec.json.encode({"operation": "encrypt", "items": [{}] * count})
    if fits:
        assert len(msgspec.json.decode(body, type=wire.BatchIn).items) == count
    else:
        assert refusal(body, wire.BatchIn)


# -- bytes -------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=100))
def test_bytes_travel_as_padded_standard_base64(data: bytes) -> None:
    body = wire.encode(EncryptOut(ciphertext=data, key_id="k", key_version="1", backend="age"))

    assert msgspec.json.decode(body, type=EncryptOut).ciphertext == data


def test_base64_is_the_standard_alphabet() -> None:
    body = wire.encode(EncryptOut(ciphertext=b"\xfb\xff", key_id="k", key_version="1", backend="age"))

    assert b'"ciphertext":"+/8="' in body


# -- answers -----------------------------------------------------------------------------------------


def test_unset_fields_do_not_appear() -> None:
    assert wire.encode(wire.ItemResult(index=3, ciphertext=b"x")) == b'{"index":3,"ciphertext":"eA=="}'


def test_links_name_themselves_self() -> None:
    links = wire.JobLinks(self_="/j/1", result="/j/1/result")

    assert io.BytesIO(wire.encode(links)).read() == (b'{"self":"/j/1","result":"/j/1/result"}')


def test_states_are_those_of_the_type() -> None:
    assert set(wire.STATES) >= wire.ENDED
    assert set(wire.KEY_SPEC_BYTES) == set(get_args(wire.KeySpec))
