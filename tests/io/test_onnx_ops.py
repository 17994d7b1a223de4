"""Every ONNX operation that is read, against onnxruntime, as a graph of one node."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from secateur.io.exchange import load_file
from secateur.io.exchange.onnx_ops import OPS

rng = np.random.default_rng(0)
X = rng.normal(size=(2, 4, 6, 6)).astype(np.float32)
Y = rng.normal(size=(2, 4, 6, 6)).astype(np.float32)
M = rng.normal(size=(2, 3, 8)).astype(np.float32)
P = np.abs(X) + 0.5
V = rng.normal(size=4).astype(np.float32)


def i64(*values):
    return np.array(values, np.int64)


def f32(*shape):
    return rng.normal(size=shape).astype(np.float32)


# operation, inputs that vary, inputs that are constant, attributes, opset
CASES = [
    *[(op, [X], [], {}, 20) for op in (
        "Abs", "Neg", "Ceil", "Floor", "Round", "Exp", "Erf", "Sin", "Cos", "Tanh", "Atan", "Sign", "Sigmoid", "Relu",
        "HardSwish", "Softplus", "Softsign", "Mish", "IsNaN", "IsInf", "Identity", "Dropout", "LeakyRelu", "Elu", "Selu", "Celu",
        "ThresholdedRelu", "HardSigmoid", "Gelu", "Softmax", "LogSoftmax", "GlobalAveragePool", "GlobalMaxPool", "Flatten",
        "ArgMax", "ArgMin", "Transpose", "Shape", "Size", "NonZero", "LpNormalization",
        "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp")],
    *[(op, [P], [], {}, 20) for op in ("Sqrt", "Log", "Reciprocal", "Tan", "ReduceLogSum")],
    *[(op, [X, Y], [], {}, 20) for op in (
        "Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal",
    )],
    ("Pow", [P, Y], [], {}, 20),
    ("Div", [i64(7, -7, 9)], [i64(2, 2, 3)], {}, 20),
    ("Mod", [i64(7, -7, 9)], [i64(3, 3, 4)], {}, 20),
    ("Not", [X > 0], [], {}, 20),
    *[(op, [X > 0, Y > 0], [], {}, 20) for op in ("And", "Or", "Xor")],
    ("Where", [X > 0, X, Y], [], {}, 20),
    ("Cast", [X * 3], [], {"to": TensorProto.INT64}, 20),
    ("CastLike", [i64(1, 2), X], [], {}, 20),
    ("Clip", [X], [np.float32(-0.5), np.float32(0.5)], {}, 20),
    ("Gelu", [X], [], {"approximate": "tanh"}, 20),
    ("HardSigmoid", [X], [], {"alpha": 1 / 6, "beta": 0.5}, 20),
    ("PRelu", [X], [f32(4, 1, 1)], {}, 20),
    ("Softmax", [X], [], {"axis": 1}, 12),
    ("Softmax", [X], [], {"axis": 1}, 13),
    ("MatMul", [M], [f32(8, 5)], {}, 20),
    ("Gemm", [f32(3, 8)], [f32(5, 8), f32(5)], {"transB": 1}, 20),
    ("Gemm", [f32(8, 3)], [f32(8, 5), f32(5)], {"transA": 1, "alpha": 0.5, "beta": 2.0}, 20),
    ("Einsum", [M], [f32(8, 5)], {"equation": "btc,cd->btd"}, 20),
    ("Conv", [X], [f32(6, 4, 3, 3), f32(6)], {"pads": [1, 1, 1, 1], "strides": [2, 2]}, 20),
    ("Conv", [X], [f32(8, 1, 3, 3)], {"group": 4, "pads": [0, 1, 2, 1]}, 20),
    ("Conv", [X], [f32(6, 4, 3, 3)], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, 20),
    ("Conv", [X], [f32(6, 4, 3, 3)], {"auto_pad": "SAME_LOWER", "strides": [2, 2]}, 20),
    ("Conv", [M], [f32(5, 3, 3)], {}, 20),
    ("ConvTranspose", [X], [f32(4, 3, 3, 3), f32(3)], {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}, 20),
    ("MaxPool", [X], [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, 20),
    ("MaxPool", [X], [], {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"}, 20),
    ("MaxPool", [X], [], {"kernel_shape": [3, 3], "pads": [0, 0, 1, 1]}, 20),
    ("AveragePool", [X], [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, 20),
    ("AveragePool", [X], [], {"kernel_shape": [3, 3], "pads": [0, 0, 1, 1], "count_include_pad": 1}, 20),
    ("BatchNormalization", [X], [V, V * 2, V * 3, np.abs(V) + 1], {"epsilon": 1e-3}, 20),
    ("InstanceNormalization", [X], [V, V * 2], {}, 20),
    ("LayerNormalization", [M], [f32(8), f32(8)], {"epsilon": 1e-3}, 20),
    ("LayerNormalization", [M], [f32(3, 8)], {"axis": 1}, 20),
    ("RMSNormalization", [M], [f32(8)], {}, 23),
    ("GroupNormalization", [X], [V, V * 2], {"num_groups": 2}, 21),
    ("ReduceMean", [X], [i64(1, -1)], {"keepdims": 0}, 18),
    ("ReduceMean", [X], [], {"axes": [2, 3]}, 13),
    ("ReduceSum", [X], [i64(1)], {}, 13),
    ("ArgMax", [X], [], {"axis": 1, "keepdims": 0}, 20),
    ("TopK", [X], [i64(2)], {}, 20),
    ("CumSum", [X], [np.array(1, np.int64)], {}, 20),
    ("Trilu", [X], [], {"upper": 0}, 20),
    ("Reshape", [X], [i64(0, -1, 6)], {}, 20),
    ("Flatten", [X], [], {"axis": 2}, 20),
    ("Flatten", [X], [], {"axis": 0}, 20),
    ("Squeeze", [f32(2, 1, 3, 1)], [i64(1, -1)], {}, 20),
    ("Squeeze", [f32(2, 1, 3, 1)], [], {"axes": [1]}, 11),
    ("Unsqueeze", [M], [i64(0, -1)], {}, 20),
    ("Transpose", [X], [], {"perm": [0, 2, 3, 1]}, 20),
    ("Expand", [f32(2, 1, 3)], [i64(4, 1, 5, 1)], {}, 20),
    ("Tile", [M], [i64(1, 2, 3)], {}, 20),
    ("Concat", [X, Y], [], {"axis": 1}, 20),
    ("Split", [X], [i64(1, 3)], {"axis": 1}, 20),
    ("Split", [X], [], {"axis": 1, "split": [3, 1]}, 11),
    ("Split", [X], [], {"axis": 1, "num_outputs": 2}, 20),
    ("Slice", [X], [i64(1, -4), i64(3, 2**62), i64(1, -1)], {}, 20),
    ("Slice", [X], [i64(-1, 5), i64(-(2**62), 1), i64(2, 3), i64(-1, -2)], {}, 20),
    ("Gather", [X], [np.array(2, np.int64)], {"axis": 1}, 20),
    ("Gather", [X], [i64(0, -1)], {"axis": 2}, 20),
    ("Gather", [i64(3, 1, 4)], [f32(6, 5)], {"swap": 1}, 20),
    ("Gather", [M], [np.array([[0, 2], [1, 1]], np.int64)], {"axis": 1}, 20),
    ("GatherElements", [M], [rng.integers(0, 3, (2, 3, 8))], {"axis": 1}, 20),
    ("GatherND", [X], [np.array([[0, 1], [1, 3]], np.int64)], {}, 20),
    ("ScatterND", [M], [np.array([[0, 1], [1, 2]], np.int64), f32(2, 8)], {}, 20),
    ("OneHot", [i64(0, 3, 1)], [np.array(4, np.int64), np.array([0.5, 2.0], np.float32)], {}, 20),
    ("ConstantOfShape", [], [i64(2, 3)], {"value": np.array([7.5], np.float32)}, 20),
    ("Range", [], [np.array(1, np.int64), np.array(9, np.int64), np.array(3, np.int64)], {}, 20),
    ("EyeLike", [f32(3, 4)], [], {}, 20),
    ("Pad", [X], [i64(0, 1, 2, 0, 0, 0, 1, 3), np.float32(1.5)], {}, 20),
    ("Pad", [X], [i64(0, 0, 2, 1, 0, 0, 1, 3)], {"mode": "reflect"}, 20),
    ("Pad", [X], [i64(0, 0, 2, 1, 0, 0, 1, 3)], {"mode": "edge"}, 20),
    ("Resize", [X], [np.array([], np.float32), np.array([1, 1, 2, 2], np.float32)], {"mode": "nearest"}, 20),
    ("Resize", [X], [np.array([], np.float32), np.array([1, 1, 1.5, 2.5], np.float32)], {"mode": "linear"}, 20),
    ("Resize", [X], [np.array([], np.float32), np.array([], np.float32), i64(2, 4, 9, 4)], {
        "mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}, 20),
    ("Resize", [X], [np.array([], np.float32), np.array([], np.float32), i64(2, 4, 9, 11)], {
        "mode": "cubic", "coordinate_transformation_mode": "align_corners"}, 20),
    ("Upsample", [X], [np.array([1, 1, 2, 2], np.float32)], {"mode": "nearest"}, 9),
    ("DepthToSpace", [X], [], {"blocksize": 2}, 20),
    ("DepthToSpace", [X], [], {"blocksize": 2, "mode": "CRD"}, 20),
    ("SpaceToDepth", [X], [], {"blocksize": 2}, 20),
]  # fmt: skip
ABSENT = {"Swish"}
"""Operations that onnxruntime doesn't run either."""


