"""What may be wrong before a run of `aaren_classification` begins."""

import pytest

from experiments.__main__ import main
from experiments.aaren_classification import PRESETS, Config, check


def test_presets_need_no_data_set(monkeypatch):
    monkeypatch.setattr("experiments.data.classification._locate", lambda *_: pytest.fail("looked for a data set"))
    assert Config() == PRESETS["demo"]


@pytest.mark.parametrize(("dataset", "error"), [("Foo", ValueError), ("Handwriting", FileNotFoundError)])
def test_missing_data_set(dataset, error):
    with pytest.raises(error, match=f"{dataset}_TRAIN.ts"):
        check(Config(dataset=dataset))


def test_unknown_data_set_claims_no_folder(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["aaren_classification", "--dataset", "Foo", "--folder", str(tmp_path / "run")])
    assert stopped.value.code == 2
    assert "'Foo'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [{"width": 65}, {"stream_tokens": 100}, {"seeds": 0}, {"learning_rates": ()}])
def test_options_that_do_not_fit(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Config(**options)
