"""Errors meant for users: what is wrong, where, and what to do. Raised by every room, printed by cli.py."""

from __future__ import annotations


class _Message(BaseException):
    """What is wrong, where, and what to do, as the command line prints it."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.hint:
            lines.append(f"  to do: {self.hint}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple:
        # Keyword-only arguments do not survive the default pickling, and workers send errors to their parent.
        return _rebuild, (type(self), self.what, self.where, self.hint)


class EclipseError(_Message, Exception):
    """One message for the user. The command line prints it without a traceback and exits with `exit_code`.

    what: the problem in one sentence; where: file, row or key; hint: what to do next.
    """


class UsageError(EclipseError):
    """The command was called in a way that cannot work: exit code 2."""

    exit_code = 2


class Terminated(_Message):
    """Stopped by SIGTERM after saving: exit code 143, so that a scheduler never mistakes it for done.

    Like KeyboardInterrupt no Exception: the signal may arrive inside a library call whose every failure is handled.
    """

    exit_code = 143


def _rebuild(kind: type[_Message], what: str, where: str | None, hint: str | None) -> _Message:
    return kind(what, where=where, hint=hint)
