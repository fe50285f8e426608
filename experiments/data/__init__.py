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
from experiments.data.pipelines import batches, evaluation_batches, standardise, stratified_split
from experiments.data.recall import associative_recall, recall_batches
from experiments.data.text import Text, TextData, check_text, load_text, text_batches, text_evaluation_batches

__all__ = [
    "MQAR_TEST",
    "MQAR_TRAIN",
    "ClassificationData",
    "ClassificationSet",
    "MQARSize",
    "Text",
    "TextData",
    "TimeSeriesClassification",
    "associative_recall",
    "batches",
    "check_available",
    "check_text",
    "evaluation_batches",
    "list_classification",
    "load_classification",
    "load_text",
    "mqar",
    "mqar_batches",
    "recall_batches",
    "standardise",
    "stratified_split",
    "text_batches",
    "text_evaluation_batches",
]
