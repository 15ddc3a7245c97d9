"""Submissions: arrays of tasks that a scheduler receives together, each with a folder for its scripts and logs."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hpc_c2g.errors import UserError
from hpc_c2g.files import cannot_write, write_atomically
from hpc_c2g.studies.tasks import Task, TaskInfo, spec_name

FOLDER = "submissions"
MANIFEST = "submission.json"


@dataclass(frozen=True)
class Element:
    """One task of a submission, as its job needs it.

    Attributes:
        id: Id of the task.
        spec: Path of its description, relative to the study's folder.
        max_failures: Number of failures, all attempts counted, after which the job no longer requeues itself.
    """

    id: str
    spec: str
    max_failures: int


@dataclass(frozen=True)
class Submission:
    """A job array, or one job.

    Attributes:
        token: Unique name. The job's name contains it, so that a launcher that was killed before it recorded the job's id finds
            the job again.
        name: Name of the job: study, stage and token.
        stage: Stage of all its tasks.
        elements: Tasks, in the order of the array.
    """

    token: str
    name: str
    stage: str
    elements: tuple[Element, ...]

    @classmethod
    def of(
        cls, study_name: str, tasks: Sequence[Task | TaskInfo], max_failures: Sequence[int], token: str | None = None
    ) -> Submission:
        """Return a new submission; ``max_failures`` per task as in ``Element``."""
        token, stage = token or uuid.uuid4().hex[:12], tasks[0].stage
        elements = [Element(t.id, spec_name(t), limit) for t, limit in zip(tasks, max_failures, strict=True)]
        return cls(token, f"c2g-{study_name}-{stage}-{token}", stage, tuple(elements))

    def folder(self, study: Path) -> Path:
        """Return the folder of its scripts and logs."""
        return study / FOLDER / self.token

    def write(self, study: Path) -> None:
        """Create the folder, readable by the owner alone, and describe the submission there.

        Raises:
            UserError: The folder cannot be written.
        """
        folder = self.folder(study)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.chmod(folder, 0o700)
        except OSError as error:
            raise cannot_write(folder, error) from error
        write_atomically(folder / MANIFEST, json.dumps(asdict(self), indent=1).encode())


def read_submission(study: Path, token: str) -> Submission:
    """Read a submission from its folder.

    Raises:
        UserError: The file does not exist, or is damaged.
    """
    file = study / FOLDER / token / MANIFEST
    try:
        values = json.loads(file.read_text())
        elements = tuple(Element(**e) for e in values["elements"])
        return Submission(values["token"], values["name"], values["stage"], elements)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{file} does not describe a submission: {error}", "run the study's `c2g sweep` again"
        ) from error


def find_submissions(study: Path) -> list[Submission]:
    """Return all submissions that the study's folder describes, the oldest first; damaged descriptions are left out."""
    found = []
    for file in sorted((study / FOLDER).glob(f"*/{MANIFEST}"), key=lambda file: file.stat().st_mtime):
        with contextlib.suppress(UserError):
            found.append(read_submission(study, file.parent.name))
    return found
