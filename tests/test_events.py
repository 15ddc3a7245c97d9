"""Laws of reading event files: TensorBoard's own values, in parts as at once, and damage that costs only what it hit."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import TENSORS
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as TensorAccumulator
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_ndarray
from torch.utils.tensorboard import SummaryWriter

from hpc_c2g.errors import UserError
from hpc_c2g.reporting import archive as archives
from hpc_c2g.reporting import events
from hpc_c2g.reporting.archive import ALONE, Archive, gather
from hpc_c2g.reporting.curves import Curves
from hpc_c2g.reporting.events import Reading, read_events

NAMES = [f"events.out.tfevents.{1700000000 + k}.host.{k}" for k in range(3)]
VERSION = event_pb2.Event(wall_time=1.0, file_version="brain.Event:2")


def scalars(step: int, **values: float) -> event_pb2.Event:
    value = [summary_pb2.Summary.Value(tag=tag, simple_value=x) for tag, x in values.items()]
    return event_pb2.Event(wall_time=2.0, step=step, summary=summary_pb2.Summary(value=value))


def tensor(step: int, tag: str, kind: int, content: bool, x: float) -> event_pb2.Event:
    """A scalar in the new style, in each of the forms that a tensor has for one."""
    event = event_pb2.Event(wall_time=2.0, step=step)
    made = event.summary.value.add(tag=tag).tensor
    made.dtype = kind
    if content:
        made.tensor_content = struct.pack("<f" if kind == 1 else "<d", x)
    else:
        (made.float_val if kind == 1 else made.double_val).append(x)
    return event


def purge(step: int) -> event_pb2.Event:
    return event_pb2.Event(step=step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))


def framed(*contents: event_pb2.Event | bytes) -> bytes:
    """A file of records, framed by TensorBoard's writer."""
    file = io.BytesIO()
    for content in contents:
        RecordWriter(file).write(content if isinstance(content, bytes) else content.SerializeToString())
    return file.getvalue()


