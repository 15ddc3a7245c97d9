"""Laws of event files written without torch: their messages are those of torch's writer, and TensorBoard reads them back."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import summary as reference

from hpc_c2g.monitoring import summaries
from hpc_c2g.monitoring.event_file import EventFile

POINT = {"global_batch": 50, "rate": 0.5, "variant": "two", "flag": True, "absent": None}


def test_summaries_are_those_of_torchs_writer():
    experiment, start, end = reference.hparams(POINT, {"a": 0.0, "b": 0.0})
    assert summaries.session(POINT) == (start, end)
    known = {name: value for name, value in POINT.items() if value is not None}
    assert summaries.experiment(known, ["a", "b"]) == experiment
    assert summaries.text("a", "ä **b**") == reference.text("a", "ä **b**")
    charts = {"a": ("a", "a/low", "a/high"), "b": ("b", "b/low", "b/high")}
    layout = {"Means": {title: ["Margin", list(tags)] for title, tags in charts.items()}}
    assert summaries.margin_charts("Means", charts) == reference.custom_scalars(layout)


def read(folder) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def test_curves_and_pictures_are_read_back_as_they_were_written(tmp_path):
    png = io.BytesIO()
    Image.new("RGB", (7, 5), "red").save(png, "PNG")
    rng, steps = np.random.default_rng(0), [3, 300, 70_000]
    curves = {"a": rng.normal(size=3).tolist(), "b": [float("nan"), float("inf"), -0.0]}
    with EventFile(tmp_path / "new" / "folder") as events:
        events.add_curves(steps, curves)
        events.add_curves([5], {"c": [2.0]})  # another curve, at an earlier step
        events.add(summaries.scalars({"d": 1.5}), 9)
        events.add(summaries.png("picture", png.getvalue()))
    found = read(tmp_path / "new" / "folder")
    for name, values in curves.items():
        np.testing.assert_array_equal([e.value for e in found.Scalars(name)], np.float32(values))
        assert [e.step for e in found.Scalars(name)] == steps
    assert [(e.step, e.value) for e in found.Scalars("c")] == [(5, 2.0)]
    assert [(e.step, e.value) for e in found.Scalars("d")] == [(9, 1.5)]
    (picture,) = found.Images("picture")
    assert (picture.encoded_image_string, picture.width, picture.height) == (png.getvalue(), 7, 5)


def test_curves_of_another_length_than_their_steps_are_refused(tmp_path):
    with EventFile(tmp_path) as events, pytest.raises(ValueError, match="zip"):
        events.add_curves([1, 2], {"a": [1.0]})
