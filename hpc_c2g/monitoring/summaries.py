"""Messages that TensorBoard's event files hold, built without torch, which takes seconds to import."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

Summary = Any
"""A ``tensorboard.compat.proto.summary_pb2.Summary``, which has no types."""


def scalars(values: Mapping[str, float]) -> Summary:
    """Return all scalars of a step in one summary: a tenth of the time and half the bytes of one event per scalar."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])


def text(name: str, content: str) -> Summary:
    """Return a text in Markdown."""
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.plugins.text.plugin_data_pb2 import TextPluginData

    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    return _plugin(f"{name}/text_summary", "text", TextPluginData(version=0), content.encode(), shape)


def png(name: str, content: bytes) -> Summary:
    """Return a PNG picture as it is, without decoding it."""
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    with Image.open(io.BytesIO(content)) as file:
        width, height = file.size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
    return Summary(value=[Summary.Value(tag=name, image=image)])


def margin_charts(category: str, charts: Mapping[str, Sequence[str]]) -> Summary:
    """Return a layout of custom charts that each draw a scalar in its band.

    Args:
        category: Title of their category.
        charts: Names of the scalar, of its lower and of its upper end, by the chart's title.
    """
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout, MarginChartContent

    series = {
        title: MarginChartContent.Series(value=value, lower=lower, upper=upper)
        for title, (value, lower, upper) in charts.items()
    }
    drawn = [Chart(title=title, margin=MarginChartContent(series=[one])) for title, one in series.items()]
    layout = Layout(category=[Category(title=category, chart=drawn)])
    return _plugin("custom_scalars__config__", "custom_scalars", None, layout.SerializeToString(), TensorShapeProto())


def session(hyperparameters: Mapping[str, Any]) -> tuple[Summary, Summary]:
    """Return the start and the end of a session of the HParams page; its metrics are the scalars of the same folder.

    Args:
        hyperparameters: Numbers and texts by name; those that are None are left out.
    """
    from tensorboard.plugins.hparams.api_pb2 import Status
    from tensorboard.plugins.hparams.metadata import SESSION_END_INFO_TAG, SESSION_START_INFO_TAG
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo

    start = SessionStartInfo()
    for name, value in hyperparameters.items():
        if value is None:
            continue
        if isinstance(value, str):
            start.hparams[name].string_value = value
        else:
            start.hparams[name].number_value = value
    end = SessionEndInfo(status=Status.Value("STATUS_SUCCESS"))
    return (
        _plugin(SESSION_START_INFO_TAG, "hparams", HParamsPluginData(session_start_info=start, version=0)),
        _plugin(SESSION_END_INFO_TAG, "hparams", HParamsPluginData(session_end_info=end, version=0)),
    )


def experiment(hyperparameters: Mapping[str, bool | int | float | str], metrics: Sequence[str]) -> Summary:
    """Return the columns of the HParams page.

    Args:
        hyperparameters: Examples of the values by name, which set the types of the columns.
        metrics: Names of the metrics in the order of their columns.
    """
    from tensorboard.plugins.hparams.api_pb2 import DataType, Experiment, HParamInfo, MetricInfo, MetricName
    from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    types = {
        name: "DATA_TYPE_STRING" if isinstance(value, str) else "DATA_TYPE_FLOAT64"
        for name, value in hyperparameters.items()
    }
    columns = Experiment(
        hparam_infos=[HParamInfo(name=name, type=DataType.Value(kind)) for name, kind in types.items()],
        metric_infos=[MetricInfo(name=MetricName(tag=name)) for name in metrics],
    )
    return _plugin(EXPERIMENT_TAG, "hparams", HParamsPluginData(experiment=columns, version=0))


def _plugin(tag: str, plugin: str, data: Any = None, content: bytes | None = None, shape: Any = None) -> Summary:
    """Return one value of a plugin, and its content as a tensor of one string if it has one."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto

    own = SummaryMetadata.PluginData(plugin_name=plugin, content=data.SerializeToString() if data else b"")
    value = Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=own))
    if content is not None:
        value.tensor.CopyFrom(TensorProto(dtype="DT_STRING", string_val=[content], tensor_shape=shape))
    return Summary(value=[value])
