"""Laws of a study's state: it is read from files alone, a torn line or report counts for nothing, and every state has a name."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from hpc_c2g.errors import UserError
from hpc_c2g.lease import Lease
from hpc_c2g.reporting.results import groups
from hpc_c2g.scheduling.profile import SlurmProfile
from hpc_c2g.scheduling.queue import Entry
from hpc_c2g.studies import journal as journal_module
from hpc_c2g.studies.config import StudyConfig
from hpc_c2g.studies.epilog import REQUEUED, cancel_mark, finalize_attempt
from hpc_c2g.studies.journal import FILE, Journal, open_journal, read_journal
from hpc_c2g.studies.launcher import Launcher, launching
from hpc_c2g.studies.reports import KEPT, Report, read_report, report_file, write_report
from hpc_c2g.studies.results_version import RESULTS_VERSION
from hpc_c2g.studies.select_tasks import select_tasks
from hpc_c2g.studies.slurm_executor import SlurmExecutor
from hpc_c2g.studies.study import StudyFile, check_results_versions, join_study, read_study, save_study
from hpc_c2g.studies.submissions import Submission, read_submission
from hpc_c2g.studies.task_status import TaskStatus, read_statuses
from hpc_c2g.studies.tasks import Task, find_specs, read_spec, spec_file, write_spec
from launch.retry import RetryConfig, retry

FIT = Task("fit1", "classifier", "classifiers/fit1", {"seed": 0}, points=({"seed": "0"},))
TRAIN = Task("run1", "train", "runs/run1", {"seed": 0}, ("fit1",), ("classifiers/fit1",), ({"seed": "0", "b": "1"},))
EVALUATE = Task("eval1", "evaluate", "runs/run1", {}, ("run1",), ("runs/run1",))
TASKS = {t.id: t for t in (FIT, TRAIN, EVALUATE)}


def new_study(folder: Path) -> Path:
    save_study(folder, join_study(folder, StudyFile(StudyConfig(name="x")), False), TASKS)
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return new_study(tmp_path)


def entry(job: str, state: str, restarts: int = 0) -> Entry:
    return Entry(job, state, "Priority", "", None, restarts, "x")


def reported(study: Path, task: Task, state: str, failures: int = 0, job: str = "7", cause: str = "") -> Report:
    report = Report(task.id)
    report.next_attempt(job, "n1", 0)
    if state != "running":
        report.end(state, cause)
    report.failures = failures
    write_report(study, task, report)
    return report


def launcher_of(study: Path) -> Launcher:
    return Launcher(study, 2)


def status_of(study: Path, task: Task, queue=None) -> TaskStatus:
    return next(s for s in read_statuses(study, queue) if s.task.id == task.id)


def handed_out(study: Path, task: Task, job: str = "7", submitted: bool = True) -> None:
    journal = open_journal(study)
    if submitted:
        submission = Submission.of("x", [task], [2])
        journal.begin(submission)
        journal.submit(submission.token, job)
    else:
        journal.start(task.id, job)


class FakeQueue:
    """A scheduler that knows jobs by their name."""

    def __init__(self, jobs: dict[str, str]) -> None:
        self.jobs = jobs

    def find(self, name: str) -> list[str]:
        return [self.jobs[name]] if name in self.jobs else []


SUBMITTED = [(TRAIN,), (TRAIN, dataclasses.replace(TRAIN, id="run2", folder="runs/run2"))]


def test_a_submission_whose_launcher_was_killed_is_found_by_its_name_or_withdrawn(subtests, monkeypatch, tmp_path):
    for i, tasks in enumerate(SUBMITTED):
        with subtests.test(f"{len(tasks)} tasks"):
            study = new_study(tmp_path / str(i))
            monkeypatch.setattr("hpc_c2g.studies.slurm_executor.RECOVERY_SECONDS", 0.0)
            journal = open_journal(study)
            found, never = Submission.of("x", tasks, [2] * len(tasks)), Submission.of("x", [FIT], [2])
            for submission in (found, never):
                submission.write(study)
                journal.begin(submission)
            launcher = launcher_of(study)
            assert launcher.journal.pending == {found.token: found.name, never.token: never.name}
            executor = SlurmExecutor(launcher, SlurmProfile(), "x")
            executor.queue = FakeQueue({found.name: "17"})
            executor.recover()
            after = read_journal(study)
            assert after.pending == {}
            ids = [task.id for task in tasks]
            jobs = ["17"] if len(tasks) == 1 else ["17_0", "17_1"]
            assert after.jobs == dict(zip(ids, jobs, strict=True))
            assert set(after.submitted) == set(ids)
            assert len(list(found.folder(study).glob("17*_submitted.pkl"))) == len(tasks)


def test_a_lost_journal_is_begun_again_with_the_submissions_whose_jobs_are_in_the_queue(study, monkeypatch):
    monkeypatch.setattr("hpc_c2g.studies.slurm_executor.RECOVERY_SECONDS", 0.0)
    queued, ended = Submission.of("x", [TRAIN], [2]), Submission.of("x", [FIT], [2])
    for submission in (queued, ended):
        submission.write(study)
        open_journal(study).begin(submission)
        open_journal(study).submit(submission.token, "17" if submission is queued else "16")
    (study / FILE).unlink()
    launcher = launcher_of(study)
    executor = SlurmExecutor(launcher, SlurmProfile(), "x")
    executor.queue = FakeQueue({queued.name: "17"})
    executor.recover()
    assert read_journal(study).jobs == {TRAIN.id: "17"}
    assert set(read_journal(study).submitted) == {TRAIN.id}
    assert ended.token not in read_journal(study).pending


def test_a_found_job_whose_folder_was_deleted_is_recorded_all_the_same(study):
    journal = open_journal(study)
    submission = Submission.of("x", [FIT], [2])
    journal.begin(submission)
    executor = SlurmExecutor(launcher_of(study), SlurmProfile(), "x")
    executor.queue = FakeQueue({submission.name: "17"})
    executor.recover()
    assert read_journal(study).jobs == {FIT.id: "17"}


def test_a_task_and_its_description_are_the_same(study):
    assert read_spec(spec_file(study, TRAIN)) == TRAIN
    assert {t.id: t for t in find_specs(study)} == TASKS
    spec_file(study, FIT).write_text('{"id": ')
    assert [t.id for t in find_specs(study)] == ["run1", "eval1"]
    with pytest.raises(UserError, match="does not describe a task"):
        read_spec(spec_file(study, FIT))


def test_a_damaged_report_or_one_of_other_settings_counts_for_nothing(subtests, study):
    for content in ["", "{", "[]", '{"state": "done"}', '{"id": "other", "state": "done"}', "null"]:
        with subtests.test(repr(content)):
            report_file(study, TRAIN).write_text(content)
            assert read_report(study, TRAIN) is None


def test_a_report_of_a_later_version_is_read_for_what_is_known(study):
    report_file(study, TRAIN).write_text(json.dumps({"id": "run1", "state": "done", "color": "red"}))
    assert read_report(study, TRAIN).state == "done"


def test_an_attempt_that_was_cut_off_is_remembered_and_only_some_are_kept():
    report = Report("x")
    for i in range(KEPT + 5):
        report.next_attempt(f"job{i}", "n1", i)
    assert len(report.history) == KEPT
    assert report.history[-1] == {
        **report.history[-1],
        "attempt": KEPT + 4,
        "job": f"job{KEPT + 3}",
        "outcome": "cut off",
    }
    assert report.attempts == KEPT + 5
    assert report.failures == 0


def test_readers_write_nothing(study):
    handed_out(study, FIT)
    before = {p: p.stat().st_mtime_ns for p in study.rglob("*")}
    read_statuses(study, {})
    assert {p: p.stat().st_mtime_ns for p in study.rglob("*")} == before


def test_a_folder_without_a_definition_is_no_study(tmp_path):
    with pytest.raises(UserError, match=r"is no study: study\.yaml cannot be read"):
        read_statuses(tmp_path, None)


def test_a_journal_read_back_is_the_journal_that_was_written(study):
    journal = open_journal(study)
    one, two = Submission.of("x", [FIT], [2]), Submission.of("x", [FIT, TRAIN], [2, 2])
    journal.begin(one)
    journal.submit(one.token, "7")
    journal.begin(two)
    assert journal.jobs == {}  # the newer submission has no job yet
    journal.submit(one.token, "7")  # what is known late of an older submission changes nothing
    assert journal.jobs == {}
    journal.submit(two.token, "8")
    assert journal.jobs == {FIT.id: "8_0", TRAIN.id: "8_1"}
    journal.start(EVALUATE.id, "local-1")
    journal.set_max_failures({FIT.id: 5})
    journal.withdraw(two.token)
    assert journal.jobs == {EVALUATE.id: "local-1"}
    assert journal.submitted == {}
    assert (journal.limit_of(FIT.id, 2), journal.limit_of(FIT.id, 7), journal.limit_of(TRAIN.id, 2)) == (5, 7, 2)
    assert read_journal(study) == journal


def test_a_journal_s_torn_last_line_never_happened_and_is_removed_by_the_next_launcher(subtests, tmp_path):
    for i, end in enumerate([1, 5, -1]):
        with subtests.test(f"{end=}"):
            study = new_study(tmp_path / str(i))
            handed_out(study, FIT)
            file = study / FILE
            whole = file.read_bytes()
            torn = json.dumps({"event": "started", "task": TRAIN.id, "job": "9"}).encode()
            file.write_bytes(whole + torn[:end])
            assert read_journal(study).jobs == {FIT.id: "7"}
            assert file.read_bytes() != whole  # readers write nothing
            journal = open_journal(study)
            assert file.read_bytes() == whole
            journal.start(TRAIN.id, "10")
            assert read_journal(study).jobs == {FIT.id: "7", TRAIN.id: "10"}


DAMAGED_LINES = ["{", "[]", "{}", '{"event": "moved"}', '{"event": "submitted", "token": "t", "job": "1"}']


def test_a_damaged_line_within_the_journal_is_named_with_its_fix(subtests, tmp_path):
    for i, line in enumerate(DAMAGED_LINES):
        with subtests.test(line):
            study = new_study(tmp_path / str(i))
            handed_out(study, FIT)
            file = study / FILE
            file.write_text(f"{line}\n{file.read_text()}")
            with pytest.raises(UserError, match=r"line 1 of .*is damaged") as caught:
                read_statuses(study, None)
            assert "restore the file" in caught.value.hint


def test_a_journal_that_cannot_be_written_is_one_error(study):
    (study / FILE).unlink()
    (study / FILE).mkdir()
    with pytest.raises(UserError, match="cannot"):
        open_journal(study)
    with pytest.raises(UserError, match="cannot write"):
        Journal(study).start(FIT.id, "1")


@pytest.mark.parametrize("written", [0, 10, 60])
def test_a_line_that_a_full_disk_cut_is_removed_before_the_next_one(study, monkeypatch, written):
    handed_out(study, FIT)
    journal, whole = open_journal(study), (study / FILE).read_bytes()

    def fill(out, content):
        out.write(content[:written])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(journal_module, "_write_all", fill)
        with pytest.raises(UserError, match=r"cannot write .*No space left"):
            journal.start(TRAIN.id, "9")
    assert TRAIN.id not in journal.jobs
    assert (study / FILE).read_bytes() == whole
    journal.start(TRAIN.id, "10")
    assert read_journal(study).jobs == {FIT.id: "7", TRAIN.id: "10"}


def test_without_a_journal_the_reports_decide(study):
    handed_out(study, FIT)
    reported(study, FIT, "done")
    reported(study, TRAIN, "failed", failures=1, cause="why")
    (study / FILE).unlink()
    statuses = read_statuses(study, {})
    assert [s.task for s in statuses] == [FIT.info, TRAIN.info, EVALUATE.info]
    assert [s.state for s in statuses] == ["done", "failed", "new"]
    failed = statuses[1]
    assert (failed.attempts, failed.failures, failed.reason, failed.job) == (1, 1, "why", "7")
    assert failed.task.upstream == ("fit1",)


def test_a_study_from_before_results_had_versions_can_be_read_but_not_resumed(study):
    (study / "ledger.sqlite").write_bytes(b"SQLite format 3")
    (study / FILE).unlink()
    file = study / "study.yaml"
    values = OmegaConf.load(file)
    del values["results_versions"]
    OmegaConf.save({**values, "code": {"train": "0123456789ab"}}, file)
    old = json.loads(spec_file(study, TRAIN).read_text())
    del old["results_version"], old["overrides"]
    spec_file(study, TRAIN).write_text(json.dumps({**old, "code": "0123456789ab"}))
    reported(study, TRAIN, "done")
    assert [s.state for s in read_statuses(study, {})] == ["new", "done", "new"]
    with pytest.raises(UserError, match="results of classifier of no version"):
        join_study(study, StudyFile(StudyConfig(name="x")), False)


def test_tasks_are_in_the_order_of_stages_and_of_the_grid(tmp_path):
    ids = {"train": ["b", "a", "c"], "classifier": ["z", "y", "x"]}
    tasks = {
        f"{stage}-{name}": Task(f"{stage}-{name}", stage, f"{folder}/{name}", {})
        for stage, folder in (("train", "runs"), ("classifier", "classifiers"))
        for name in ids[stage]
    }
    first, *rest = tasks.values()
    save_study(tmp_path, StudyFile(StudyConfig(name="x")), {first.id: first})
    ordered = [f"{s}-{n}" for s in ("classifier", "train") for n in ids[s]]
    for _ in range(2):  # a study that grows keeps its order, and saving it again adds nothing
        save_study(tmp_path, StudyFile(StudyConfig(name="x")), {first.id: first, **{t.id: t for t in rest}})
        assert [s.task.id for s in read_statuses(tmp_path, {})] == ordered
        assert (tmp_path / FILE).read_text().count("\n") == len(tasks)


def test_a_task_s_label_is_the_one_that_was_planned_last(study):
    renamed = dataclasses.replace(FIT, points=({"seed": "0", "c": "1"},))
    save_study(study, read_study(study), TASKS | {FIT.id: renamed})
    assert [s.task for s in read_statuses(study, {})] == [renamed.info, TRAIN.info, EVALUATE.info]


def test_failures_allowed_only_grow(study):
    first = join_study(study, StudyFile(StudyConfig(name="x"), retries=2), True)
    assert first.retries == 2
    save_study(study, dataclasses.replace(first, retries=5), TASKS)
    assert join_study(study, StudyFile(StudyConfig(name="x"), retries=0), True).retries == 5
    assert {s.max_failures for s in read_statuses(study, {})} == {5}


def test_one_launcher_at_a_time(study):
    with launching(study, 0.0), pytest.raises(UserError, match="in use"), launching(study, 0.0):
        pass


STATES_OF = [
    # report, entry in the queue (None: not there), queue asked, job known -> state
    (None, None, True, False, "new"),
    (None, "PENDING", True, True, "pending"),
    ("interrupted", "PENDING", True, True, "requeued"),
    ("running", "PENDING", True, True, "requeued"),
    (None, "RUNNING", True, True, "running"),
    ("running", "RUNNING", True, True, "running"),
    ("running", "COMPLETING", True, True, "running"),
    ("done", "RUNNING", True, True, "done"),
    ("done", None, True, True, "done"),
    ("failed", None, True, True, "failed"),
    ("blocked", None, True, True, "blocked"),
    ("interrupted", None, True, True, "interrupted"),
    ("running", None, True, True, "lost"),
    (None, None, True, True, "lost"),
    (None, None, False, True, "pending"),  # the queue knows, but does not answer
]


def test_every_state_of_a_task_has_a_name(subtests, tmp_path):
    for i, (reported_state, queued, asked, known, wanted) in enumerate(STATES_OF):
        with subtests.test(f"{reported_state=} {queued=} {asked=} {known=} {wanted=}"):
            study = new_study(tmp_path / str(i))
            if known:
                handed_out(study, FIT)
            if reported_state:
                reported(study, FIT, reported_state)
            queue = {"7": entry("7", queued)} if queued else {}
            assert status_of(study, FIT, queue if asked else None).state == wanted


def test_a_run_whose_holder_lives_is_running_though_no_queue_knows_it(study):
    handed_out(study, FIT, "local-1", submitted=False)
    reported(study, FIT, "running", job="local-1")
    with Lease(study / FIT.folder, job="local-1"):
        assert status_of(study, FIT).state == "running"
    assert status_of(study, FIT).state == "lost"


def test_what_depends_on_a_task_that_was_given_up_is_blocked(study):
    handed_out(study, FIT)
    reported(study, FIT, "failed", failures=3, cause="no data")
    statuses = {s.task.id: s for s in read_statuses(study, {})}
    assert statuses["fit1"].given_up
    assert [statuses[i].state for i in TASKS] == ["failed", "blocked", "blocked"]
    launcher = launcher_of(study)
    assert launcher.runnable(list(statuses.values())) == []
    launcher.reset_failures(list(statuses.values()))
    assert [s.task.id for s in launcher.runnable(launcher.statuses({}))] == ["fit1", "run1", "eval1"]


def test_a_task_that_failed_less_often_than_allowed_is_wanted_again(study):
    handed_out(study, FIT)
    reported(study, FIT, "failed", failures=2)
    launcher = launcher_of(study)
    assert [s.task.id for s in launcher.runnable(launcher.statuses({}))] == ["fit1", "run1", "eval1"]
    assert [s.task.id for s in launcher.runnable(launcher.statuses({}), "failed")] == ["fit1", "run1", "eval1"]


def test_only_failed_leaves_alone_what_did_not_fail(study):
    launcher = launcher_of(study)
    assert launcher.runnable(launcher.statuses({}), "failed") == []
    assert len(launcher.runnable(launcher.statuses({}))) == 3


def test_what_is_at_work_is_not_handed_out_again(study):
    handed_out(study, FIT)
    launcher = launcher_of(study)
    for state in ("PENDING", "RUNNING", "COMPLETING"):
        statuses = launcher.statuses({"7": entry("7", state)})
        assert [s.task.id for s in launcher.runnable(statuses)] == ["run1", "eval1"]


def test_a_cancelled_task_is_so_until_it_is_handed_out_again(study):
    handed_out(study, FIT)
    reported(study, FIT, "interrupted")
    cancel_mark(study, FIT).touch()
    assert status_of(study, FIT, {}).state == "cancelled"
    launcher = launcher_of(study)
    launcher.clear_cancel_marks(launcher.runnable(launcher.statuses({})))
    assert status_of(study, FIT, {}).state == "interrupted"


def test_a_task_that_was_cancelled_before_it_was_handed_out_is_cancelled(study):
    cancel_mark(study, FIT).touch()
    assert status_of(study, FIT, {}).state == "cancelled"


FINALIZED = [
    # report's state, its job, exit code, max_failures -> state, failures, tried again
    ("done", "7", 0, 2, "done", 0, False),
    ("interrupted", "7", 75, 2, "interrupted", 0, True),
    ("interrupted", "7", REQUEUED, 2, "interrupted", 0, False),  # submitit was faster
    ("failed", "7", 1, 2, "failed", 1, True),
    ("failed", "7", 1, 0, "failed", 1, False),
    ("blocked", "7", 3, 2, "blocked", 0, False),
    ("running", "7", 137, 2, "failed", 1, True),  # out of memory
    ("running", "7", -9, 2, "failed", 1, True),
    ("running", "7", 75, 2, "interrupted", 0, True),
    ("running", "7", 143, 2, "interrupted", 0, True),
    ("running", "7", 140, 2, "interrupted", 0, True),
    ("running", "7", REQUEUED, 2, "interrupted", 0, False),
    ("running", "8", 1, 2, "running", 0, False),  # another job's
    ("failed", "8", 1, 2, "failed", 2, True),  # this one ended before it could report its start
    ("interrupted", "8", 1, 2, "failed", 1, True),
    (None, None, 1, 2, "failed", 1, True),
    (None, None, 140, 2, "interrupted", 0, True),
]


def test_an_attempt_that_was_killed_is_reported_by_the_epilog(subtests, tmp_path):
    for i, (reported_state, job, code, max_failures, state, failures, again) in enumerate(FINALIZED):
        with subtests.test(f"{reported_state=} {job=} {code=} {max_failures=}"):
            study = new_study(tmp_path / str(i))
            if reported_state:
                reported(study, FIT, reported_state, failures=1 if reported_state == "failed" else 0, job=job)
            assert finalize_attempt(study, FIT, "7", 0, code, max_failures) is again
            report = read_report(study, FIT)
            assert (report.state, report.failures) == (state, failures)


def test_a_job_that_never_gets_to_its_attempt_is_given_up_at_last(study):
    """A node without the package, say: each restart ends before the report is written."""
    assert [finalize_attempt(study, FIT, "7", restart, 1, 2) for restart in range(3)] == [True, True, False]


def test_the_cause_is_the_last_line_that_was_printed(study, tmp_path):
    log = tmp_path / "log"
    log.write_text("Traceback\nModuleNotFoundError: No module named 'torch'\nsrun: error: n1: task 0: Exited\n\n")
    with open(log, "a") as file:
        file.write("2026-11-28 10:00:00,123 INFO [rank 0 n1 step 20] hpc_c2g.training.loop: checkpoint written\n")
    finalize_attempt(study, FIT, "7", 0, 1, 2, log)
    assert read_report(study, FIT).cause == "ended with code 1: ModuleNotFoundError: No module named 'torch'"


def test_a_retry_of_one_run_leaves_the_others_given_up(tmp_path, monkeypatch):
    other = dataclasses.replace(TRAIN, id="run2", folder="runs/run2")
    save_study(tmp_path, join_study(tmp_path, StudyFile(StudyConfig(name="x")), False), {**TASKS, other.id: other})
    reported(tmp_path, FIT, "done")
    for task in (TRAIN, other):
        reported(tmp_path, task, "failed", failures=3)
    handed = []

    def run_local(launcher, slots, only, log_fn):
        handed.extend(s.task.id for s in launcher.runnable(launcher.statuses(None), only))

    monkeypatch.setattr("launch.sweep.run_local", run_local)
    monkeypatch.setattr("launch.sweep._finish", lambda *_: None)
    retry(RetryConfig(str(tmp_path), [other.id]))
    assert handed == [other.id]
    retry(RetryConfig(str(tmp_path)))
    assert set(handed[1:]) >= {TRAIN.id, other.id}


def test_another_study_and_another_grid_are_refused(study):
    with pytest.raises(UserError, match="holds another study: name is x there, y now"):
        join_study(study, StudyFile(StudyConfig(name="y")), False)
    new = StudyFile(StudyConfig(name="x"), [["a=1"]])
    (study / "study.yaml").unlink()
    save_study(study, join_study(study, new, False), TASKS)
    assert join_study(study, new, False) == read_study(study)
    with pytest.raises(UserError, match="has the grid a=1, not a=2"):
        join_study(study, StudyFile(new.study, [["a=2"]]), False)
    assert join_study(study, StudyFile(new.study, [["a=2"]]), True).grids == [["a=1"], ["a=2"]]


def test_results_of_another_version_are_refused_by_stage_with_both_versions(study, monkeypatch):
    (study / "study.yaml").unlink()
    new = join_study(study, StudyFile(StudyConfig(name="x"), [["a=1"]]), False)
    assert new.results_versions == {stage: RESULTS_VERSION[stage] for stage in new.study.stages}
    save_study(study, new, TASKS)
    monkeypatch.setitem(RESULTS_VERSION, "train", RESULTS_VERSION["train"] + 3)
    now = RESULTS_VERSION["train"]
    for refused in (lambda: join_study(study, new, True), lambda: check_results_versions(study, read_study(study))):
        with pytest.raises(
            UserError, match=f"results of train of version {now - 3}, this code makes version {now}"
        ) as caught:
            refused()
        assert "another study_dir" in caught.value.hint
    monkeypatch.setitem(RESULTS_VERSION, "train", now - 3)
    monkeypatch.setitem(RESULTS_VERSION, "bound", 99)  # the study has no such stage
    assert join_study(study, new, False) == new


def test_submissions_are_for_the_owner_alone_and_read_back(study):
    submission = Submission.of("x", [FIT, dataclasses.replace(FIT, id="fit2")], [2, 3])
    submission.write(study)
    folder = submission.folder(study)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert read_submission(study, submission.token) == submission
    with pytest.raises(UserError, match="does not describe a submission"):
        read_submission(study, "nowhere")


def test_runs_are_named_by_the_beginning_of_their_id_or_their_folder(study):
    statuses = read_statuses(study, {})
    assert [s.task.id for s in select_tasks(statuses, ["run1"])] == ["run1", "eval1"]
    assert [s.task.id for s in select_tasks(statuses, [f"{study}/runs/run1"])] == ["run1", "eval1"]
    assert [s.task.id for s in select_tasks(statuses, ["eval"])] == ["eval1"]
    assert len(select_tasks(statuses, [])) == 3
    with pytest.raises(UserError, match="is no run of the study"):
        select_tasks(statuses, ["zzz"])


def test_runs_that_differ_by_their_seed_alone_are_averaged():
    rows = [
        {"id": "a", "b": 1, "seed": 0, "coverage": 0.2},
        {"id": "b", "b": 1, "seed": 1, "coverage": 0.4},
        {"id": "c", "b": 2, "seed": 0, "coverage": 0.5},
    ]
    one, two = groups(rows)
    assert (one["b"], one["runs"], one["coverage"]) == (1, 2, pytest.approx(0.3))
    assert one["coverage_sd"] == pytest.approx(0.1414, abs=1e-4)
    assert (two["coverage"], two["coverage_sd"]) == (0.5, None)


def test_writing_the_same_description_again_touches_nothing(study):
    file = spec_file(study, FIT)
    before = file.stat().st_mtime_ns
    write_spec(study, FIT)
    assert file.stat().st_mtime_ns == before
