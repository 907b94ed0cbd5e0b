"""The agent's protobuf bindings as the guest gets them.

What protoc generates imports protobuf's pure Python half (text format, reflection, the symbol database...), and an
emulated CPU spends 0.3 s of every boot on that. The C half (upb) builds the message classes by itself: the guest's
`agent_pb2` does that and nothing else, from the same serialized descriptor. What is lost is what the agent has no use
for: services, extensions, and looking types up by name.
"""

from __future__ import annotations

import ast

from vmrt.errors import VmrtError

PHASE = "guest image bindings"

_MODULE = '''"""Bindings of {name}; made by vmrt/guest_image/bindings.py. Do not edit."""
import sys
from types import ModuleType

# upb asks this module for extra methods of google.protobuf.Timestamp and the like, and it imports calendar, locale and
# re. The schema uses none of those types (were it otherwise, adding the descriptor below would fail).
_bases = sys.modules.setdefault("google.protobuf.internal.well_known_types", ModuleType("well_known_types"))
_bases.WKTBASES = {{}}

from google._upb import _message
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message import Message

DESCRIPTOR = _message.default_pool.AddSerializedFile({descriptor!r})
for _name, _type in DESCRIPTOR.message_types_by_name.items():
    globals()[_name] = _message.MessageMeta(_name, (Message,), {{"DESCRIPTOR": _type, "__module__": __name__}})
for _name, _type in DESCRIPTOR.enum_types_by_name.items():
    globals()[_name] = EnumTypeWrapper(_type)
    for _value in _type.values:
        globals()[_value.name] = _value.number
'''


def slim(generated: bytes, name: str = "agent.proto") -> bytes:
    """Return the module that replaces what protoc generated.

    Raises `VmrtError` when `generated` does not hold exactly one serialized descriptor.
    """
    calls = [
        node.args[0].value
        for node in ast.walk(ast.parse(generated))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "AddSerializedFile"
        and len(node.args) == 1
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, bytes)
    ]
    if len(calls) != 1:
        raise VmrtError(
            f"found {len(calls)} serialized descriptors instead of one",
            phase=PHASE,
            resource=name,
            hint="has protoc changed what it generates? run `make stubs`",
        )
    return _MODULE.format(name=name, descriptor=calls[0]).encode()
