"""The operators: tensors in, tensors out. One folder a family; each `__init__` is a contract and its mathematics."""

from fastseq.ops import attention, crf, pointer

__all__ = ["attention", "crf", "pointer"]
