"""Submissions: arrays of tasks that were handed to a scheduler together, each with a folder for its scripts and logs."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hpc_c2g.errors import UserError
from hpc_c2g.files import cannot_write, write_atomically
from hpc_c2g.studies.tasks import Task, spec_name

FOLDER = "submissions"
MANIFEST = "submission.json"


@dataclass(frozen=True)
class Element:
    """One task of a submission.

    Attributes:
        id: of the task.
        spec: its description, below the study's folder.
        failures: how often it may have failed, all attempts counted, before it is given up.
    """

    id: str
    spec: str
    failures: int


@dataclass(frozen=True)
class Submission:
    """An array.

    Attributes:
        token: its own name, unique for ever: also the scheduler knows it by it, so that a launcher that was killed before it learned
            the job's number finds the job again.
        name: of the job: study, stage and token.
        stage: of all its tasks.
        elements: in the order of the array.
    """

    token: str
    name: str
    stage: str
    elements: tuple[Element, ...]

    @classmethod
    def of(
        cls, study_name: str, tasks: Sequence[Task], failures: Sequence[int], token: str | None = None
    ) -> Submission:
        """A new one; ``failures`` per task as in ``Element``."""
        token, stage = token or uuid.uuid4().hex[:12], tasks[0].stage
        elements = [Element(t.id, spec_name(t), allowed) for t, allowed in zip(tasks, failures, strict=True)]
        return cls(token, f"c2g-{study_name}-{stage}-{token}", stage, tuple(elements))

    def folder(self, study: Path) -> Path:
        """Of its scripts and logs."""
        return study / FOLDER / self.token

    def write(self, study: Path) -> None:
        """Make the folder, for the owner's eyes alone, and describe the submission there.

        Raises:
            UserError: it cannot be written.
        """
        folder = self.folder(study)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.chmod(folder, 0o700)
        except OSError as error:
            raise cannot_write(folder, error) from error
        write_atomically(folder / MANIFEST, json.dumps(asdict(self), indent=1).encode())


def read_submission(study: Path, token: str) -> Submission:
    """A submission from its folder.

    Raises:
        UserError: it is not there, or damaged.
    """
    file = study / FOLDER / token / MANIFEST
    try:
        values = json.loads(file.read_text())
        elements = tuple(Element(**e) for e in values["elements"])
        return Submission(values["token"], values["name"], values["stage"], elements)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} describes no submission: {error}", "run the `c2g sweep` of the study again") from error
