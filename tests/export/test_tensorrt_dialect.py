"""Graphs for TensorRT: what its parser reads, where quantized tensors stand, and that the answers stay the same."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_networks import (
    MEAN,
    PROFILE,
    STD,
    all_nodes,
    network_input,
    random_candidate,
    relative_l2,
    run,
    session,
    small_candidate,
    smooth_images,
)
from onnx import numpy_helper
from test_export_graph import torch_logits

from nas.compress.calibrate import calibrate
from nas.core.errors import RecordError, UsageError
from nas.core.records import Candidate, ConvSpec, Precision, QuantSpec
from nas.core.walk import expand
from nas.devices.board.onnx_facts import onnx_facts
from nas.devices.board.trtexec import effective_precision, is_weak
from nas.devices.portable import portable_model, precision_of
from nas.export.check import tensorrt_problems
from nas.export.dialect import (
    ORT,
    TRT_8_0,
    TRT_8_4,
    TRT_10_13,
    Dialect,
    dialect_for,
    dialect_named,
    target_dialect,
    tensorrt_dialect,
)
from nas.export.forms import exits_form
from nas.export.graph import layer_model, network_model, nominal_quant, random_weights, segment_models, tensors_model
from nas.models.student import Student, folded_weights
from nas.recipe.deployed import deployed_logits
from nas.search.predictor import deployed_form
from nas.space.space import load_space

TENSORRT = (TRT_8_0, TRT_8_4, TRT_10_13)
IMAGES = smooth_images(64, 32)


def wide_candidate(precision: str = "int8") -> Candidate:
    """A network whose convolutions are wide enough for int8, with SE, hard-swish, residuals and two exits."""
    base = small_candidate()
    stem = replace(base.stem, out_channels=16)
    first = replace(base.stages[0].blocks[0], in_channels=16, expanded_channels=16)
    stages = (replace(base.stages[0], blocks=(first,)), *base.stages[1:])
    return replace(base, stem=stem, stages=stages).with_precision(precision)


def calibrated(candidate: Candidate, weights: dict[str, np.ndarray]) -> QuantSpec:
    model, names = tensors_model(candidate, weights, MEAN, STD)
    return calibrate(run, model, names, IMAGES)


def settled(candidate: Candidate, seed: int) -> Student:
    """A student whose batch norm has the statistics of its images, so that its logits differ from image to image."""
    torch.manual_seed(seed)
    student = Student(candidate)
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
        elif isinstance(module, torch.nn.Conv2d) and module.bias is not None:
            module.weight.data.normal_(0, 2 * module.weight[0].numel() ** -0.5)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    with torch.no_grad():
        for _ in range(4):
            student((torch.from_numpy(network_input(IMAGES)) / 255 - mean) / std)
    return student.eval()


def graph_of(dialect: Dialect, candidate: Candidate, form: str = "logits") -> onnx.ModelProto:
    weights = random_weights(candidate, 0)
    data = network_model(candidate, weights, MEAN, STD, quant=nominal_quant(candidate), form=form, dialect=dialect)
    return onnx.load_from_string(data)


@pytest.mark.parametrize("dialect", TENSORRT, ids=lambda d: d.name)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("seed", range(3))
def test_every_graph_is_valid_and_obeys_the_rules_of_the_parser(dialect: Dialect, precision: str, seed: int) -> None:
    candidate = random_candidate(np.random.default_rng(seed)).with_precision(precision)
    for form in ("plain", "if", "logits"):
        model = graph_of(dialect, candidate, form)
        onnx.checker.check_model(model, full_check=True)
        assert tensorrt_problems(model, dialect) == []
    for layer in expand(candidate):
        row = onnx.load_from_string(layer_model(layer, dialect=dialect))
        onnx.checker.check_model(row, full_check=True)
        assert tensorrt_problems(row, dialect) == [], layer.key


@pytest.mark.parametrize("mix", [("bf16",), ("fp32", "bf16", "int8"), ("bf16", "fp16")])
def test_bf16_graphs_are_valid_and_hold_bfloat16_weights(mix: tuple[Precision, ...]) -> None:
    base = wide_candidate()
    candidate = base.with_precision([mix[i % len(mix)] for i in range(len(base.precisions))])
    for form in ("plain", "if", "logits"):
        model = graph_of(TRT_10_13, candidate, form)
        onnx.checker.check_model(model, full_check=True)
        assert tensorrt_problems(model, TRT_10_13) == []
        assert model.opset_import[0].version == 22  # the first whose convolutions may be bfloat16
    assert onnx_facts(graph_of(TRT_10_13, candidate).SerializeToString()).carries("bf16")
    for layer in expand(candidate):
        row = onnx.load_from_string(layer_model(layer, dialect=TRT_10_13))
        onnx.checker.check_model(row, full_check=True)
        assert tensorrt_problems(row, TRT_10_13) == [], layer.key
    with pytest.raises(UsageError, match=r"precision 'bf16' does not exist in dialect 'tensorrt-8\.4'"):
        graph_of(TRT_8_4, base.with_precision("bf16"))


def test_answers_in_bf16_are_those_of_weights_and_tensors_rounded_to_it() -> None:
    candidate = wide_candidate("fp32")
    student = settled(candidate, 0)
    weights = folded_weights(student)

    def answers(precision: Precision) -> np.ndarray:
        network = candidate.with_precision(precision)
        return deployed_logits(network, weights, None, MEAN, STD, IMAGES, TRT_10_13, run)

    full = answers("fp32")
    off = {p: relative_l2(full, answers(p)) for p in ("fp16", "bf16")}
    # 8 bits of mantissa against 11: about eight times coarser
    assert 3 * off["fp16"] < off["bf16"] < 0.05


def test_only_a_strongly_typed_graph_or_int8_stands_beside_fp32() -> None:
    assert ORT.mixable == ("fp32", "int8")
    assert TRT_8_4.mixable == ("fp16", "int8")
    assert TRT_10_13.mixable == ("fp32", "fp16", "bf16", "int8")


def test_the_rules_of_the_parser_find_the_form_of_another_runtime() -> None:
    problems = "\n".join(tensorrt_problems(graph_of(ORT, wide_candidate()), TRT_8_0))
    assert "opset 17; the parser of tensorrt-8.0 reads 13" in problems
    assert "zero point is uint8 [], not int8 zeros" in problems
    assert tensorrt_problems(graph_of(TRT_10_13, wide_candidate()), TRT_8_4)[0].startswith("opset 19")
    model = graph_of(TRT_8_4, wide_candidate())
    node = next(n for n in model.graph.node if n.op_type == "QuantizeLinear")
    del node.input[2]
    node.name = ""
    found = tensorrt_problems(model, TRT_8_4)
    assert any("no zero point" in line for line in found) and any("names must be there" in line for line in found)


@pytest.mark.parametrize("dialect", TENSORRT, ids=lambda d: d.name)
def test_pairs_stand_before_convolutions_and_on_skips_only_one_for_each_tensor(dialect: Dialect) -> None:
    candidate = wide_candidate()
    nodes = all_nodes(graph_of(dialect, candidate).graph)
    made_by = {output: node for node in nodes for output in node.output}
    quantized = [n for n in nodes if n.op_type == "QuantizeLinear" and not n.name.split("/")[0].endswith("weight.q")]
    assert len({n.input[0] for n in quantized}) == len(quantized), "a tensor is quantized twice"
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in quantized:
        (dequantize,) = readers[node.output[0]]
        assert {r.op_type for r in readers[dequantize.output[0]]} <= {"Conv", "Add"}
    sums = [n for n in nodes if n.op_type == "Add" and n.name.split("/")[0].endswith(".sum")]
    assert len(sums) == 2
    for node in sums:
        skip, branch = (made_by[name].op_type for name in node.input)
        assert (skip, branch) == ("DequantizeLinear", "Conv"), "only the skip input of a residual sum has a pair"
    # the skip and the expansion read the same pair
    assert sorted(r.op_type for r in readers[sums[0].input[0]]) == ["Add", "Conv"]


def test_which_convolutions_are_computed_in_int8() -> None:
    candidate = wide_candidate()
    model = graph_of(TRT_8_4, candidate)
    made_by = {output: node for node in model.graph.node for output in node.output}
    integer = set()
    for n in model.graph.node:
        if n.op_type == "Conv" and n.input[1] in made_by:
            integer.add(n.name.removesuffix("/Conv"))
            assert made_by[n.input[0]].op_type == "DequantizeLinear"
    everything = {f"{layer.name}.{spec.name}" for layer in expand(candidate) for spec in layer.convolutions}
    left = {name.rsplit(".", 1)[1] for name in everything - integer}
    assert left == {"se_reduce", "se_expand", "classifier"}
    assert {"stem.conv", "stages.1.0.depthwise", "head.hidden"} <= integer


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (ConvSpec("expand", 16, 64, 1, 1, 1, 8, "relu", True), True),
        (ConvSpec("project", 12, 24, 1, 1, 1, 8, "linear", True), True),
        (ConvSpec("project", 8, 8, 1, 1, 1, 8, "linear", True), False),
        (ConvSpec("project", 12, 20, 1, 1, 1, 8, "linear", True), False),
        (ConvSpec("depthwise", 24, 24, 3, 1, 24, 8, "relu", True), True),
        (ConvSpec("depthwise", 20, 20, 3, 1, 20, 8, "relu", True), False),
        (ConvSpec("depthwise", 24, 24, 1, 1, 24, 8, "relu", True), False),
        (ConvSpec("classifier", 64, 1000, 1, 1, 1, 1, "linear", False), False),
    ],
)
def test_the_rules_for_small_and_grouped_convolutions(spec: ConvSpec, expected: bool) -> None:
    block = next(layer for layer in expand(wide_candidate()) if layer.kind == "inverted_residual")
    assert TRT_8_4.is_integer(block, spec) is expected
    assert ORT.is_integer(block, spec)


def test_a_stem_of_three_channels_may_be_integer_where_a_block_may_not() -> None:
    stem, block = (next(x for x in expand(wide_candidate()) if x.kind == k) for k in ("stem", "inverted_residual"))
    spec = ConvSpec("conv", 3, 8, 3, 2, 1, 16, "relu", True)
    assert (TRT_8_4.is_integer(stem, spec), TRT_8_4.is_integer(block, spec)) == (True, False)


def test_weights_scales_and_biases_have_the_form_that_each_version_reads() -> None:
    for dialect, weight, scale, bias in (
        (TRT_8_0, np.float32, np.float32, np.float32),
        (TRT_8_4, np.float32, np.float32, np.float32),
        (TRT_10_13, np.int8, np.float16, np.float16),
    ):
        graph = graph_of(dialect, wide_candidate()).graph
        held = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        name = "stages.1.0.project"
        found = held[f"{name}.weight" if weight == np.float32 else f"{name}.weight.q"]
        assert found.dtype == weight and held[f"{name}.weight.scale"].dtype == scale, dialect.name
        assert held[f"{name}.weight.scale"].shape == (found.shape[0],) and held[f"{name}.bias"].dtype == bias
        assert all(values.dtype != np.uint8 for values in held.values())


def test_hard_swish_is_two_operators_where_the_parser_has_no_hard_swish() -> None:
    ops = {d.name: {n.op_type for n in graph_of(d, wide_candidate("fp16")).graph.node} for d in TENSORRT}
    assert "HardSwish" not in ops["tensorrt-8.0"] and "HardSwish" in ops["tensorrt-8.4"] & ops["tensorrt-10.13"]


@pytest.mark.parametrize("dialect", TENSORRT, ids=lambda d: d.name)
@pytest.mark.parametrize(("precision", "least_cosine"), [("fp32", 0.999999), ("fp16", 0.99999), ("int8", 0.985)])
def test_answers_agree_with_the_torch_student(dialect: Dialect, precision: str, least_cosine: float) -> None:
    candidate = wide_candidate("fp32")
    student = settled(candidate, 3)
    weights = folded_weights(student)
    expected = torch_logits(student, IMAGES)
    chosen = candidate.with_precision(precision)
    model = network_model(
        chosen,
        weights,
        MEAN,
        STD,
        quant=calibrated(candidate, weights) if precision == "int8" else None,
        form="logits",
        batch=None,
        dialect=dialect,
    )
    # As written: without VNNI the 8-bit sums of ONNX Runtime's own kernels saturate, which says nothing about TensorRT.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    got = np.stack(onnxruntime.InferenceSession(model, options).run(None, {"image": network_input(IMAGES)}))
    assert got.dtype == np.float32
    centred = [x - x.mean(1, keepdims=True) for x in (expected.astype(np.float64), got.astype(np.float64))]
    for a, b in zip(*centred, strict=True):  # what tells images apart, not the logits' common part
        cosine = float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
        assert cosine >= least_cosine, f"{dialect.name} {precision}: cosine {cosine}"
    agreement = (expected.argmax(2) == got.argmax(2)).mean()
    assert agreement >= (0.9 if precision == "int8" else 0.98), f"top-1 agreement {agreement}"


def test_half_floats_are_in_the_graph_only_where_the_runtime_is_strongly_typed() -> None:
    strong, weak = (graph_of(d, wide_candidate("fp16")).graph for d in (TRT_10_13, TRT_8_4))
    kinds = [{t.data_type for t in g.initializer if t.name.endswith(("weight", "bias"))} for g in (strong, weak)]
    assert kinds == [{onnx.TensorProto.FLOAT16}, {onnx.TensorProto.FLOAT}]
    casts = [n for n in strong.node if n.op_type == "Cast"]
    # once behind the normalised image, once at each of the three outputs
    assert len(casts) == 4 and not any(n.op_type == "Cast" for n in weak.node)


def test_mixed_precisions_meet_through_one_cast() -> None:
    candidate = wide_candidate().with_precision(("fp32", "fp16", "int8", "fp32", "fp16"))
    weights = random_weights(candidate, 5)
    quant = calibrated(candidate, weights)
    model = network_model(candidate, weights, MEAN, STD, quant=quant, form="plain", batch=None, dialect=TRT_10_13)
    proto = onnx.load_from_string(model)
    onnx.checker.check_model(proto, full_check=True)
    assert tensorrt_problems(proto, TRT_10_13) == []
    plain = network_model(candidate.with_precision("fp32"), weights, MEAN, STD, form="plain", batch=None)
    images = network_input(IMAGES[:16])
    assert relative_l2(run(plain, images)[0], run(model, images)[0]) < 0.1


def test_weights_too_large_for_fp16_are_named() -> None:
    candidate = wide_candidate("fp16")
    weights = random_weights(candidate, 0)
    weights["stages.0.0.project.weight"][0, 0, 0, 0] = 1e6
    with pytest.raises(RecordError, match=r"stages\.0\.0\.project\.weight: holds 1e\+06, too large for fp16"):
        network_model(candidate, weights, MEAN, STD, dialect=TRT_10_13)


def test_scales_in_fp16_never_clip_what_they_scale() -> None:
    values = np.array([1e-9, 1e-5, 0.0123456, 3.14159, 500.0])
    half = TRT_10_13.scales(values)
    assert half.dtype == np.float16 and (half.astype(np.float64) >= values).all() and (half > 0).all()
    assert (half[2:].astype(np.float64) <= values[2:] * 1.001).all()


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("8.0.1", "tensorrt-8.0"),
        ("8.2.1.8", "tensorrt-8.0"),
        ("8.4.1", "tensorrt-8.4"),
        ("8.5.2-1+cuda11.4", "tensorrt-8.4"),
        ("10.3.0.30", "tensorrt-8.4"),
        ("10.13.3.9", "tensorrt-10.13"),
        ("11.4.1", "tensorrt-10.13"),
    ],
)
def test_the_version_of_the_runtime_decides_the_dialect(version: str, name: str) -> None:
    assert tensorrt_dialect(version).name == name
    profile = replace(PROFILE, runtime="TensorRT", runtime_version=version)
    assert dialect_for(profile).name == name and dialect_for(PROFILE) is ORT


def test_an_unknown_version_is_refused_with_what_is_allowed() -> None:
    for version in ("7.1.3", "", "unknown"):
        with pytest.raises(UsageError, match=r"8\.0 and newer, such as 8\.2 or 10\.3"):
            tensorrt_dialect(version)


def run_chain(segments: list, images: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Logits and exits of a chain by the host gate, image by image, as a deployed program does it."""
    live = [session(s.model) for s in segments]
    logits, exits = [], []
    for image in images:
        features = image[None]
        for s, runtime in zip(segments, live, strict=True):
            outputs = runtime.run(None, {s.features_in: features})
            if s.threshold is None or outputs[1][0] >= s.threshold:
                break
            features = outputs[2]
        logits.append(outputs[0][0])
        exits.append(s.exit_index)
    return np.stack(logits), exits


