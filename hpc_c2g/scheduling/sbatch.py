"""``sbatch --test-only``: check a script with the scheduler without submitting it."""

from __future__ import annotations

import re
import subprocess
import tempfile

from hpc_c2g.scheduling.programs import TIMEOUT_S, Answer, run

TEST_TIMEOUT_S = 3 * TIMEOUT_S
"""Seconds after which the check counts as not answered: the scheduler plans its whole queue for it."""


def check_script(text: str, seconds: float = TEST_TIMEOUT_S) -> Answer:
    """Return sbatch's answer about a script; nothing that goes wrong is raised.

    Args:
        text: The script.
        seconds: Time after which sbatch counts as not answered.

    Returns:
        An answer whose ``code`` is 0 if sbatch accepts the script; ``output`` then holds its last line, else ``fault`` its first error.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(text)
        file.flush()
        try:
            done = run(["sbatch", "--test-only", file.name], seconds)
        except subprocess.TimeoutExpired:
            return Answer(None, "", f"sbatch --test-only took more than {seconds:g} s")
        except OSError as error:
            return Answer(None, "", f"sbatch: {error.strerror}")
    if done.returncode == 0:
        return Answer(0, last_line(done.stderr + done.stdout), "")
    return Answer(done.returncode, "", first_error(done.stderr + done.stdout))


def first_error(text: str) -> str:
    """Return the first line of sbatch's output that names an error, or else its last line, without sbatch's prefix."""
    errors = [line for line in text.splitlines() if "error" in line.lower()]
    return last_line(errors[0] if errors else text)


def last_line(text: str) -> str:
    """Return the last line with content, without sbatch's prefix."""
    lines = [re.sub(r"^(sbatch: )?(error: )?", "", line.strip()).strip() for line in text.splitlines()]
    return next((line for line in reversed(lines) if line), "no output")
