"""Prompt tensors of a conversation, and the texts that no message may contain, under their names in `vismem.data`."""

from vismem.data.batches import chat_inputs, reserved_texts
from vismem.deprecation import renamed

__all__ = ["chat_inputs", "reserved_texts"]

__getattr__ = renamed(__name__, {"inputs_of": "chat_inputs", "marks_of": "reserved_texts"})