@pytest.mark.parametrize("mix", [("bf16",), ("fp16", "bf16")])
def test_what_the_host_carries_between_two_segments_is_of_a_type_that_numpy_has(mix: tuple[Precision, ...]) -> None:
    base = wide_candidate("fp32").with_thresholds((0.3, 0.4))
    candidate = base.with_precision([mix[i % len(mix)] for i in range(len(base.precisions))])
    weights = folded_weights(settled(base, 3))
    chain = [onnx.load_from_string(s.model) for s in segment_models(candidate, weights, MEAN, STD, dialect=TRT_10_13)]
    for model in chain:
        onnx.checker.check_model(model, full_check=True)
        assert tensorrt_problems(model, TRT_10_13) == []
    kinds = {v.type.tensor_type.elem_type for m in chain for v in (*m.graph.input, *m.graph.output)}
    assert kinds <= {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}, "the feature map travels as bfloat16"


CHAINS = [(0.2, 0.25), (0.3, 0.4), (0.5, 0.2), (2.0, 0.3), (0.3, 2.0), (2.0, 2.0), (0.3, 0.0), (0.0, 0.5), (1.0, 1.0)]


@pytest.mark.parametrize(
    ("dialect", "precision"),
    [pytest.param(d, p, id=f"{d.name}-{p}") for d in (ORT, *TENSORRT) for p in d.precisions],
)
def test_a_chain_of_segments_answers_as_the_if_form_on_every_path(dialect: Dialect, precision: Precision) -> None:
    base = wide_candidate("fp32")
    weights = folded_weights(settled(base, 3))
    quant = calibrated(base, weights)
    images = network_input(IMAGES[:24])
    if precision == "bf16":  # ONNX Runtime has no such convolutions
        dialect = replace(dialect, rounds_bf16=True)
    taken = set()
    for thresholds in CHAINS:
        candidate = base.with_thresholds(thresholds).with_precision(precision)
        expected, expected_exits = run(
            network_model(candidate, weights, MEAN, STD, quant=quant, form="if", dialect=dialect), images
        )
        segments = segment_models(candidate, weights, MEAN, STD, quant=quant, dialect=dialect)
        logits, exits = run_chain(segments, images)
        assert exits == expected_exits.tolist(), thresholds
        # in half floats the runtime computes in float32 inside and rounds the feature map at the border
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=5e-3 if dialect.half_floats else 1e-4)
        taken |= {(thresholds, k) for k in exits}
    assert {k for _, k in taken} == {0, 1, 2}
    assert {(0.3, 0.4), (0.5, 0.2)} & {t for t, k in taken if k == 0} and ((2.0, 2.0), 2) in taken