def put(folder: Path, *contents: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip(NAMES, contents, strict=False):
        (folder / name).write_bytes(content)
    return folder


def points(curves: Curves) -> dict[str, dict[int, float]]:
    return {tag: dict(zip(*(a.tolist() for a in curves.of(tag)), strict=True)) for tag in curves.tags}


def reference(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard makes of a folder: the older of its readers of simple values, the newer, which purges tensors too, of all."""
    board = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
    simple = {tag: {e.step: e.value for e in board.Scalars(tag)} for tag in board.Tags()[SCALARS]}
    newer = TensorAccumulator(str(folder), size_guidance={TENSORS: 0}, tensor_size_guidance={"scalars": 0}).Reload()
    found = {}
    for tag in newer.Tags()[TENSORS]:
        arrays = {e.step: make_ndarray(e.tensor_proto) for e in newer.Tensors(tag)}
        found[tag] = {step: float(a) for step, a in arrays.items() if a.ndim == 0 and a.dtype.kind == "f"}
    assert all(found.get(tag, {}) == values for tag, values in simple.items())
    return {tag: found[tag] for tag in sorted(found) if found[tag]}


def same(one: Reading, other: Reading) -> bool:
    arrays = zip((one.curves.steps, one.curves.values), (other.curves.steps, other.curves.values), strict=True)
    return (
        one.curves.tags == other.curves.tags
        and one.files == other.files
        and all(np.array_equal(a, b, equal_nan=True) and a.dtype == b.dtype for a, b in arrays)
    )


STEPS, VALUES = st.integers(0, 5), st.floats(-100, 100, width=32)
EVENTS = st.one_of(
    st.builds(lambda step, values: scalars(step, **values), STEPS, st.dictionaries(st.sampled_from("abc"), VALUES)),
    st.builds(tensor, STEPS, st.sampled_from(["new", "newer"]), st.sampled_from([1, 2]), st.booleans(), VALUES),
    st.builds(purge, STEPS),
)
STREAMS = st.lists(st.lists(EVENTS, max_size=8), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(STREAMS)
def test_values_are_those_of_tensorboard(streams):
    with TemporaryDirectory() as folder:  # the newer of TensorBoard's readers takes the very first start for none
        put(Path(folder), *(framed(VERSION, *[purge(0)] * (k == 0), *stream) for k, stream in enumerate(streams)))
        assert points(read_events(Path(folder)).curves) == reference(Path(folder))


@settings(max_examples=100, deadline=None)
@given(STREAMS, st.data())
def test_reading_in_parts_is_reading_at_once(streams, data):
    contents = [framed(VERSION, *s, scalars(3, a=float("nan")), b"\xff" * 3, scalars(3, a=1.0)) for s in streams]
    cuts = [
        sorted(data.draw(st.lists(st.one_of(st.none(), st.integers(0, len(c))), max_size=2)), key=lambda n: n or -1)
        for c in contents
    ]
    with TemporaryDirectory() as name:
        folder, reading = Path(name), None
        for part in range(3):
            for file, content, cut in zip(NAMES, contents, cuts, strict=False):
                end = cut[part] if part < len(cut) else len(content)
                if end is not None:
                    with open(folder / file, "ab") as out:
                        out.write(content[out.tell() : end])
            reading = read_events(folder, reading)
            assert same(reading, read_events(folder))
        assert not reading.unfinished


def test_a_step_in_one_event_is_the_step_in_many(tmp_path):
    tags = [f"group/{k}" for k in range(7)]
    rows = [{tag: step + k / 8 for k, tag in enumerate(tags)} for step in range(9)]
    together = framed(VERSION, *(scalars(step, **row) for step, row in enumerate(rows)))
    apart = framed(VERSION, *(scalars(step, **{tag: x}) for step, row in enumerate(rows) for tag, x in row.items()))
    one, other = (read_events(put(tmp_path / n, c)).curves for n, c in (("one", together), ("other", apart)))
    assert points(one) == points(other) == {tag: {s: row[tag] for s, row in enumerate(rows)} for tag in tags}
    assert one.values.shape == (9, 7)


def test_a_resumed_run_of_torchs_writer_is_that_of_tensorboard(tmp_path):
    for start, stop in ((0, 8), (5, 12)):  # the first one wrote 5, 6 and 7 in vain
        with SummaryWriter(str(tmp_path), purge_step=start, filename_suffix=f".{start}") as board:
            for step in range(start, stop):
                board.add_scalar("loss", start + step / 8, step)
                board.add_scalar("tensor", start - step, step, new_style=True)
                board.add_scalar("double", 1 / 3, step, new_style=True, double_precision=True)
                board.add_histogram("histogram", np.arange(step + 2), step)
                board.add_image("image", np.zeros((3, 4, 4)), step)
                board.add_text("text", "words", step)
            if start == 0:
                board.add_scalar("only at first", 1.0, 7)
    reading = read_events(tmp_path)
    assert points(reading.curves) == reference(tmp_path)
    assert reading.curves.tags == ("double", "loss", "tensor")
    assert reading.curves.of("loss")[1].tolist() == [s / 8 for s in range(5)] + [5 + s / 8 for s in range(5, 12)]
    assert reading.curves.of("double")[1][0] == 1 / 3
    assert reading.complaints == reading.unfinished == ()


def test_tensors_of_another_rank_or_kind_are_no_scalars(tmp_path):
    ranked = [tensor(1, f"t{k}", 1, k % 2 == 0, 2.0) for k in range(4)]
    for event, sizes in zip(ranked, ([1], [1], [2, 1], [1, 1]), strict=True):
        for size in sizes:
            event.summary.value[0].tensor.tensor_shape.dim.add(size=size)
    unknown, integer, empty = (tensor(1, name, 1, False, 2.0) for name in ("unknown", "integer", "empty"))
    unknown.summary.value[0].tensor.tensor_shape.unknown_rank = True
    integer.summary.value[0].tensor.dtype = 3
    del empty.summary.value[0].tensor.float_val[:]
    content = framed(VERSION, *ranked, unknown, integer, empty, tensor(1, "t", 1, False, 2.0))
    assert points(read_events(put(tmp_path, content)).curves) == {"t": {1: 2.0}}


def test_a_zero_is_a_value(tmp_path):
    content = framed(VERSION, scalars(0, a=0.0), tensor(0, "b", 1, True, 0.0), tensor(0, "c", 2, False, 0.0))
    assert points(read_events(put(tmp_path, content)).curves) == {tag: {0: 0.0} for tag in "abc"}


RECORDS = [VERSION, scalars(1, a=1.0, b=2.0), scalars(2, a=3.0), purge(2), scalars(2, a=4.0), scalars(3, b=5.0)]
ENDS = np.cumsum([0] + [len(framed(r)) for r in RECORDS]).tolist()


def whole(folder: Path, number: int) -> dict[str, dict[int, float]]:
    return points(read_events(put(folder, framed(*RECORDS[:number]))).curves)


def test_a_file_cut_anywhere_has_its_whole_records_and_goes_on_when_it_is_completed(tmp_path):
    content = framed(*RECORDS)
    prefixes = [whole(tmp_path / str(k), k) for k in range(len(RECORDS) + 1)]
    for size in range(1, len(content) + 1):
        folder = put(tmp_path / "cut", content[:size])
        part, number = read_events(folder), sum(end <= size for end in ENDS) - 1
        assert points(part.curves) == prefixes[number]
        assert part.complaints == ()
        assert part.unfinished == (
            (f"{NAMES[0]}: the record at byte {ENDS[number]} is not whole yet",) * (size not in ENDS)
        )
        with open(folder / NAMES[0], "ab") as file:
            file.write(content[size:])
        assert points(read_events(folder, part).curves) == prefixes[-1]


def test_a_wrong_byte_anywhere_is_told_and_costs_its_record_and_what_follows_in_its_file(tmp_path):
    content, after = framed(*RECORDS), framed(VERSION, scalars(9, later=9.0))
    prefixes = [whole(tmp_path / str(k), k) for k in range(len(RECORDS) + 1)]
    for at in range(len(content)):
        wrong = bytearray(content)
        wrong[at] ^= 1 << at % 8
        reading, number = read_events(put(tmp_path / "wrong", bytes(wrong), after)), sum(end <= at for end in ENDS)
        assert points(reading.curves) == {**prefixes[number - 1], "later": {9: 9.0}}
        text = f"record {number} at byte {ENDS[number - 1]} has a wrong checksum; the rest of the file is left out"
        assert reading.complaints == (f"{NAMES[0]}: {text}",)
        assert reading.unfinished == ()


@pytest.mark.parametrize(
    "garbage", [b"\0" * 40, b"<html>no such file</html>", b"\xff" * 100, random.Random(0).randbytes(64)]
)
def test_garbage_ends_its_file_and_no_other(tmp_path, garbage):
    whole = framed(VERSION, scalars(1, a=1.0))
    reading = read_events(put(tmp_path, whole + garbage + whole, framed(VERSION, scalars(2, a=2.0)), garbage))
    assert points(reading.curves) == {"a": {1: 1.0, 2: 2.0}}
    assert [text.split(":")[0] for text in reading.complaints] == [NAMES[0], NAMES[2]]


def test_what_is_left_out_is_counted(tmp_path):
    odd = [scalars(1, a=float("nan"), b=float("inf"), c=1.0), scalars(1, c=2.0), scalars(2, c=3.0), scalars(1, c=4.0)]
    old = event_pb2.Event(file_version="brain.Event:1")
    folder = put(tmp_path, framed(VERSION, b"\xff\xff", *odd, old), b"", framed(scalars(1, c=5.0), VERSION))
    reading = read_events(folder)
    assert points(reading.curves) == {"c": {1: 5.0, 2: 3.0}}
    assert reading.complaints == (
        f"{NAMES[0]}: 1 records are no events; they are left out",
        f"{NAMES[0]}: 1 statements of file version 'brain.Event:1' are read as brain.Event:2",
        f"{NAMES[0]}: 2 values are not finite; they are left out",
        f"{NAMES[0]}: 2 values are written again at the same step; the last of each counts",
        f"{NAMES[1]}: is empty",
        f"{NAMES[2]}: 1 statements of file version '' are read as brain.Event:2",
        f"{NAMES[2]}: 1 values are written again at the same step; the last of each counts",
    )


def test_points_written_again_after_a_purge_are_not_repeated(tmp_path):
    events = [scalars(s, a=1.0) for s in range(5)] + [purge(2)] + [scalars(s, a=2.0) for s in (2, 3)]
    reading = read_events(put(tmp_path, framed(VERSION, *events)))
    assert points(reading.curves) == {"a": {0: 1.0, 1: 1.0, 2: 2.0, 3: 2.0}}
    assert reading.complaints == ()


def test_only_a_start_purges(tmp_path):
    other = event_pb2.Event(step=1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.CHECKPOINT))
    folder = put(tmp_path, framed(VERSION, scalars(1, a=1.0), other, VERSION, scalars(3, a=3.0), purge(2)))
    assert points(read_events(folder).curves) == {"a": {1: 1.0}}


def test_what_cannot_be_opened_is_told_and_tried_again(tmp_path, monkeypatch):
    folder = put(tmp_path, framed(VERSION, scalars(1, a=1.0)), framed(VERSION, scalars(2, a=2.0)))
    (folder / NAMES[2]).mkdir()
    (folder / f"{NAMES[2]}.gone").symlink_to("nowhere")
    os.mkfifo(folder / f"{NAMES[2]}.pipe")

    def refuse(path, *args, **kwargs):
        if path.name == NAMES[0]:
            raise PermissionError(13, "Permission denied")
        return open(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(events, "open", refuse, raising=False)
        reading = read_events(folder)
        assert read_events(folder, reading) is reading
    assert points(reading.curves) == {"a": {2: 2.0}}
    assert [t.split(":")[0] for t in reading.complaints] == [n for n in reading.files if n != NAMES[1]]
    assert f"{NAMES[0]}: cannot be read from byte 0 on: Permission denied; the rest is left out" in reading.complaints
    again = read_events(folder, reading)
    assert points(again.curves) == {"a": {1: 1.0, 2: 2.0}}
    assert same(again, read_events(folder))


def test_a_folder_that_is_not_there_has_no_curves(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        assert read_events(folder).files == {}
        assert read_events(folder).curves.values.shape == (0, 0)


LONG = framed(VERSION, *(scalars(s, a=float(s), b=1.0) for s in range(6)))
LAST = framed(VERSION, *(scalars(s, a=s + 0.5, c=1.0) for s in range(2, 8)))
OTHER = framed(VERSION, *(scalars(s, a=-float(s), d=1.0) for s in range(2, 8)))


@pytest.mark.parametrize(
    "change",
    [
        lambda f: (f / NAMES[1]).write_bytes(OTHER),
        lambda f: (f / NAMES[1]).write_bytes(OTHER + framed(scalars(7, a=7.0))),
        lambda f: (f / NAMES[1]).write_bytes(OTHER[:-20]),
        lambda f: (f / NAMES[1]).unlink(),
        lambda f: (f / NAMES[0]).unlink(),
        lambda f: (f / NAMES[0]).write_bytes(LONG + framed(scalars(1, b=7.0))),
        lambda f: (f / NAMES[0]).rename(f / NAMES[2]),
        lambda f: ((f / NAMES[2]).write_bytes(OTHER), (f / NAMES[2]).replace(f / NAMES[1])),
        lambda f: (f / NAMES[0][:-1]).write_bytes(OTHER),
        lambda f: (f / NAMES[1]).write_bytes(LAST[:60] + b"!" + LAST[61:]),
        lambda f: (put(f / "new", LAST[:60] + b"!" + LAST[61:] + LAST) / NAMES[0]).replace(f / NAMES[1]),
    ],
    ids=[
        "rewritten",
        "rewritten longer",
        "shrunk",
        "last gone",
        "first gone",
        "first grown",
        "renamed",
        "replaced",
        "before",
        "damaged",
        "replaced longer and damaged",
    ],
)
def test_a_folder_whose_past_has_changed_is_read_afresh(tmp_path, change):
    assert len(OTHER) == len(LAST)
    before = read_events(put(tmp_path, LONG, LAST))
    change(tmp_path)
    now = read_events(tmp_path, before)
    assert same(now, read_events(tmp_path))
    assert points(now.curves) != points(before.curves)


def test_only_what_is_new_is_read(tmp_path, monkeypatch):
    before = read_events(put(tmp_path, LONG, LONG[:-5]))
    spans, real = [], events.records_of
    monkeypatch.setattr(events, "records_of", lambda file, at, size: spans.append((at, size)) or real(file, at, size))
    with open(tmp_path / NAMES[1], "ab") as file:
        file.write(LONG[-5:])
    (tmp_path / NAMES[2]).write_bytes(OTHER)
    now = read_events(tmp_path, before)
    assert spans == [(before.files[NAMES[1]].offset, len(LONG)), (0, len(OTHER))]
    assert 0 < spans[0][0] < len(LONG)
    assert same(now, read_events(tmp_path))


def test_a_folder_with_nothing_new_is_the_same_reading_and_opens_no_file(tmp_path, monkeypatch):
    before = read_events(put(tmp_path, LONG, LONG[:-5], b""))

    def refuse(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(events, "open", refuse, raising=False)
    assert read_events(tmp_path, before) is before
    with pytest.raises(AssertionError):
        read_events(tmp_path)


def test_a_look_at_what_has_not_changed_imports_neither_tensorboard_nor_torch(tmp_path):
    archive = Archive(tmp_path / "archive")
    archive.save("run", read_events(put(tmp_path / "run", LONG)))
    code = f"""
import sys
from pathlib import Path
from hpc_c2g.reporting.archive import Archive, gather
from hpc_c2g.reporting.events import read_events
archive, folder = Archive(Path({str(tmp_path / "archive")!r})), Path({str(tmp_path / "run")!r})
before = archive.load("run")
assert read_events(folder, before) is before
assert gather(archive, {{"run": folder}}, 1).changed == ()
heavy = {{"tensorboard", "torch", "tensorflow"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
read_events(folder)
assert "tensorboard" in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def study(root: Path, runs: int) -> dict[str, Path]:
    return {f"{k:012x}": put(root / f"{k:012x}", framed(VERSION, scalars(1, a=float(k), b=1.0))) for k in range(runs)}


def test_what_is_saved_is_what_is_loaded(tmp_path):
    content = framed(
        VERSION,
        scalars(1, a=1.0),
        scalars(2, **{"größe/µ": 2.0}),
        scalars(1, a=3.0),
        b"\xff",
        scalars(2, a=float("inf")),
    )
    reading = read_events(put(tmp_path / "run", content + b"\1" * 99, framed(VERSION)[:-3]))
    Archive(tmp_path).save("a.b-c_0", reading)
    loaded = Archive(tmp_path).load("a.b-c_0")
    assert same(loaded, reading)
    assert loaded.complaints == reading.complaints == Archive(tmp_path).complaints("a.b-c_0")
    assert loaded.unfinished == reading.unfinished != ()
    assert read_events(tmp_path / "run", loaded) is loaded
    assert Archive(tmp_path).load("another") is None


def test_a_damaged_archive_is_absent_and_never_wrong(tmp_path):
    reading, archive = read_events(put(tmp_path / "run", LONG)), Archive(tmp_path)
    archive.save("run", reading)
    content, absent = archive.path("run").read_bytes(), 0
    for at in range(len(content)):
        wrong = bytearray(content)
        wrong[at] ^= 1 << at % 8
        archive.path("run").write_bytes(bytes(wrong))
        loaded = archive.load("run")
        absent += loaded is None
        assert loaded is None or same(loaded, reading)
    assert absent > len(content) // 2
    for wrong in (b"", content[:-30], content[: len(content) // 2], b"\x93NUMPY", b"garbage", b"\x80\x04N."):
        archive.path("run").write_bytes(wrong)
        assert archive.load("run") is None
        assert archive.stale("run", tmp_path / "run")
    assert gather(archive, {"run": tmp_path / "run"}, 1).changed == ()
    assert same(archive.load("run"), reading)


def test_an_archive_of_another_format_is_read_afresh(tmp_path, monkeypatch):
    folders = study(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(archives, "FORMAT", archives.FORMAT - 1)
        gather(Archive(tmp_path / "archive"), folders, 1)
    archive = Archive(tmp_path / "archive")
    assert archive.load("0" * 12) is None
    assert gather(archive, folders, 1).changed == tuple(folders)
    assert same(archive.load("0" * 12), read_events(folders["0" * 12]))


def test_only_runs_that_changed_are_read_and_told(tmp_path, monkeypatch):
    folders, read = study(tmp_path, 6), []
    archive, real = Archive(tmp_path / "archive"), archives.read_events
    monkeypatch.setattr(archives, "read_events", lambda folder, before: read.append(folder) or real(folder, before))
    keys = list(folders)
    assert gather(archive, folders, 1) == archives.Gathered(tuple(keys), dict.fromkeys(keys, ()))
    read.clear()
    with open(folders[keys[2]] / NAMES[0], "ab") as file:
        file.write(framed(scalars(2, a=float("nan")), scalars(3, a=7.0)))
    put(folders[keys[4]], LONG, b"\1" * 50)
    changed = (keys[2], keys[4])
    assert tuple(key for key in keys if archive.stale(key, folders[key])) == changed
    gathered = gather(Archive(archive.folder), folders, 1)
    assert gathered.changed == changed
    assert gathered.complaints[keys[2]] == (f"{NAMES[0]}: 1 values are not finite; they are left out",)
    assert "checksum" in gathered.complaints[keys[4]][0]
    again = gather(Archive(archive.folder), folders, 1)  # still told of what is as it was
    assert again == archives.Gathered((), gathered.complaints)
    assert read == [folders[key] for key in changed]
    assert all(same(archive.load(key), real(folder)) for key, folder in folders.items())


def test_whether_runs_changed_is_known_without_their_arrays(tmp_path, monkeypatch):
    folders = study(tmp_path, 3)
    gather(Archive(tmp_path / "archive"), folders, 1)
    monkeypatch.setattr(np, "load", None)
    archive = Archive(tmp_path / "archive")
    assert not any(archive.stale(key, folder) for key, folder in folders.items())
    assert gather(archive, folders, 1).changed == ()
    archive.path("0" * 12).unlink()
    assert archive.stale("0" * 12, folders["0" * 12])


@pytest.mark.parametrize("index", [b"", b"{}", b"[1]", b'{"format": 1, "runs": {"000000000000": 3}}', None])
def test_a_lost_index_is_made_again_from_what_is_archived(tmp_path, monkeypatch, index):
    folders = study(tmp_path, 2)
    gather(Archive(tmp_path / "archive"), folders, 1)
    file = tmp_path / "archive" / "index.json"
    good = json.loads(file.read_text())
    file.write_bytes(index) if index is not None else file.unlink()
    monkeypatch.setattr(events, "_scan", None)  # no event file is read
    gather(Archive(tmp_path / "archive"), folders, 1)
    assert json.loads(file.read_text()) == good


def test_a_run_without_event_files_is_told_and_has_no_reading(tmp_path):
    folders, archive = study(tmp_path, 2), Archive(tmp_path / "archive")
    folders["missing"] = tmp_path / "missing"
    assert gather(archive, folders, 1).complaints["missing"] == ("has no event files",)
    assert archive.load("missing") is None
    assert not archive.stale("missing", folders["missing"])
    gone = next(iter(folders))
    (folders[gone] / NAMES[0]).unlink()
    assert gather(archive, folders, 1).changed == (gone,)
    assert archive.load(gone) is None
    none = ("has no event files",)
    assert gather(archive, folders, 1) == archives.Gathered((), dict(zip(folders, (none, (), none), strict=True)))


@pytest.mark.parametrize("killed", [False, True])
def test_many_processes_gather_what_one_does(tmp_path, monkeypatch, killed):
    folders = study(tmp_path, ALONE + 5)
    if killed:

        def die(self, function, *iterables, chunksize):
            yield from list(map(function, *iterables))[:3]
            raise BrokenProcessPool

        monkeypatch.setattr(archives.ProcessPoolExecutor, "map", die)
    else:  # this process reads nothing
        monkeypatch.setattr(archives, "read_events", None)
    archive = Archive(tmp_path / "archive")
    assert gather(archive, folders, 2).changed == tuple(folders)
    assert all(same(archive.load(key), read_events(folder)) for key, folder in folders.items())
    assert gather(archive, folders, 2).changed == ()


@pytest.mark.parametrize("key", ["", "../up", "a/b", ".hidden", "a\n", "a b", "x" * 101])
def test_a_key_that_is_no_safe_name_is_refused(tmp_path, key):
    archive = Archive(tmp_path)
    for use in (
        archive.load,
        archive.path,
        lambda k: archive.stale(k, tmp_path),
        lambda k: gather(archive, {k: tmp_path}, 1),
    ):
        with pytest.raises(UserError, match="cannot name"):
            use(key)


def test_an_archive_that_cannot_be_written_is_one_error_from_any_process(tmp_path):
    (tmp_path / "archive").write_text("a file, no folder")
    with pytest.raises(UserError, match="cannot write") as caught:
        gather(Archive(tmp_path / "archive"), study(tmp_path, 1), 1)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
