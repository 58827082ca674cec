"""Energy as a third objective and as a column; the device is simulated, and so is its power."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from search_examples import Prepared, filled_tables

from nas.core.errors import ConfigError, DeviceError
from nas.latency.energy import EnergyEstimator
from nas.search.choice import choose_sampler
from nas.search.rounds import run_rounds, write_study
from nas.search.study import Scored, directions
from nas.testing import SimulatedDevice


def test_energy_is_an_objective_of_the_study(prepared: Prepared, tmp_path: Path) -> None:
    device = SimulatedDevice(power_mw=4000.0)
    filled_tables(tmp_path / "tables", prepared.inputs.space, device)
    parts = prepared.parts(tmp_path, device=device, energy=True, trials=6, rounds=1)
    run_rounds(parts)
    write_study(parts)
    study = optuna.load_study(study_name="run", storage=f"sqlite:///{tmp_path / 'run' / 'study.db'}")
    assert study.metric_names == ["score", "latency_ms", "energy_mj"]
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE", "MINIMIZE"]
    estimator = EnergyEstimator(parts.predictor.table)
    records = {r.candidate.id: r for r in parts.folder.trials()}
    for trial in study.trials:
        estimate = estimator.estimate(records[trial.user_attrs["candidate"]].candidate)
        assert 0 < trial.values[2] <= estimate.worst_mj


def test_a_device_without_a_sensor_is_refused_before_any_training(prepared: Prepared, tmp_path: Path) -> None:
    parts = prepared.parts(tmp_path, energy=True)
    with pytest.raises(
        DeviceError, match=r"search\.energy: simulated-0 tells no energy.*nas doctor --device.*energy=false"
    ):
        run_rounds(parts)
    assert not parts.folder.trials()


def test_without_the_setting_nothing_changes() -> None:
    assert directions(2) == ["maximize", "minimize", "minimize"]
    assert directions(2, True) == ["maximize", "minimize", "minimize", "minimize"]
    assert Scored((0,), 0.5, (1.0,), -0.1, "x").values == (0.5, 1.0)
    assert Scored((0,), 0.5, (1.0,), -0.1, "x", energy_mj=3.0).values == (0.5, 1.0, 3.0)


def test_the_greybox_sampler_does_not_know_energy() -> None:
    with pytest.raises(ConfigError, match=r"greybox searches by accuracy and latency only, and search\.energy is set"):
        choose_sampler("greybox", 100, is_latency_known=True, with_energy=True)
    chosen, reason = choose_sampler("auto", 100, is_latency_known=True, with_energy=True)
    assert chosen in ("tpe", "nsga2") and "greybox does not know energy" in reason
    assert choose_sampler("auto", 100, is_latency_known=True)[0] == "greybox"