def test_a_chain_holds_only_the_exits_that_an_image_can_take() -> None:
    candidate = wide_candidate("int8")
    weights, quant = random_weights(candidate, 0), nominal_quant(candidate)

    def places(thresholds: tuple[float, float]) -> list[tuple[int, float | None]]:
        chain = segment_models(candidate.with_thresholds(thresholds), weights, MEAN, STD, quant=quant, dialect=TRT_8_4)
        return [(s.exit_index, s.threshold) for s in chain]

    assert places((0.4, 0.6)) == [(0, 0.4), (1, 0.6), (2, None)]
    assert places((2.0, 0.6)) == [(1, 0.6), (2, None)]
    assert places((2.0, 2.0)) == [(2, None)]
    assert places((0.4, 0.0)) == [(0, 0.4), (1, None)]
    with pytest.raises(UsageError, match=r"exits\[0\] \(after stage 0\) has no threshold"):
        segment_models(candidate.with_thresholds((None, None)), weights, MEAN, STD, quant=quant)


@pytest.mark.parametrize("dialect", TENSORRT, ids=lambda d: d.name)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_segments_obey_the_rules_of_the_parser_and_fit_together(dialect: Dialect, precision: str) -> None:
    candidate = wide_candidate(precision)
    chain = segment_models(
        candidate, random_weights(candidate, 0), MEAN, STD, quant=nominal_quant(candidate), dialect=dialect
    )
    before: onnx.ValueInfoProto | None = None
    for segment in chain:
        model = onnx.load_from_string(segment.model)
        onnx.checker.check_model(model, full_check=True)
        assert tensorrt_problems(model, dialect) == []
        assert [entry.name for entry in model.graph.input] == [segment.features_in]
        if before is not None:
            assert model.graph.input[0].type == before.type, "the feature map changes its type or shape on the way"
        names = [entry.name for entry in model.graph.output]
        assert names == ["logits", *(["confidence", segment.features_out] if segment.features_out else [])]
        before = model.graph.output[-1]
    kind = onnx.load_from_string(chain[1].model).graph.input[0].type.tensor_type.elem_type
    assert kind == (onnx.TensorProto.FLOAT16 if dialect.half_floats else onnx.TensorProto.FLOAT)


