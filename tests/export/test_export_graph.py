import numpy as np
import onnx
import pytest
import torch
from export_networks import (
    MEAN,
    STD,
    all_nodes,
    network_input,
    op_counts,
    optimised_counts,
    random_candidate,
    relative_l2,
    run,
    session,
    small_candidate,
    smooth_images,
)

from nas.core.errors import RecordError, UsageError
from nas.core.records import Candidate, LayerSpec
from nas.core.walk import expand
from nas.export.dialect import ORT
from nas.export.graph import (
    forced_exit,
    layer_model,
    network_model,
    nominal_quant,
    random_weights,
    tensors_model,
)
from nas.models.student import Student, folded_weights


def trained(candidate: Candidate, seed: int) -> Student:
    """A student whose batch norm has the uneven statistics of a trained network."""
    torch.manual_seed(seed)
    student = Student(candidate).eval()
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 3.0)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
        elif isinstance(module, torch.nn.Conv2d) and module.bias is not None:
            module.weight.data.normal_(0, module.weight[0].numel() ** -0.5)
            module.bias.data.normal_(0, 0.1)
    return student


def torch_logits(student: Student, images: np.ndarray) -> np.ndarray:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    with torch.no_grad():
        outputs = student((torch.from_numpy(network_input(images)) / 255 - mean) / std)
    return torch.stack(outputs).numpy()


@pytest.mark.parametrize("seed", range(6))
def test_float_network_equals_the_torch_student(seed: int) -> None:
    candidate = random_candidate(np.random.default_rng(seed))
    student = trained(candidate, seed)
    images = smooth_images(8, candidate.resolution, seed)
    model = network_model(candidate, folded_weights(student), MEAN, STD, form="logits", batch=None)
    expected = torch_logits(student, images)
    for reference, logits in zip(expected, run(model, network_input(images)), strict=True):
        assert relative_l2(reference, logits) < 1e-4


