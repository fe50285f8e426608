"""Data sets of the experiments: tensorflow-datasets on disk, padded arrays in memory, grain pipelines to batches."""

from experiments.data.classification import (
    ClassificationData,
    ClassificationSet,
    TimeSeriesClassification,
    check_available,
    list_classification,
    load_classification,
)
from experiments.data.mqar import MQAR_TEST, MQAR_TRAIN, MQARSize, mqar, mqar_batches
from experiments.data.needle import NEEDLE_KINDS, needle, needle_batches
from experiments.data.pipelines import batches, evaluation_batches, standardise, stratified_split
from experiments.data.recall import associative_recall, recall_batches
from experiments.data.series import (
    ForecastingSeries,
    SeriesData,
    check_series,
    list_series,
    load_series,
    series_batches,
    series_evaluation_batches,
    series_windows,
)
from experiments.data.text import Text, TextData, check_text, load_text, text_batches, text_evaluation_batches

__all__ = [
    "MQAR_TEST",
    "MQAR_TRAIN",
    "NEEDLE_KINDS",
    "ClassificationData",
    "ClassificationSet",
    "ForecastingSeries",
    "MQARSize",
    "SeriesData",
    "Text",
    "TextData",
    "TimeSeriesClassification",
    "associative_recall",
    "batches",
    "check_available",
    "check_series",
    "check_text",
    "evaluation_batches",
    "list_classification",
    "list_series",
    "load_classification",
    "load_series",
    "load_text",
    "mqar",
    "mqar_batches",
    "needle",
    "needle_batches",
    "recall_batches",
    "series_batches",
    "series_evaluation_batches",
    "series_windows",
    "standardise",
    "stratified_split",
    "text_batches",
    "text_evaluation_batches",
]
