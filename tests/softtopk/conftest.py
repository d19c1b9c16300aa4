"""Triton's interpreter, made quicker for these tests."""

from __future__ import annotations

import pytest

import softtopk
from tests.conftest import device_of


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """At every call inside a kernel the interpreter looks for functions of triton.language to replace. It
    reads and sorts all members for that, which takes a third of its time: here it reads the dictionaries."""
    if softtopk.available_backends()["triton"] is not None or device_of("triton") != "cpu":
        yield
        return
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    def patch_builtin(package, builder, scope):
        for part in getattr(package, "__mro__", (package,)):
            for name in [name for name, member in vars(part).items() if is_builtin(member)]:
                if is_builtin(member := getattr(package, name)):  # not replaced yet
                    interpreter._patch_attr(package, name, member, builder, scope)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_builtin", patch_builtin)
        yield
