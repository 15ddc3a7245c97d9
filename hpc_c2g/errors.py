"""The one exception that users see without a traceback."""

from __future__ import annotations


class C2GError(ValueError):
    """A mistake in the input: says what is wrong, where, and how to mend it.

    Args:
        what: the fault, naming the field or file and its value.
        mend: what the user can do about it.
    """

    def __init__(self, what: str, mend: str = "") -> None:
        self.what = what
        self.mend = mend
        super().__init__(f"{what} -- {mend}" if mend else what)


def require(condition: bool, name: str, value: object, mend: str) -> None:
    """Check of a setting.

    Raises:
        C2GError: ``condition`` does not hold; names the field, its value and the fix.
    """
    if not condition:
        raise C2GError(f"{name}={value} is not possible", mend)
