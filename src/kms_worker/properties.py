"""What RabbitMQ says of a message, read so that no message ends the worker.

py-amqp 5 raises out of its connection where it cannot decode that, before the service sees the message, which
then comes back at each connection. Here such a message arrives with ``UNREADABLE`` among its headers, or with
an empty routing key.
"""

import struct
from typing import Any, Final

from kombu.transport.pyamqp import amqp  # type: ignore[attr-defined]  # the one that kombu uses

from kms_worker.messages import HEADERS, UNREADABLE

_ERRORS: Final = (ValueError, ArithmeticError, OSError, LookupError, RecursionError, struct.error)
_serialization: Final = amqp.serialization
_SCALARS: Final = (str, int, float)
_DELIVER: Final = "sLbss"  # arguments of basic.deliver: consumer, tag, redelivered, exchange, routing key


def decode(buf: bytes, offset: int) -> tuple[dict[str, Any], int]:
    """The properties at ``offset``, and where they end. Of the headers those of use that hold no table."""
    try:
        found, end = _serialization.decode_properties_basic(buf, offset)
    except (*_ERRORS, amqp.exceptions.FrameSyntaxError):
        return {"application_headers": {UNREADABLE: True}}, len(buf)
    headers = found.pop("application_headers", {})
    kept = {name: headers[name] for name in HEADERS if isinstance(headers.get(name), _SCALARS)}
    return {**found, "application_headers": kept}, end


def arguments(kinds: str | bytes, buf: bytes, offset: int) -> tuple[list[Any], int]:
    """The arguments of a method. Exchange and routing key of a delivery are empty where they are no UTF-8."""
    try:
        found, end = _serialization.loads(kinds, buf, offset)
    except UnicodeDecodeError:
        if kinds not in {_DELIVER, _DELIVER.encode()}:
            raise
        found, _ = _serialization.loads(_DELIVER[:-2], buf, offset)
        return [*found, "", ""], len(buf)
    return found, end


def install() -> None:
    """Read all connections of this process so from now on."""
    _serialization.PROPERTY_CLASSES[amqp.spec.Basic.CLASS_ID] = decode
    amqp.abstract_channel.loads = arguments
