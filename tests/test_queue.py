"""Laws of Slurm's queue: no answer is never an empty queue, and only ids and names get into its commands."""

from __future__ import annotations

import os
import time
from datetime import datetime

import pytest

from hpc_c2g.errors import UserError
from hpc_c2g.scheduling.programs import Answer
from hpc_c2g.scheduling.queue import Entry, NoAnswerError, Queue
from hpc_c2g.scheduling.sbatch import check_script

AWAY = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
NO_IDS = ["", "1 2", "1;2", "-1", "1_", "_1", "1_2_3", "1_[2-3]", "1.0", "1\n", "--user=x", "$(x)", "٣"]


class Slurm:
    """Fake programs in a folder at the front of PATH, which write down how they were called."""

    def __init__(self, folder):
        self.folder = folder

    def has(self, program: str, body: str) -> None:
        file = self.folder / program
        calls = self.folder / f"{program}.calls"
        file.write_text(f'#!/bin/bash\n{{ printf "%s\\0" "$@"; echo; }} >> {calls}\nN=$(wc -l < {calls})\n{body}\n')
        file.chmod(0o755)

    def answers(self, program: str, text: str) -> None:
        (self.folder / f"{program}.text").write_text(text)
        self.has(program, f"cat {self.folder}/{program}.text")

    def fails(self, program: str, text: str, code: int = 1) -> None:
        self.has(program, f"echo '{text}' >&2; exit {code}")

    def calls(self, program: str) -> list[list[str]]:
        file = self.folder / f"{program}.calls"
        return [line.split("\0")[:-1] for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Slurm:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return Slurm(tmp_path)


def test_the_queue_of_hand(slurm):
    slurm.answers(
        "squeue",
        "7|2|PENDING|JobArrayTaskLimit||2026-11-25T10:00:00|0|study|\n"
        "7|1|RUNNING|None|gpu[01-02]|2026-11-25T09:00:00|3|study|\n"
        "9|N/A|COMPLETING|NonZeroExitCode|n1|N/A|0|a|name|with\nbars and lines|\n",
    )
    begin = datetime(2026, 11, 25, 9).timestamp()
    assert Queue().query() == {
        "7_2": Entry("7_2", "PENDING", "JobArrayTaskLimit", "", begin + 3600, 0, "study"),
        "7_1": Entry("7_1", "RUNNING", "None", "gpu[01-02]", begin, 3, "study"),
        "9": Entry("9", "COMPLETING", "NonZeroExitCode", "n1", None, 0, "a|name|with\nbars and lines"),
    }
    (call,) = slurm.calls("squeue")
    assert {"--me", "-h", "-r"} < set(call)


def test_an_answer_that_cannot_be_read_is_no_empty_queue(subtests, slurm):
    for text in ["JOBID STATE\n", "7|2|PENDING\n", "7                   2                   \n"]:
        with subtests.test(repr(text)):
            slurm.answers("squeue", text)
            with pytest.raises(UserError, match="cannot be read"):
                Queue().query()


def test_an_empty_queue_is_no_error_and_no_answer_is_one(slurm):
    slurm.answers("squeue", "")
    assert Queue().query() == {}
    slurm.fails("squeue", AWAY)
    with pytest.raises(NoAnswerError, match=r"Slurm does not answer: .*Unable to contact"):
        Queue().query()


def test_a_command_that_hangs_is_no_answer(slurm):
    slurm.has("squeue", "exec sleep 30")
    begin = time.monotonic()
    with pytest.raises(NoAnswerError, match=r"squeue took more than 0\.2 s"):
        Queue(timeout=0.2).query()
    assert time.monotonic() - begin < 10


def test_a_machine_without_slurm_says_so(slurm, monkeypatch):
    monkeypatch.setenv("PATH", str(slurm.folder))
    with pytest.raises(UserError, match="squeue: No such file") as caught:
        Queue().query()
    assert not isinstance(caught.value, NoAnswerError)


def test_the_habits_of_the_user_do_not_change_the_answer(slurm, monkeypatch):
    for name in ("SQUEUE_STATES", "SQUEUE_FORMAT2", "SLURM_TIME_FORMAT", "SACCT_FORMAT"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("SLURM_CONF", "/a")
    slurm.has("squeue", f"env > {slurm.folder}/seen")
    Queue().query()
    seen = (slurm.folder / "seen").read_text()
    assert "SLURM_CONF=/a" in seen
    assert not any(name in seen for name in ("SQUEUE_", "TIME_FORMAT", "SACCT_"))


def test_a_name_is_found_in_the_queue_and_in_accounting(slurm):
    slurm.answers("squeue", "12|study\n12|study\n9|study\n13|Study\n")
    slurm.answers("sacct", "3_0|study\n3_[1-4%2]|study\n12_0|study\n4|STUDY\n5|study|x\n")
    assert Queue().find("study") == ["3", "9", "12"]
    assert "--name=study" in slurm.calls("squeue")[0]
    assert f"--user={os.getuid()}" in slurm.calls("sacct")[0]


def test_a_name_is_found_without_accounting_but_not_without_slurm(slurm):
    slurm.answers("squeue", "12|study\n")
    slurm.fails("sacct", "Slurm accounting storage is disabled")
    assert Queue().find("study") == ["12"]
    slurm.fails("squeue", AWAY)
    with pytest.raises(NoAnswerError):
        Queue().find("study")


def test_only_a_job_name_is_looked_for(subtests, slurm):
    for name in ["", "a,b", "a b", "-x", "a\n", "ä"]:
        with subtests.test(repr(name)), pytest.raises(UserError, match="job name"):
            Queue().find(name)


def test_cancelling_takes_ids_in_parts(slurm):
    slurm.answers("scancel", "")
    ids = [f"7_{i}" for i in range(501)]
    Queue().cancel(ids)
    first, second = slurm.calls("scancel")
    assert first[-500:] + second[-1:] == ids
    Queue().cancel([])
    assert len(slurm.calls("scancel")) == 2


def test_nothing_but_ids_gets_into_a_command(subtests, slurm):
    for job in NO_IDS:
        with subtests.test(repr(job)):
            for order in (Queue().cancel, Queue().outcome, lambda ids: Queue().requeue(ids[0])):
                with pytest.raises(UserError, match="no id of a Slurm job"):
                    order([job])
            assert list(slurm.folder.iterdir()) == []


def test_requeueing_waits_for_a_controller_that_restarts(slurm):
    slurm.has("scontrol", f"[ $N -ge 3 ] || {{ echo '{AWAY}' >&2; exit 1; }}")
    Queue(pause=0.01).requeue("7_3")
    assert slurm.calls("scontrol") == [["requeue", "7_3"]] * 3


def test_a_job_that_waits_already_was_requeued_by_an_earlier_try(slurm):
    slurm.has(
        "scontrol", f"[ $N -ge 2 ] || {{ echo '{AWAY}' >&2; exit 1; }}; echo Job is pending execution >&2; exit 1"
    )
    Queue(pause=0.01).requeue("7")
    assert len(slurm.calls("scontrol")) == 2


def test_requeueing_gives_up_in_the_end(slurm):
    slurm.fails("scontrol", AWAY)
    with pytest.raises(NoAnswerError, match="Unable to contact"):
        Queue(pause=0.01).requeue("7", attempts=2)
    assert len(slurm.calls("scontrol")) == 2


SLURM_REFUSALS = [
    "Invalid job id specified",
    "Access/permission denied",
    "Requested operation is presently disabled for job 7",
]


def test_a_refusal_is_not_tried_again(subtests, slurm):
    for i, text in enumerate(SLURM_REFUSALS):
        with subtests.test(text):
            slurm.fails("scontrol", text)
            with pytest.raises(UserError, match=f"Slurm refuses: {text}"):
                Queue(pause=30).requeue("7")
            assert len(slurm.calls("scontrol")) == i + 1


def test_the_outcome_of_hand(slurm):
    slurm.answers(
        "sacct",
        "7_0|COMPLETED|0:0\n7_1|FAILED|3:0\n7_2|CANCELLED by 1000|0:15\n7_[3-4,9-13:2%2]|PENDING|0:0\n"
        "8|NODE_FAIL|0:0\n80|FAILED|1:0\n81_[1-3]|PENDING|0:0\n\nnonsense\n",
    )
    found = Queue().outcome(["7", "8"])
    assert found == {
        "7_0": ("COMPLETED", 0),
        "7_1": ("FAILED", 3),
        "7_2": ("CANCELLED", 143),
        **{f"7_{i}": ("PENDING", 0) for i in (3, 4, 9, 11, 13)},
        "8": ("NODE_FAIL", 0),
    }
    assert Queue().outcome(["7_1"]) == {"7_1": ("FAILED", 3)}
    assert Queue().outcome(["81_2"]) == {"81_2": ("PENDING", 0)}
    assert Queue().outcome([]) == {}
    assert len(slurm.calls("sacct")) == 3


def test_no_accounting_is_no_outcome(slurm, monkeypatch):
    slurm.fails("sacct", "Slurm accounting storage is disabled")
    assert Queue().outcome(["7"]) == {}
    monkeypatch.setenv("PATH", "/nowhere")
    assert Queue().outcome(["7"]) == {}


def test_a_script_that_sbatch_accepts_and_one_that_it_refuses(slurm):
    slurm.has("sbatch", f"cat $2 > {slurm.folder}/script; echo 'sbatch: Job 9 to start at noon' >&2")
    assert check_script("#!/bin/bash\n") == Answer(0, "Job 9 to start at noon", "")
    assert (slurm.folder / "script").read_text() == "#!/bin/bash\n"
    (call,) = slurm.calls("sbatch")
    assert call[0] == "--test-only"
    words = (
        "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: Invalid partition"
    )
    slurm.fails("sbatch", words)
    assert check_script("") == Answer(1, "", "invalid partition specified: x")
    slurm.fails("sbatch", "allocation failure: Requested node configuration is not available")
    assert check_script("").fault == "allocation failure: Requested node configuration is not available"


def test_a_missing_or_hanging_sbatch_is_no_answer(slurm, monkeypatch):
    slurm.has("sbatch", "exec sleep 30")
    assert check_script("", 0.2) == Answer(None, "", "sbatch --test-only took more than 0.2 s")
    monkeypatch.setenv("PATH", "/nowhere")
    assert check_script("") == Answer(None, "", "sbatch: No such file or directory")
