"""The command line, called as a function."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout

from softsae.cli import main


def run(*arguments, status: int = 0) -> tuple[str, str]:
    """What a command says and complains of; it must end with the given status."""
    said, complaints = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(complaints):
        ended = main([str(argument) for argument in arguments])
    assert ended == status, complaints.getvalue()
    return said.getvalue(), complaints.getvalue()
