"""Data sets of the experiments: tensorflow-datasets on disk, padded arrays in memory, grain pipelines to batches."""

from experiments.data.classification import (
    ClassificationData,
    ClassificationSet,
    TimeSeriesClassification,
    check_available,
    list_classification,
    load_classification,
)
from experiments.data.pipelines import batches, evaluation_batches, standardise, stratified_split
from experiments.data.recall import associative_recall, recall_batches

__all__ = [
    "ClassificationData",
    "ClassificationSet",
    "TimeSeriesClassification",
    "associative_recall",
    "batches",
    "check_available",
    "evaluation_batches",
    "list_classification",
    "load_classification",
    "recall_batches",
    "standardise",
    "stratified_split",
]
