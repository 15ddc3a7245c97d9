"""Laws of a study's state: the ledger can be lost, damaged words count for nothing, and every way a task may stand has its name."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from pathlib import Path

import pytest

from hpc_c2g.errors import UserError
from hpc_c2g.lease import Lease
from hpc_c2g.reporting.results import groups
from hpc_c2g.scheduling.profile import SlurmProfile
from hpc_c2g.scheduling.queue import Entry
from hpc_c2g.studies.config import StudyConfig
from hpc_c2g.studies.epilog import REQUEUED, cancel_mark, finalize_attempt
from hpc_c2g.studies.find import chosen
from hpc_c2g.studies.launcher import Launcher, launching
from hpc_c2g.studies.ledger import FILE, Ledger
from hpc_c2g.studies.reports import KEPT, Report, read_report, report_file, write_report
from hpc_c2g.studies.slurm_executor import JOB, SlurmExecutor
from hpc_c2g.studies.study import StudyFile, joined, read_study, rebuilt, save_study
from hpc_c2g.studies.submissions import Submission, read_submission
from hpc_c2g.studies.tasks import Task, find_specs, read_spec, spec_file, write_spec
from hpc_c2g.studies.view import View, look

FIT = Task("fit1", "classifier", "classifiers/fit1", {"seed": 0}, points=({"seed": "0"},))
TRAIN = Task("run1", "train", "runs/run1", {"seed": 0}, ("fit1",), ("classifiers/fit1",), ({"seed": "0", "b": "1"},))
JUDGE = Task("judge1", "evaluate", "runs/run1", {}, ("run1",), ("runs/run1",))
TASKS = {t.id: t for t in (FIT, TRAIN, JUDGE)}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    save_study(tmp_path, StudyFile(StudyConfig(name="x")), TASKS)
    return tmp_path


def entry(job: str, state: str, restarts: int = 0) -> Entry:
    return Entry(job, job, state, "Priority", "", None, restarts, "x")


def reported(study: Path, task: Task, state: str, failures: int = 0, job: str = "7", cause: str = "") -> Report:
    report = Report(task.id)
    report.next_attempt(job, "n1", 0)
    if state != "running":
        report.end(state, cause)
    report.failures = failures
    write_report(study, task, report)
    return report


def view_of(study: Path, task: Task, queue=None) -> View:
    return next(v for v in look(study, Ledger(study).rows(), queue) if v.row.id == task.id)


def given_out(study: Path, task: Task, job: str = "7", submitted: bool = True) -> None:
    ledger = Ledger(study, write=True)
    if submitted:
        submission = Submission.of("x", [task], [2])
        ledger.intend(submission, "c")
        ledger.submitted(submission, job)
    else:
        ledger.assign(task.id, job)


def test_a_submission_that_cannot_be_read_is_told_of(study, capsys):
    folder = study / "submissions" / "torn"
    folder.mkdir(parents=True)
    (folder / JOB).write_text("17\n")
    launcher = Launcher(study, rebuilt(study, 2), TASKS)
    SlurmExecutor(launcher, SlurmProfile(), "c", "x").recover()
    assert "submission torn cannot be read" in capsys.readouterr().err


def test_a_task_and_its_description_are_the_same(study):
    assert read_spec(spec_file(study, TRAIN)) == TRAIN
    assert {t.id: t for t in find_specs(study)} == TASKS
    spec_file(study, FIT).write_text('{"id": ')
    assert [t.id for t in find_specs(study)] == ["run1", "judge1"]
    with pytest.raises(UserError, match="describes no task"):
        read_spec(spec_file(study, FIT))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"state": "done"}', '{"id": "other", "state": "done"}', "null"])
def test_a_damaged_report_or_one_of_other_settings_counts_for_nothing(study, content):
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


def test_the_ledger_keeps_a_rollback_journal_and_readers_write_nothing(study):
    with sqlite3.connect(study / FILE) as connection:
        assert connection.execute("pragma journal_mode").fetchone() == ("delete",)
    before = {p: p.stat().st_mtime_ns for p in study.rglob("*")}
    look(study, Ledger(study).rows(), {})
    assert {p: p.stat().st_mtime_ns for p in study.rglob("*")} == before


def test_a_folder_without_a_ledger_is_no_study(tmp_path):
    with pytest.raises(UserError, match=r"is no study: it has no ledger\.sqlite"):
        Ledger(tmp_path)
    with pytest.raises(UserError, match=r"is no study: study\.yaml cannot be read"):
        read_study(tmp_path)


def test_a_damaged_ledger_is_told_with_its_mend(study):
    (study / FILE).write_bytes(b"not a database, certainly not" * 100)
    with pytest.raises(UserError, match="remove the file"):
        Ledger(study).rows()


def test_the_ledger_is_built_again_from_the_folders_alone(study):
    reported(study, FIT, "done")
    reported(study, TRAIN, "failed", failures=1, cause="why")
    given_out(study, JUDGE)
    (study / FILE).unlink()
    launcher = Launcher(study, rebuilt(study, 2), TASKS)
    rows = {row.id: row for row in launcher.ledger.rows()}
    assert [rows[i].state for i in TASKS] == ["done", "failed", "new"]
    assert (rows["run1"].attempts, rows["run1"].failures, rows["run1"].cause) == (1, 1, "why")
    assert rows["run1"].upstream == ("fit1",)


def test_adding_tasks_again_forgets_nothing(study):
    reported(study, FIT, "done")
    launcher = Launcher(study, rebuilt(study, 2), TASKS)
    before = launcher.ledger.rows()
    launcher.ledger.add(TASKS.values(), 2)
    assert launcher.ledger.rows() == before
    launcher.ledger.add(TASKS.values(), 5)
    assert {row.allowed for row in launcher.ledger.rows()} == {5}


def test_one_launcher_at_a_time(study):
    with launching(study, 0.0), pytest.raises(UserError, match="in use"), launching(study, 0.0):
        pass


STANDS = [
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


@pytest.mark.parametrize(("told", "queued", "asked", "known", "wanted"), STANDS)
def test_every_way_a_task_may_stand_has_its_name(study, told, queued, asked, known, wanted):
    if known:
        given_out(study, FIT)
    if told:
        reported(study, FIT, told)
    queue = {"7": entry("7", queued)} if queued else {}
    assert view_of(study, FIT, queue if asked else None).state == wanted


def test_a_run_whose_holder_lives_is_running_though_no_queue_knows_it(study):
    given_out(study, FIT, "local-1", submitted=False)
    reported(study, FIT, "running", job="local-1")
    with Lease(study / FIT.folder, job="local-1"):
        assert view_of(study, FIT).state == "running"
    assert view_of(study, FIT).state == "lost"


def test_what_builds_on_a_task_that_was_given_up_is_blocked(study):
    given_out(study, FIT)
    reported(study, FIT, "failed", failures=3, cause="no data")
    views = {v.row.id: v for v in look(study, Ledger(study).rows(), {})}
    assert views["fit1"].given_up
    assert [views[i].state for i in TASKS] == ["failed", "blocked", "blocked"]
    launcher = Launcher(study, Ledger(study, write=True), TASKS)
    assert launcher.wanted(list(views.values())) == []
    launcher.forgive(list(views.values()), 2)
    assert [v.row.id for v in launcher.wanted(launcher.look({}))] == ["fit1", "run1", "judge1"]


def test_a_task_that_failed_less_often_than_allowed_is_wanted_again(study):
    given_out(study, FIT)
    reported(study, FIT, "failed", failures=2)
    launcher = Launcher(study, Ledger(study, write=True), TASKS)
    assert [v.row.id for v in launcher.wanted(launcher.look({}))] == ["fit1", "run1", "judge1"]
    assert [v.row.id for v in launcher.wanted(launcher.look({}), "failed")] == ["fit1", "run1", "judge1"]


def test_only_failed_leaves_alone_what_did_not_fail(study):
    launcher = Launcher(study, Ledger(study, write=True), TASKS)
    assert launcher.wanted(launcher.look({}), "failed") == []
    assert len(launcher.wanted(launcher.look({}))) == 3


def test_what_is_at_work_is_not_handed_out_again(study):
    given_out(study, FIT)
    launcher = Launcher(study, Ledger(study, write=True), TASKS)
    for state in ("PENDING", "RUNNING", "COMPLETING"):
        views = launcher.look({"7": entry("7", state)})
        assert [v.row.id for v in launcher.wanted(views)] == ["run1", "judge1"]


def test_a_cancelled_task_is_so_until_it_is_handed_out_again(study):
    given_out(study, FIT)
    reported(study, FIT, "interrupted")
    cancel_mark(study, FIT).touch()
    assert view_of(study, FIT, {}).state == "cancelled"
    launcher = Launcher(study, Ledger(study, write=True), TASKS)
    launcher.clear_marks(launcher.wanted(launcher.look({})))
    assert view_of(study, FIT, {}).state == "interrupted"


SETTLED = [
    # report's state, its job, exit code, failures allowed -> state, failures, made again
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
    ("failed", "8", 1, 2, "failed", 2, True),  # this one ended before it could say that it had begun
    ("interrupted", "8", 1, 2, "failed", 1, True),
    (None, None, 1, 2, "failed", 1, True),
    (None, None, 140, 2, "interrupted", 0, True),
]


@pytest.mark.parametrize(("told", "job", "code", "allowed", "state", "failures", "again"), SETTLED)
def test_an_attempt_that_could_not_tell_how_it_ended_is_told_of(
    study, told, job, code, allowed, state, failures, again
):
    if told:
        reported(study, FIT, told, failures=1 if told == "failed" else 0, job=job)
    assert finalize_attempt(study, FIT, "7", 0, code, allowed) is again
    report = read_report(study, FIT)
    assert (report.state, report.failures) == (state, failures)


def test_a_job_that_never_gets_to_its_attempt_is_given_up_at_last(study):
    """A node without the package, say: each restart ends before the report is written."""
    assert [finalize_attempt(study, FIT, "7", restart, 1, 2) for restart in range(3)] == [True, True, False]


def test_the_cause_is_the_last_line_that_was_printed(study, tmp_path):
    log = tmp_path / "log"
    log.write_text("Traceback\nModuleNotFoundError: No module named 'torch'\nsrun: error: n1: task 0: Exited\n\n")
    finalize_attempt(study, FIT, "7", 0, 1, 2, log)
    assert read_report(study, FIT).cause == "ended with code 1: ModuleNotFoundError: No module named 'torch'"


def test_another_study_another_grid_and_other_code_are_refused(study, monkeypatch):
    old = read_study(study)
    with pytest.raises(UserError, match="holds another study: name is x there, y now"):
        joined(study, StudyFile(StudyConfig(name="y")), False, False)
    same = dataclasses.replace(old, code=joined(study, old, True, True).code)
    save_study(study, dataclasses.replace(same, grids=[["a=1"]]), TASKS)
    changed = [stage for stage in same.study.stages if read_study(study).code.get(stage) != same.code.get(stage)]
    assert changed == []
    with pytest.raises(UserError, match="has the grid a=1, not a=2"):
        joined(study, StudyFile(same.study, [["a=2"]]), False, True)
    assert joined(study, StudyFile(same.study, [["a=2"]]), True, True).grids == [["a=1"], ["a=2"]]
    monkeypatch.setattr("hpc_c2g.studies.study.code_version", lambda stage: "new")
    with pytest.raises(UserError, match="the code of classifier, certify, train, evaluate has changed"):
        joined(study, StudyFile(same.study, [["a=1"]]), False, False)


def test_submissions_are_for_the_owner_alone_and_read_back(study):
    submission = Submission.of("x", [FIT, dataclasses.replace(FIT, id="fit2")], [2, 3])
    submission.write(study)
    folder = submission.folder(study)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert read_submission(study, submission.token) == submission
    with pytest.raises(UserError, match="describes no submission"):
        read_submission(study, "nowhere")


def test_runs_are_named_by_the_beginning_of_their_id_or_their_folder(study):
    views = look(study, Ledger(study).rows(), {})
    assert [v.row.id for v in chosen(views, ["run1"])] == ["run1", "judge1"]
    assert [v.row.id for v in chosen(views, [f"{study}/runs/run1"])] == ["run1", "judge1"]
    assert [v.row.id for v in chosen(views, ["judge"])] == ["judge1"]
    assert len(chosen(views, [])) == 3
    with pytest.raises(UserError, match="is no run of the study"):
        chosen(views, ["zzz"])


def test_runs_that_their_seed_alone_sets_apart_are_averaged():
    rows = [
        {"id": "a", "b": 1, "seed": 0, "coverage": 0.2},
        {"id": "b", "b": 1, "seed": 1, "coverage": 0.4},
        {"id": "c", "b": 2, "seed": 0, "coverage": 0.5},
    ]
    one, two = groups(rows)
    assert (one["b"], one["runs"], one["coverage"]) == (1, 2, pytest.approx(0.3))
    assert one["coverage_sd"] == pytest.approx(0.1414, abs=1e-4)
    assert (two["coverage"], two["coverage_sd"]) == (0.5, None)


def test_writing_a_description_that_stands_there_touches_nothing(study):
    file = spec_file(study, FIT)
    before = file.stat().st_mtime_ns
    write_spec(study, FIT)
    assert file.stat().st_mtime_ns == before