@pytest.mark.parametrize("mix", [("bf16",), ("bf16", "fp16"), ("fp16", "bf16"), ("bf16", "int8"), ("bf16", "fp32")])
def test_feature_maps_between_segments_have_a_type_that_numpy_has(mix: tuple[Precision, ...]) -> None:
    """The host passes them on: `infer.py` and devices read them with NumPy, which has no bfloat16."""
    base = wide_candidate()
    candidate = base.with_precision([mix[i % len(mix)] for i in range(len(base.precisions))])
    weights, quant = random_weights(candidate, 0), nominal_quant(candidate)
    chain = segment_models(candidate, weights, MEAN, STD, quant=quant, dialect=TRT_10_13)
    left = None
    for segment in chain:
        onnx.checker.check_model(onnx.load_from_string(segment.model), full_check=True)
        assert tensorrt_problems(onnx.load_from_string(segment.model), TRT_10_13) == []
        facts = onnx_facts(segment.model)
        (entered,) = facts.inputs
        assert left is None or (entered["dtype"], entered["shape"]) == (left["dtype"], left["shape"])
        assert {np.dtype(e["dtype"]).name for e in (entered, *facts.outputs)} <= {"float32", "float16"}
        left = facts.outputs[-1]
    assert any(onnx_facts(s.model).carries("bf16") for s in chain), "inside it stays bfloat16"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_model_says_in_which_precision_it_is_to_be_built(precision: str) -> None:
    """A float32 graph for a weakly typed builder would otherwise become an fp32 engine when a device runs it."""
    candidate = wide_candidate(precision)
    for dialect in TENSORRT:
        models = [graph_of(dialect, candidate).SerializeToString(), layer_model(expand(candidate)[1], dialect=dialect)]
        models += [
            s.model
            for s in segment_models(
                candidate, random_weights(candidate, 0), MEAN, STD, quant=nominal_quant(candidate), dialect=dialect
            )
        ]
        assert {precision_of(portable_model(model)) for model in models} == {precision}
    assert precision_of(b"no model") == "fp32"
    foreign = onnx.load_from_string(layer_model(expand(candidate)[1], dialect=TRT_8_4))
    foreign.producer_name = "somebody else"
    assert precision_of(foreign.SerializeToString()) == "fp32"
    assert precision_of(graph_of(ORT, wide_candidate("int8")).SerializeToString()) == "fp32"