@pytest.mark.parametrize("seed", range(12))
def test_macs_and_weights_of_expand_are_those_of_the_onnx_graph(seed: int) -> None:
    candidate = random_candidate(np.random.default_rng(100 + seed))
    specs = {f"{layer.name}.{c.name}": c for layer in expand(candidate) for c in layer.convolutions}
    model = onnx.load_from_string(network_model(candidate, random_weights(candidate, 0), MEAN, STD, form="logits"))
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    sizes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in inferred.value_info}
    weights = {t.name: list(t.dims) for t in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == len(specs)
    macs = 0
    for node in convolutions:
        kernel = weights[node.input[1]]
        assert int(np.prod(kernel)) == specs[node.input[1].removesuffix(".weight")].weights
        macs += int(np.prod(kernel)) * sizes[node.output[0]][2] * sizes[node.output[0]][3]
    assert macs == sum(layer.macs for layer in expand(candidate))
    learnable = sum(int(np.prod(d)) for name, d in weights.items() if name.endswith((".weight", ".bias")))
    folded = sum(c.out_channels for c in specs.values() if c.batch_norm)  # scale and shift became one bias
    assert learnable == sum(layer.params for layer in expand(candidate)) - folded


@pytest.mark.parametrize("form", ["plain", "logits", "if"])
@pytest.mark.parametrize("seed", range(8))
def test_every_int8_convolution_is_an_integer_one_after_optimisation(tmp_path, form: str, seed: int) -> None:
    rng = np.random.default_rng(200 + seed)
    candidate = (random_candidate(rng) if seed else small_candidate()).with_precision("int8")
    model = network_model(candidate, random_weights(candidate, 1), MEAN, STD, quant=nominal_quant(candidate), form=form)
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    counts = optimised_counts(model, tmp_path)
    layers = [layer for layer in expand(candidate) if form != "plain" or layer.kind != "exit_head"]
    assert counts["QLinearConv"] == sum(len(layer.convolutions) for layer in layers)
    assert counts["Conv"] == counts["FusedConv"] == 0


def test_mixed_precision_keeps_integer_convolutions_to_int8_stages(tmp_path) -> None:
    names = ("fp32", "fp32", "int8", "fp32", "int8")
    candidate = small_candidate().with_precision(names)
    model = network_model(candidate, random_weights(candidate, 0), MEAN, STD, quant=nominal_quant(candidate))
    counts = optimised_counts(model, tmp_path)
    layers = [layer for layer in expand(candidate) if layer.kind != "exit_head"]
    assert counts["QLinearConv"] == sum(len(x.convolutions) for x in layers if x.precision == "int8")
    assert counts["Conv"] == sum(len(x.convolutions) for x in layers if x.precision == "fp32")
    written = op_counts(onnx.load_from_string(model).graph)
    # into stage 1 and into the head; all other pairs are behind tensors of int8 layers
    names_q = [n.output[0] for n in onnx.load_from_string(model).graph.node if n.op_type == "QuantizeLinear"]
    assert "stages.0.0.project.q" in names_q and "stages.2.1.sum.q" in names_q
    assert not any(n.startswith(("image", "stem", "stages.2.0")) for n in names_q)
    assert written["QuantizeLinear"] == len(set(names_q))


def layers_of_all_kinds() -> list[LayerSpec]:
    return [layer for p in ("fp32", "int8") for layer in expand(small_candidate(p))]


@pytest.mark.parametrize("layer", layers_of_all_kinds(), ids=lambda layer: f"{layer.name}-{layer.precision}")
def test_row_has_the_boundary_of_its_precision_and_runs(tmp_path, layer: LayerSpec) -> None:
    model = layer_model(layer)
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    live = session(model)
    entry, result = live.get_inputs()[0], live.get_outputs()[0]
    quantized = layer.precision == "int8"
    assert entry.shape == [1, layer.in_channels, layer.in_size, layer.in_size]
    assert entry.type == ("tensor(uint8)" if quantized and layer.kind != "stem" else "tensor(float)")
    is_head = layer.kind in ("head", "exit_head")
    assert result.type == ("tensor(uint8)" if quantized and not is_head else "tensor(float)")
    output = live.run(None, {entry.name: np.full(entry.shape, 7, np.uint8 if "uint8" in entry.type else np.float32)})[0]
    side = (layer.out_size, layer.out_size)
    assert output.shape == ((1, layer.out_channels) if is_head else (1, layer.out_channels, *side))
    counts = optimised_counts(model, tmp_path)
    assert counts["QLinearConv" if quantized else "Conv"] == len(layer.convolutions)
    assert counts["Conv" if quantized else "QLinearConv"] == 0


def test_rows_of_a_network_are_its_own_nodes() -> None:
    candidate = small_candidate("int8")
    weights = random_weights(candidate, 0)
    written = op_counts(
        onnx.load_from_string(
            network_model(candidate, weights, MEAN, STD, quant=nominal_quant(candidate), form="logits")
        ).graph
    )
    rows = sum(
        (op_counts(onnx.load_from_string(layer_model(x)).graph) for x in expand(candidate)), start=type(written)()
    )
    # a row reads its own quantized input; inside the network neighbours share one DequantizeLinear
    shared = len(candidate.exits)
    rows["DequantizeLinear"] -= shared
    assert rows == written


def test_normalisation_stands_inside_the_graph() -> None:
    candidate = small_candidate()
    model = onnx.load_from_string(network_model(candidate, random_weights(candidate, 0), MEAN, STD))
    assert [node.op_type for node in model.graph.node[:3]] == ["Mul", "Add", "Conv"]
    assert model.graph.input[0].name == "image"
    assert model.opset_import[0].version == 17 and model.ir_version == 9


def test_node_and_tensor_names_are_unique_over_all_branches() -> None:
    candidate = small_candidate("int8")
    model = network_model(candidate, random_weights(candidate, 0), MEAN, STD, quant=nominal_quant(candidate), form="if")
    nodes = all_nodes(onnx.load_from_string(model).graph)
    names, outputs = [n.name for n in nodes], [o for n in nodes for o in n.output]
    assert len(set(names)) == len(names) and len(set(outputs)) == len(outputs)
    assert any("stages.1.0.depthwise/Conv" in name for name in names)


def test_equal_inputs_give_equal_bytes() -> None:
    candidate = small_candidate("int8")
    models = {
        network_model(candidate, random_weights(candidate, 3), MEAN, STD, quant=nominal_quant(candidate), form="if")
        for _ in range(2)
    }
    assert len(models) == 1


class TestIf:
    def test_gives_the_logits_of_the_exit_that_the_thresholds_choose(self) -> None:
        candidate = small_candidate()
        student = trained(candidate, 0)
        images = smooth_images(24, 32)
        logits = torch_logits(student, images)
        e = np.exp(logits - logits.max(-1, keepdims=True))
        confidence = (e / e.sum(-1, keepdims=True)).max(-1)
        first = float(np.median(confidence[0])) + 1e-4
        rest = np.sort(confidence[1][confidence[0] < first])
        thresholds = (first, float(rest[len(rest) // 2 - 1 : len(rest) // 2 + 1].mean()))
        candidate = candidate.with_thresholds(thresholds)
        model = network_model(candidate, folded_weights(student), MEAN, STD, form="if")
        out, index = run(model, network_input(images))
        expected = np.where(confidence[0] >= thresholds[0], 0, np.where(confidence[1] >= thresholds[1], 1, 2))
        assert set(expected.tolist()) == {0, 1, 2}
        assert index.dtype == np.int64 and index.tolist() == expected.tolist()
        assert relative_l2(logits[expected, np.arange(24)], out) < 1e-4

    def test_thresholds_are_inputs_with_defaults(self) -> None:
        candidate = small_candidate(thresholds=(0.9, 0.25))
        live = session(network_model(candidate, random_weights(candidate, 0), MEAN, STD, form="if"))
        assert [i.name for i in live.get_inputs()] == ["image"]
        assert [i.name for i in live.get_overridable_initializers()] == ["threshold_0", "threshold_1"]
        image = network_input(smooth_images(1, 32))
        for first, second, expected in ((0.0, 0.0, 0), (2.0, 0.0, 1), (2.0, 2.0, 2)):
            feeds = {"image": image, "threshold_0": np.array(first, "f"), "threshold_1": np.array(second, "f")}
            assert int(live.run(["exit_index"], feeds)[0]) == expected

    @pytest.mark.parametrize("precision", ["fp32", "int8"])
    def test_forced_exit_times_each_exit_of_the_same_graph(self, precision: str) -> None:
        candidate = small_candidate(precision)
        weights, quant = random_weights(candidate, 0), nominal_quant(candidate)
        model = network_model(candidate, weights, MEAN, STD, quant=quant, form="if")
        image = network_input(smooth_images(1, 32))
        every = run(network_model(candidate, weights, MEAN, STD, quant=quant, form="logits"), image)
        for k in range(3):
            forced = forced_exit(model, k)
            assert len(forced) == len(model)
            logits, index = run(forced, image)
            assert index.tolist() == [k]
            np.testing.assert_allclose(logits, every[k], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("precision", ["fp32", "int8"])
    def test_tail_brings_its_own_weights_into_the_branch(self, precision: str) -> None:
        candidate = small_candidate(precision)
        model = network_model(
            candidate, random_weights(candidate, 0), MEAN, STD, quant=nominal_quant(candidate), form="if"
        )
        graph = onnx.load_from_string(model).graph
        depth = 0
        while True:
            gate = next((n for n in graph.node if n.op_type == "If"), None)
            if gate is None:
                break
            depth += 1
            graph = next(a.g for a in gate.attribute if a.name == "else_branch")
            own = {t.name for t in graph.initializer} | {o for n in graph.node for o in n.output}
            foreign = {i for n in graph.node for i in n.input} - own
            before = candidate.exits[depth - 1].after_stage
            last = "sum" if before else "project"
            block = len(candidate.stages[before].blocks) - 1
            prefix = f"after_{depth - 2}/" if depth > 1 else ""
            tensor = f"{prefix}stages.{before}.{block}.{last}" + (".q" if precision == "int8" else "")
            assert foreign - {f"threshold_{k}" for k in range(2)} == {tensor}
        assert depth == 2

    def test_exit_that_nothing_takes_is_left_out(self) -> None:
        candidate = small_candidate(thresholds=(2.0, 0.5))
        model = network_model(candidate, random_weights(candidate, 0), MEAN, STD, form="if")
        assert not any("exits.0" in n.name for n in all_nodes(onnx.load_from_string(model).graph))
        assert [i.name for i in session(model).get_overridable_initializers()] == ["threshold_1"]
        image = network_input(smooth_images(1, 32))
        assert run(forced_exit(model, 1), image)[1].tolist() == [1]

    def test_network_ends_at_an_exit_that_everything_takes(self) -> None:
        candidate = small_candidate(thresholds=(0.7, 0.0))
        weights = random_weights(candidate, 0)
        model = network_model(candidate, weights, MEAN, STD, form="if")
        nodes = all_nodes(onnx.load_from_string(model).graph)
        assert not any("stages.2" in n.name or n.name.startswith("head") for n in nodes)
        image = network_input(smooth_images(1, 32))
        logits, index = run(forced_exit(model, 1), image)
        assert index.tolist() == [1]
        np.testing.assert_allclose(logits, run(network_model(candidate, weights, MEAN, STD, form="logits"), image)[1])

    def test_missing_threshold_is_named(self) -> None:
        candidate = small_candidate(thresholds=(0.5, None))
        with pytest.raises(UsageError, match=r"exits\[1\] \(after stage 1\) has no threshold.*with_thresholds"):
            network_model(candidate, random_weights(candidate, 0), MEAN, STD, form="if")

    def test_decides_for_one_image_only(self) -> None:
        candidate = small_candidate()
        with pytest.raises(UsageError, match="batch must be 1, got None"):
            network_model(candidate, random_weights(candidate, 0), MEAN, STD, form="if", batch=None)


class TestTensorsModel:
    def test_reports_the_range_of_each_image_in_every_tensor_that_int8_needs(self) -> None:
        candidate = small_candidate()
        model, names = tensors_model(candidate, random_weights(candidate, 0), MEAN, STD)
        images = smooth_images(5, 32)
        lo, hi = run(model, network_input(images))
        assert lo.shape == hi.shape == (5, len(names)) and len(set(names)) == len(names)
        normalised = (images / 255 - MEAN) / STD
        np.testing.assert_allclose(hi[:, names.index("image")], normalised.max((1, 2, 3)), rtol=1e-4)
        np.testing.assert_allclose(lo[:, names.index("image")], normalised.min((1, 2, 3)), rtol=1e-4)
        assert (lo[:, names.index("stages.0.0.depthwise")] >= 0).all()
        assert (lo[:, names.index("stages.1.0.depthwise")] >= -0.376).all()
        assert (lo[:, names.index("stages.1.0.depthwise.pre")] < -0.376).any()

    def test_names_serve_every_mix_of_precisions(self) -> None:
        rng = np.random.default_rng(5)
        for _ in range(5):
            candidate = random_candidate(rng)
            _, names = tensors_model(candidate, random_weights(candidate, 0), MEAN, STD)
            everything = nominal_quant(candidate)
            assert set(names) <= set(everything.lo)
            kept = type(everything)({n: everything.lo[n] for n in names}, {n: everything.hi[n] for n in names}, 1)
            mixed = candidate.with_precision(rng.choice(["fp32", "int8"], len(candidate.stages) + 2).tolist())
            network_model(mixed, random_weights(mixed, 0), MEAN, STD, quant=kept, form="logits")


class TestBadInput:
    def test_fp16_is_refused_with_what_is_allowed(self) -> None:
        candidate = small_candidate("fp16")
        with pytest.raises(UsageError, match=r"stem: precision 'fp16' does not exist in dialect 'ort'.*fp32, int8"):
            network_model(candidate, random_weights(candidate, 0), MEAN, STD)
        with pytest.raises(UsageError, match="'fp16'"):
            layer_model(expand(candidate)[1])

    def test_int8_without_ranges_names_the_function_that_makes_them(self) -> None:
        candidate = small_candidate("int8")
        with pytest.raises(UsageError, match=r"quant=calibrate"):
            network_model(candidate, random_weights(candidate, 0), MEAN, STD)

    def test_missing_range_is_named(self) -> None:
        candidate = small_candidate("int8")
        quant = nominal_quant(candidate)
        del quant.lo["stages.1.0.pool"]
        with pytest.raises(RecordError, match=r"no tensor 'stages\.1\.0\.pool'"):
            network_model(candidate, random_weights(candidate, 0), MEAN, STD, quant=quant)

    def test_weights_of_another_candidate_are_named(self) -> None:
        candidate = small_candidate()
        weights = random_weights(candidate, 0)
        wrong = {**weights, "head.hidden.weight": np.zeros((3, 64, 1, 1), np.float32)}
        with pytest.raises(RecordError, match=r"head\.hidden\.weight: expected float32 \(32, 64, 1, 1\), got float32"):
            network_model(candidate, wrong, MEAN, STD)
        del wrong["stem.conv.bias"]
        with pytest.raises(RecordError, match=r"weights have no 'stem\.conv\.bias'"):
            network_model(candidate, wrong, MEAN, STD)

    def test_weights_that_are_not_finite_are_refused(self) -> None:
        candidate = small_candidate()
        weights = random_weights(candidate, 0)
        weights["stem.conv.bias"][2] = np.nan
        with pytest.raises(RecordError, match=r"stem\.conv\.bias: holds NaN or infinity"):
            network_model(candidate, weights, MEAN, STD)

    def test_normalisation_of_another_image_kind_is_refused(self) -> None:
        candidate = small_candidate()
        with pytest.raises(RecordError, match="3 values"):
            network_model(candidate, random_weights(candidate, 0), (0.5,), (0.5,))
        with pytest.raises(RecordError, match="std must be positive"):
            network_model(candidate, random_weights(candidate, 0), MEAN, (0.1, 0.0, 0.1))


def test_dead_channel_with_a_bias_does_not_overflow_int32() -> None:
    weight = np.zeros((2, 3, 1, 1), np.float32)
    weight[1] = 0.5
    bias = np.array([2.0, 0.1], np.float32)
    scale = ORT.weight_scales(weight, bias, np.float32(0.01))
    assert scale[1] == np.float32(0.5) / np.float32(ORT.weight_limit)
    assert abs(np.rint(bias / (np.float32(0.01) * scale))).max() <= 2**30 + 1


def test_zero_of_a_tensor_after_relu_is_exactly_zero() -> None:
    scale, zero_point = ORT.scale_and_zero_point(0.0, 5.1)
    assert zero_point == 0 and scale == np.float32(5.1 / 255)
    scale, zero_point = ORT.scale_and_zero_point(-1.0, 3.0)
    assert zero_point == 64
    assert ORT.scale_and_zero_point(0.5, 0.5)[1] == 0  # the range is widened to hold zero
    assert ORT.scale_and_zero_point(-3.0, -1.0)[1] == 255


def test_bias_scale_is_exactly_the_float32_product() -> None:
    candidate = small_candidate("int8")
    weights = random_weights(candidate, 0)
    graph = onnx.load_from_string(
        network_model(candidate, weights, MEAN, STD, quant=nominal_quant(candidate), form="logits")
    ).graph
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    by_output = {n.output[0]: n for n in graph.node}
    convolutions = [n for n in graph.node if n.op_type == "Conv"]
    for node in convolutions:
        x, weight, bias = (by_output[name] for name in node.input)
        assert {n.op_type for n in (x, weight, bias)} == {"DequantizeLinear"}
        product = constants[x.input[1]] * constants[weight.input[1]]
        assert product.dtype == np.float32 and np.array_equal(constants[bias.input[1]], product)
        assert constants[weight.input[0]].dtype == np.int8 and constants[bias.input[0]].dtype == np.int32
        base = weight.input[0].removesuffix(".weight.q")
        steps = np.abs(weights[f"{base}.weight"] / constants[weight.input[1]].reshape(-1, 1, 1, 1))
        assert steps.max() <= 127.01
        restored = constants[weight.input[0]] * constants[weight.input[1]].reshape(-1, 1, 1, 1)
        assert np.abs(restored - weights[f"{base}.weight"]).max() <= constants[weight.input[1]].max() / 2 * 1.001
    assert len(convolutions) == sum(len(layer.convolutions) for layer in expand(candidate))
