"""Place where a study runs: ``cluster=`` and ``profile.FIELD=`` of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hpc_c2g.errors import UserError
from hpc_c2g.scheduling.profile import SlurmProfile, load_profile

LOCAL, DEBUG = "local", "debug"


@dataclass
class Where:
    """Place where a study runs.

    Attributes:
        name: ``local``, ``debug``, a name in slurm/profiles, or a profile's file; ``cluster=NAME`` on the command line.
        profile: Overrides of the profile's fields; ``profile.FIELD=VALUE`` on the command line.
    """

    name: str = LOCAL
    profile: dict[str, Any] = field(default_factory=dict)


def profile_of(where: Where, **over: object) -> SlurmProfile | None:
    """Return the profile with its overrides and ``over``; None on this machine.

    Raises:
        UserError: The profile or a field does not exist, a value is not possible, or this machine has no profile to override.
    """
    if where.name in (LOCAL, DEBUG):
        if where.profile:
            raise UserError(
                f"profile.{next(iter(where.profile))} is set, but cluster={where.name} has no profile", "drop it"
            )
        return None
    return load_profile(where.name, {**where.profile, **over})
