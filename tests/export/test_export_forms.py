from collections.abc import Sequence
from dataclasses import replace

import onnx
import pytest
from export_networks import MEAN, STD, network_input, run, small_candidate, smooth_images

from nas.core.errors import DeviceError, UsageError
from nas.core.records import Measurement
from nas.core.walk import expand
from nas.export.check import all_graphs
from nas.export.forms import (
    deployed_layers,
    in_series,
    limited_deviation_ms,
    measured_figures,
    path_models,
    path_shares,
    reachable_exits,
)
from nas.export.graph import network_model, random_weights

CANDIDATE = small_candidate()
WEIGHTS = random_weights(CANDIDATE, 0)


def measured(values_ms: Sequence[float]) -> list[Measurement]:
    return [
        Measurement(f"m{i}", "network", "fp32", v, ((v,),), (True,), "wall", "", i, session_ms=(v, v, 1.2 * v, 1.2 * v))
        for i, v in enumerate(values_ms)
    ]


def test_deviation_is_that_of_the_latency_that_is_limited() -> None:
    """A latency varies by 10 % here; what slows one path slows all, so the deviations of a mean add up."""
    paths = measured([1.0, 3.0])
    assert limited_deviation_ms(paths, (0.75, 0.25), "worst") == pytest.approx(0.3)
    assert limited_deviation_ms(paths, (0.75, 0.25), "p99") == pytest.approx(0.3)
    assert limited_deviation_ms(paths, (0.75, 0.25), "expected") == pytest.approx(0.75 * 0.1 + 0.25 * 0.3)


def test_a_chain_repeats_as_badly_as_its_parts_whatever_number_of_sessions_they_had() -> None:
    many = tuple(1.0 + 0.01 * i for i in range(15))
    parts = [
        replace(m, session_ms=s) for m, s in zip(measured([1.035, 1.0]), (many, (0.97, 1.01, 1.05, 1.09)), strict=True)
    ]
    chain = in_series(parts)
    assert len(chain.session_ms) == 4
    assert chain.std_ms == pytest.approx(2 * (0.035 + 0.03) / 2, rel=0.1)


def test_failed_measurement_is_an_error() -> None:
    broken = [replace(m, latency_ms=None, error="out of memory") for m in measured((1, 1))]
    with pytest.raises(DeviceError, match="m0: the exported network could not be measured: out of memory"):
        measured_figures(broken, (0.5, 0.5))


def test_figures_are_those_of_the_paths() -> None:
    figures = measured_figures(measured((0.2, 0.5, 1.0)), (0.5, 0.3, 0.2))
    assert figures.expected_ms == pytest.approx(0.45) and figures.worst_ms == figures.p99_ms == 1.0
    assert figures.std_ms > 0 and figures.provenance == "measured"


def test_two_sessions_that_agree_by_chance_give_no_tiny_deviation() -> None:
    [lucky] = measured([1.0])
    lucky = replace(lucky, session_ms=(1.0, 1.0001, 1.01, 1.012))
    assert measured_figures([lucky], (1.0,)).std_ms == pytest.approx(0.015)
    assert measured_figures([replace(lucky, accepted=(False,))], (1.0,)).std_ms == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("thresholds", "reachable"),
    [((0.5, 0.5), (0, 1, 2)), ((2.0, 0.5), (1, 2)), ((0.5, 0.0), (0, 1)), ((0.0, 0.5), (0,)), ((2.0, 2.0), (2,))],
)
def test_paths_are_those_that_the_thresholds_leave_open(
    thresholds: tuple[float, float], reachable: tuple[int, ...]
) -> None:
    candidate = CANDIDATE.with_thresholds(thresholds)
    assert reachable_exits(candidate) == reachable
    model = network_model(candidate, WEIGHTS, MEAN, STD, form="if")
    image = network_input(smooth_images(1, 32))
    for k, forced in path_models(candidate, "if", model).items():
        assert run(forced, image)[1].tolist() == [k]
    names = {name.split(".")[0] + "." + name.split(".")[1] for name in written_weights(model) if name[0] == "e"}
    kept = deployed_layers(candidate, "if")
    assert names == {layer.name for layer in kept if layer.kind == "exit_head"}
    assert ("head" in {layer.kind for layer in kept}) == (2 in reachable)


def written_weights(model: bytes) -> set[str]:
    graph = onnx.load_from_string(model).graph
    names = {t.name.split("/")[-1] for g in all_graphs(graph) for t in g.initializer}
    return {n for n in names if n.endswith(".weight")}


def test_plain_form_has_one_path_and_no_exit_heads() -> None:
    assert path_shares(CANDIDATE, "plain", ()) == {2: 1.0}
    kinds = [layer.kind for layer in deployed_layers(CANDIDATE, "plain")]
    assert "exit_head" not in kinds and len(kinds) == len(expand(CANDIDATE)) - 2


def test_shares_must_fit_the_thresholds() -> None:
    candidate = CANDIDATE.with_thresholds((2.0, 0.5))
    assert path_shares(candidate, "if", (0.0, 0.25, 0.75)) == {1: 0.25, 2: 0.75}
    with pytest.raises(UsageError, match=r"25\.0 % of the images leave at exit 0, which its threshold forbids"):
        path_shares(candidate, "if", (0.25, 0.0, 0.75))
    with pytest.raises(UsageError, match=r"expected 3 exit shares \(exits, then the head\), got 2"):
        path_shares(candidate, "if", (0.5, 0.5))
    with pytest.raises(UsageError, match=r"exits\[0\] has no threshold"):
        reachable_exits(CANDIDATE.with_thresholds((None, 0.5)))