# Versions of TensorRT that read a dialect.
VERSIONS = [(TRT_8_0, (8, 2, 1)), (TRT_8_4, (8, 5, 2)), (TRT_8_4, (10, 3, 0)), (TRT_10_13, (10, 13, 3))]
VERSIONS.append((TRT_10_13, (11, 4, 0)))
BY_VERSION = pytest.mark.parametrize(
    ("dialect", "version"), [pytest.param(d, v, id=".".join(map(str, v))) for d, v in VERSIONS]
)


def built_in(model: bytes, version: tuple[int, int, int], asked: str) -> str:
    """What a file is built in after its way to a board; strong typing takes it from the file, weak from flags."""
    facts = onnx_facts(portable_model(model))
    precision = effective_precision(facts, asked)
    is_strong = version >= (10, 13, 0)
    assert is_weak(version, facts, precision) is not is_strong
    return precision


@BY_VERSION
def test_every_row_of_the_space_for_a_jetson_is_built_by_every_version(
    dialect: Dialect, version: tuple[int, int, int]
) -> None:
    """The file of an int8 head has no quantized tensor: it is fp16, as the head is inside an int8 network."""
    layers = load_space(Path(__file__).parents[2] / "search_spaces" / "jetson-64.yaml", 10).layers()
    heads = 0
    for layer in layers:
        model = layer_model(layer, dialect=dialect)
        is_float = layer.precision == "int8" and not onnx_facts(model).is_quantized
        assert built_in(model, version, layer.precision) == ("fp16" if is_float else layer.precision), layer.key
        assert not is_float or layer.kind in ("head", "exit_head")
        heads += is_float
    assert heads >= 2, "an int8 head and int8 exit heads are what this test is about"