def one_node(op, varying, constant, attributes, opset):
    attributes = dict(attributes)
    names = [f"x{k}" for k in range(len(varying))]
    fixed = [f"c{k}" for k in range(len(constant))]
    order = [*fixed, *names] if attributes.pop("swap", None) else [*names, *fixed]
    if op == "ConstantOfShape":
        attributes["value"] = onnx.numpy_helper.from_array(attributes["value"])
    outputs = {"Split": ["y", "z"], "TopK": ["y", "z"]}.get(op, ["y"])
    node = helper.make_node(op, order, outputs, **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for n, v in zip(names, varying, strict=True)
        ],
        [onnx.ValueInfoProto(name=n) for n in outputs],
        [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in zip(fixed, constant, strict=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    inferred = onnx.shape_inference.infer_shapes(model)
    for output, found in zip(model.graph.output, inferred.graph.output, strict=True):
        output.CopyFrom(found)
        if op == "GroupNormalization":
            output.CopyFrom(helper.make_tensor_value_info(output.name, TensorProto.FLOAT, varying[0].shape))
    return model


@pytest.mark.parametrize("case", CASES, ids=[f"{c[0]}-{n}" for n, c in enumerate(CASES)])
def test_an_operation_gives_what_onnxruntime_gives(case, tmp_path):
    varying = case[1]
    model = one_node(*case)
    file = tmp_path / "one.onnx"
    onnx.save(model, file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    wanted = session.run(None, {f"x{k}": v for k, v in enumerate(varying)})
    got = load_file(file)(*[torch.from_numpy(np.array(v)) for v in varying])
    got = got if isinstance(got, tuple) else (got,)
    for a, b in zip(got, wanted, strict=True):
        assert tuple(a.shape) == b.shape
        np.testing.assert_allclose(a.detach().numpy(), b, rtol=1e-4, atol=1e-5)


def test_every_operation_has_a_case():
    assert {case[0] for case in CASES} | ABSENT == set(OPS)
