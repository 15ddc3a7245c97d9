"""Identity of a task: a hash of what its result depends on, never of the time or of the study's place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

LENGTH = 12


def task_id(
    stage: str, config: Mapping[str, Any], upstream: Sequence[str], shape: tuple[int, int] = (1, 1), version: int = 1
) -> str:
    """Return the task's id: twelve hexadecimal digits of a SHA-256.

    Args:
        stage: Name of the stage.
        config: Resolved settings without the study's own paths.
        upstream: Ids of the tasks whose results it takes, in order.
        shape: Nodes, and processes on each. They change the speed alone, which scaling studies compare.
        version: The stage's ``RESULTS_VERSION``.
    """
    content = json.dumps([stage, config, list(upstream), list(shape), version], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:LENGTH]