@BY_VERSION
@pytest.mark.parametrize("form", ["plain", "chain"])
def test_every_part_of_a_mixed_network_is_built_by_every_version(
    dialect: Dialect, version: tuple[int, int, int], form: str
) -> None:
    base = wide_candidate()
    weights, names = random_weights(base, 0), dialect.mixable
    found = set()
    for mix in product(names, repeat=2):
        candidate = base.with_precision([*mix[:1] * 2, *mix[1:] * (len(base.precisions) - 2)])
        quant = nominal_quant(candidate)
        if form == "plain":
            models = [network_model(candidate, weights, MEAN, STD, quant=quant, dialect=dialect)]
        else:
            models = [s.model for s in segment_models(candidate, weights, MEAN, STD, quant=quant, dialect=dialect)]
        for model in models:
            precision = built_in(model, version, candidate.precision_label)
            assert precision in {"mixed", "fp16", *mix}
            assert onnx_facts(model).is_quantized or precision != "int8"
            found.add(precision)
    assert found >= set(names), "parts in one precision are built in that one"


def test_what_travels_to_a_board_still_obeys_the_parser() -> None:
    candidate = wide_candidate("int8")
    for dialect in TENSORRT:
        data = portable_model(graph_of(dialect, candidate, "plain").SerializeToString())
        proto = onnx.load_from_string(data)
        onnx.checker.check_model(proto, full_check=True)
        assert proto.opset_import[0].version <= dialect.opset
        assert tensorrt_problems(proto, replace(dialect, opset=proto.opset_import[0].version)) == []


