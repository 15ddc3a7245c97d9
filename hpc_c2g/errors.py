"""The one exception that users see without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in the input: names the problem, its place and the fix.

    Args:
        problem: Description of the fault, with the field or file and its value.
        hint: Action that fixes it.
    """

    def __init__(self, problem: str, hint: str = "") -> None:
        self.problem = problem
        self.hint = hint
        super().__init__(f"{problem} -- {hint}" if hint else problem)


def require(condition: bool, name: str, value: object, hint: str) -> None:
    """Check a setting.

    Raises:
        UserError: ``condition`` is False; names the field, its value and the fix.
    """
    if not condition:
        raise UserError(f"{name}={value} is not possible", hint)
