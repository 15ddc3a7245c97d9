"""The one exception that users see without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in the input: says what is wrong, where, and how to mend it.

    Args:
        what: the fault, naming the field or file and its value.
        mend: what the user can do about it.
    """

    def __init__(self, what: str, hint: str = "") -> None:
        self.problem = what
        self.hint = hint
        super().__init__(f"{what} -- {hint}" if hint else what)


def require(condition: bool, name: str, value: object, hint: str) -> None:
    """Check of a setting.

    Raises:
        UserError: ``condition`` does not hold; names the field, its value and the fix.
    """
    if not condition:
        raise UserError(f"{name}={value} is not possible", hint)