def test_scores_of_a_board_are_those_of_its_own_graphs() -> None:
    candidate = wide_candidate("fp32")
    weights = folded_weights(settled(candidate, 3))
    quant = calibrated(candidate, weights)

    def logits(precision: str, dialect: Dialect) -> np.ndarray:
        return deployed_logits(
            candidate.with_precision(precision), weights, quant, MEAN, STD, IMAGES[:16], dialect, run
        )

    exact = logits("fp32", TRT_8_4)
    assert 0 < relative_l2(exact, logits("fp16", TRT_8_4)) < 0.01, "half floats must show in the score"
    assert relative_l2(exact, logits("int8", TRT_8_4)) > relative_l2(exact, logits("fp16", TRT_8_4))
    assert relative_l2(logits("int8", ORT), logits("int8", TRT_8_4)) > 0.001, "the placement differs"


def test_networks_with_exits_are_measured_in_the_form_that_a_runtime_deploys() -> None:
    candidate = wide_candidate()
    assert (deployed_form(candidate), deployed_form(candidate, TRT_8_4)) == ("if", "logits")
    plain = replace(candidate, exits=())
    assert (deployed_form(plain), deployed_form(plain, TRT_8_4)) == ("plain", "plain")
    assert [exits_form(d) for d in (ORT, *TENSORRT)] == ["if", "segments", "segments", "segments"]


@pytest.mark.parametrize(
    ("target", "name"), [("ort", "ort"), ("tensorrt:8.2", "tensorrt-8.0"), ("tensorrt:10.3", "tensorrt-8.4")]
)
def test_a_target_is_named_by_runtime_and_version(target: str, name: str) -> None:
    assert target_dialect(target).name == name and dialect_named(name) is target_dialect(target)


@pytest.mark.parametrize("target", ["tensorrt", "trt:8", "", "tensorrt:"])
def test_an_unknown_target_is_refused_with_examples(target: str) -> None:
    with pytest.raises(UsageError, match=r"tensorrt:8\.2 \(JetPack 4\.6\)|8\.0 and newer"):
        target_dialect(target)
