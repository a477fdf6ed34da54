"""What TensorBoard shows beside curves: the charts of Custom Scalars, HParams, Text, Histograms."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import (
    HParamsPluginData,
    SessionEndInfo,
    SessionStartInfo,
)
from torch import Tensor
from torch.utils.tensorboard.summary import custom_scalars, histogram_raw, text

from lrd import recipe as recipes

# TensorBoard's HParams shows five columns of settings at first: those that are said to differ
# between runs. Nothing but the reader's runs can say it, so these are what runs are compared by.
_FIRST_HPARAMS = {
    "data.batch_size",
    "lr_dropout.keep_prob",
    "optimizer.lr",
    "optimizer.name",
    "seed",
}
_NUM_BINS = 61  # of a histogram; odd, so that dropped elements have the bin around zero


def charts() -> Summary:
    """The charts of the Custom Scalars page, the same for all runs.

    The tags are regular expressions, because names of groups and probes differ between recipes.
    """
    layout = {
        "loss and accuracy": {
            "loss": ["Multiline", ["(train|test|validation)/(ema_)?loss$"]],
            "accuracy": ["Multiline", ["(train|test|validation)/(ema_)?accuracy$"]],
        },
        "learning rate dropout": {
            "lr and effective lr": ["Multiline", ["lr/", "lr_effective/"]],
            "lr, effective lr and probes (single elements)": [
                "Multiline",
                ["lr/", "lr_effective/", "probes/"],
            ],
            "fraction of the elements that kept their lr": ["Multiline", ["lr_dropout/kept/"]],
        },
    }
    return custom_scalars(layout)  # type: ignore[no-untyped-call]


def recipe_text(recipe: recipes.Recipe) -> Summary:
    """The resolved recipe for the Text page."""
    # Markdown shows lines that are indented by four spaces as they are.
    indented = "    " + recipe.dump().replace("\n", "\n    ")
    return text("recipe", indented)  # type: ignore[no-untyped-call]


def table_text(tag: str, rows: list[tuple[str, str]]) -> Summary:
    """A table of two columns for the Text page; the first row is the heading."""
    lines = [f"| {name} | {value} |".replace("\n", " ") for name, value in rows]
    lines.insert(1, "| --- | --- |")
    return text(tag, "\n".join(lines))  # type: ignore[no-untyped-call]


def hparams(recipe: recipes.Recipe) -> list[Summary]:
    """The settings of a run and the metrics to compare runs by, for the HParams page.

    The metrics are tags that the run records anyway. TensorBoard takes the columns from one of the
    runs that it shows, so a run without LRD has the columns of LRD too.
    """
    settings = _settings(recipe)
    columns = sorted(settings.keys() | _lr_dropout_keys())
    experiment = api_pb2.Experiment(
        hparam_infos=[_describe_column(key, settings.get(key)) for key in columns],
        metric_infos=[
            api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in _metric_tags(recipe)
        ],
    )

    session = SessionStartInfo(start_time_secs=time.time())
    for key, value in settings.items():
        if isinstance(value, bool):
            session.hparams[key].bool_value = value
        elif isinstance(value, int | float):
            session.hparams[key].number_value = value
        else:
            session.hparams[key].string_value = value

    return [
        _hparams_summary(metadata.EXPERIMENT_TAG, HParamsPluginData(experiment=experiment)),
        _hparams_summary(
            metadata.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=session)
        ),
    ]


def hparams_end() -> Summary:
    """The record that the run is done, for the HParams page."""
    end = SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    return _hparams_summary(metadata.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=end))


def update_histogram(tag: str, update: Tensor) -> Summary | None:
    """The histogram of a parameter's update.

    Args:
        update: new minus old weights, of any shape.

    Returns:
        None if there is no finite element.
    """
    values = update.detach().float().cpu().numpy().ravel()
    values = values[np.isfinite(values)]
    if values.size == 0:
        return None

    bound = float(np.abs(values).max()) or 1e-12
    counts, edges = np.histogram(values, bins=_NUM_BINS, range=(-bound, bound))
    return histogram_raw(  # type: ignore[no-untyped-call]
        tag,
        min=float(values.min()),
        max=float(values.max()),
        num=values.size,
        sum=float(values.sum(dtype=np.float64)),
        sum_squares=float(np.square(values, dtype=np.float64).sum()),
        # The upper limits of the bins; the first bin is what lies below all of them.
        bucket_limits=edges.tolist(),
        bucket_counts=[0, *counts.tolist()],
    )


def _settings(recipe: recipes.Recipe) -> dict[str, bool | int | float | str]:
    """The settings that affect the results; without LRD every element keeps its learning rate."""
    settings: dict[str, bool | int | float | str] = {
        "lr_dropout.kind": "none",
        "lr_dropout.keep_prob": 1.0,
    }
    if recipe.lr_dropout is not None:
        settings["lr_dropout.kind"] = recipe.lr_dropout.kind
    return settings | {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in recipe.result_settings().items()
        if value is not None and key != "lr_dropout"
    }


def _lr_dropout_keys() -> set[str]:
    keys = recipes.LRDropout.model_fields
    return {f"lr_dropout.{key}" for key in keys}


def _metric_tags(recipe: recipes.Recipe) -> list[str]:
    """The metrics of HParams; TensorBoard shows the first five."""
    prefixes = ["test/"]
    if recipe.trainer.ema_decay is not None:
        prefixes = ["test/ema_", *prefixes]
    if recipe.data.validation:
        prefixes = [prefix.replace("test", "validation") for prefix in prefixes] + prefixes
    names = ("accuracy", "loss")
    tags = [f"{prefix}{name}" for name in names for prefix in prefixes]
    return [*tags, "train/accuracy", "train/loss"]


def _describe_column(key: str, value: Any) -> api_pb2.HParamInfo:
    info = api_pb2.HParamInfo(name=key, differs=key in _FIRST_HPARAMS)
    if isinstance(value, bool):
        info.type = api_pb2.DATA_TYPE_BOOL
        for choice in (False, True):
            info.domain_discrete.values.add(bool_value=choice)
    elif isinstance(value, int | float):
        info.type = api_pb2.DATA_TYPE_FLOAT64
    else:
        info.type = api_pb2.DATA_TYPE_STRING
    return info


def _hparams_summary(tag: str, content: HParamsPluginData) -> Summary:
    content.version = metadata.PLUGIN_DATA_VERSION
    plugin_data = SummaryMetadata.PluginData(
        plugin_name=metadata.PLUGIN_NAME, content=content.SerializeToString()
    )
    summary_metadata = SummaryMetadata(plugin_data=plugin_data)
    return Summary(value=[Summary.Value(tag=tag, metadata=summary_metadata)])
