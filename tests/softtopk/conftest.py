"""Triton's interpreter, made quicker for these tests: the same objects, made once; and fixtures that watch
which way a call goes."""

from __future__ import annotations

import functools
import math
import types

import pytest

import softtopk
from softtopk import direct, ops
from tests.conftest import device_of


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    if softtopk.available_backends()["triton"] is not None or device_of("triton") != "cpu":
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    names = ("_patch_lang", "_LangPatchScope", "_get_np_dtype")
    if not all(hasattr(interpreter, name) for name in names):  # another Triton: slower, and as good
        yield
        return

    # At every call of a function inside a kernel the interpreter replaces those of triton.language
    # by its own, which takes a third of its time. Here they are replaced once.
    modules = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    replaced = interpreter._patch_lang(modules)

    @functools.cache
    def shape_of(numbers):
        return tl.core.tuple([tl.constexpr(n) for n in numbers]), tl.constexpr(math.prod(numbers))

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape_of(tuple(type.shape) if type.is_block() else ())

    blocks = {}  # the attributes of every block type

    def block_type(self, element_ty, shape):
        key = element_ty.name, tuple(n.value if isinstance(n, tl.constexpr) else n for n in shape)
        if key not in blocks:
            new_block_type(self, element_ty, shape)
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key])

    new_block_type = tl.block_type.__init__
    numpy_types = {}  # by name

    def numpy_type(type):
        scalar = type.scalar
        if scalar.name not in numpy_types:
            numpy_types[scalar.name] = original(scalar)
        return numpy_types[scalar.name]

    original = interpreter._get_np_dtype
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
        patch.setattr(interpreter, "_get_np_dtype", numpy_type)
        patch.setattr(tl.tensor, "__init__", tensor)
        patch.setattr(tl.block_type, "__init__", block_type)
        yield
    replaced.restore()


OPERATORS = ("soft_topk_op", "backward_op", "mask_op", "indices_op")


@pytest.fixture
def operators(monkeypatch) -> list[str]:
    """The operators that the public functions have called."""
    called = []

    def watch(name: str):
        operator = getattr(ops, name)

        def watched(*arguments):
            called.append(name)
            return operator(*arguments)

        monkeypatch.setattr(ops, name, watched)

    for name in OPERATORS:
        watch(name)
    return called


@pytest.fixture
def at_once(monkeypatch) -> list[bool]:
    """For every call of soft_topk that asked for it, whether the native module did all of it."""
    answers = []
    native = direct.soft_topk

    def watched(*arguments):
        p = native(*arguments)
        answers.append(p is not None)
        return p

    monkeypatch.setattr(direct, "soft_topk", watched)
    return answers
