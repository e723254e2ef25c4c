"""What workers are made to do in tests of the window; imported by their processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path


class UnportableError(Exception):
    """Cannot be unpickled."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


class StopError(Exception):
    """Ends everything."""


def chore(words):
    """Do one thing after another; returns the last word."""
    word = ""
    for word in words.split():
        what, _, value = word.partition("=")
        if what == "sleep":
            time.sleep(float(value))
        elif what == "mark":
            Path(value).touch()
        elif what == "log":
            with Path(value).open("a") as file:
                file.write(f"{os.getpid()}\n")
        elif what == "raise":
            raise {"value": ValueError("no good"), "memory": MemoryError(), "stop": StopError("enough")}[value]
        elif what == "unportable":
            raise UnportableError(1, 2)
        elif what == "exit":
            sys.exit(3)
        elif what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif what == "large":
            return b"x" * int(value)
    return word
