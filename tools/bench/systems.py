"""The systems of a bench: ours, and the peers in their recommended configuration. Built inside a worker process."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx

from ...ir.errors import GraphwrightError

PEERS = (
    "ort", "ort-int8", "ort-dynamic", "openvino", "openvino-f32", "openvino-bf16", "openvino-nncf", "torch-compile",
)  # fmt: skip

#: Precision of ours -> the artifact that `build` reads.
ARTIFACTS = {"float32": "float.gw", **{name: f"{name}.gw" for name in ("int8", "bfloat16", "float16", "fp8")}}

#: OpenVINO's names of what it computes in -> ours.
PRECISIONS = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}

Arrays = list[np.ndarray]


class MissingPeerError(GraphwrightError):
    """A peer's package is not installed."""


@dataclass(frozen=True)
class System:
    """A built system: run(arrays) -> arrays, at the model's own batch size."""

    name: str
    precision: str
    size_bytes: int
    run: Callable[[Arrays], Arrays]
    samples: dict[str, np.ndarray]

    def sample(self) -> Arrays:
        return [np.ascontiguousarray(value[0]) for value in self.samples.values()]


def ours(precision: str) -> str:
    """Name of our system in a precision."""
    return f"graphwright-{ARTIFACTS[precision].removesuffix('.gw')}"


def build(name: str, folder: Path, threads: int) -> System:
    """Builds the system called `name` from float.onnx, samples.npz and our artifacts (ARTIFACTS) in `folder`."""
    with np.load(folder / "samples.npz") as loaded:
        samples = dict(loaded)
    builders = {
        **{ours(p): lambda p=p: _graphwright(folder / ARTIFACTS[p], p, samples, threads) for p in ARTIFACTS},
        "ort": lambda: _ort(folder / "float.onnx", "float32", samples, threads),
        "ort-int8": lambda: _ort(ort_quantized(folder, samples), "int8", samples, threads),
        "ort-dynamic": lambda: _ort(_ort_dynamic(folder), "int8 dynamic", samples, threads),
        "openvino": lambda: _openvino("openvino", folder, samples, threads),
        "openvino-f32": lambda: _openvino("openvino", folder, samples, threads, INFERENCE_PRECISION_HINT="f32"),
        "openvino-bf16": lambda: _openvino("openvino", folder, samples, threads, INFERENCE_PRECISION_HINT="bf16"),
        "openvino-nncf": lambda: _openvino("openvino-nncf", folder, samples, threads),
        "torch-compile": lambda: _torch_compile(folder, samples, threads),
    }
    return builders[name]()


def _need(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPeerError(f"{package} is not installed; pip install 'graphwright[bench]'") from error


def _graphwright(path: Path, precision: str, samples: dict[str, np.ndarray], threads: int) -> System:
    from ...backends.loader import load

    model = load(path, threads=threads)

    def run(arrays: Arrays) -> Arrays:
        outputs = model(*arrays)
        return list(outputs) if isinstance(outputs, tuple) else [outputs]

    return System("graphwright", precision, path.stat().st_size, run, samples)


def ort_session(path: Path, threads: int, optimize: bool = True) -> Callable[[Arrays], Arrays]:
    """An ONNX file as run(arrays) -> arrays in ONNX Runtime; `optimize` False runs the nodes as they are written."""
    ort = _need("onnxruntime", "onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))


def _ort(path: Path, precision: str, samples: dict[str, np.ndarray], threads: int) -> System:
    return System("onnxruntime", precision, path.stat().st_size, ort_session(path, threads), samples)


#: What ONNX Runtime's static quantization takes of a transformer. By default it also quantizes the attention mask (-10000 and 0
#: in 256 steps) and the residual stream: MiniLM's Spearman correlation falls from 0.92 to 0.37.
TRANSFORMER_OPS = ["MatMul", "Gemm", "Gather", "Conv"]


def _is_transformer(path: Path) -> bool:
    kinds = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
    return {"LayerNormalization", "Softmax", "MatMul"} <= kinds


def _ort_prepared(folder: Path) -> Path:
    """float.onnx after ONNX Runtime's own preparation for quantization."""
    _need("onnxruntime.quantization", "onnxruntime")
    from onnxruntime.quantization.shape_inference import quant_pre_process

    # Its symbolic shape inference has no rule for ReduceL2 of opset 18 and then fails on what reads it ("object of type
    # 'NoneType' has no len()"). It is for files with symbolic dimensions; ours have none.
    quant_pre_process(str(folder / "float.onnx"), str(folder / "ort-prepared.onnx"), skip_symbolic_shape=True)
    return folder / "ort-prepared.onnx"


def ort_quantized(folder: Path, samples: dict[str, np.ndarray]) -> Path:
    """Static QDQ quantization with ONNX Runtime's own tool: u8 activations, per-channel s8 weights, min-max calibration."""
    quantization = _need("onnxruntime.quantization", "onnxruntime")

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            count = len(next(iter(samples.values())))
            self._rows = iter([{name: value[i] for name, value in samples.items()} for i in range(count)])

        def get_next(self):
            return next(self._rows, None)

    path = folder / "ort-int8.onnx"
    if path.exists():  # another thread count left it
        return path
    prepared = _ort_prepared(folder)
    quantization.quantize_static(
        str(prepared), str(path), Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
        activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
        op_types_to_quantize=TRANSFORMER_OPS if _is_transformer(prepared) else None,
    )  # fmt: skip
    return path


def _ort_dynamic(folder: Path) -> Path:
    """Dynamic quantization, which ONNX Runtime recommends for transformers: the range of each activation is found as it runs."""
    quantization = _need("onnxruntime.quantization", "onnxruntime")
    path = folder / "ort-dynamic.onnx"
    if not path.exists():
        prepared = str(_ort_prepared(folder))
        quantization.quantize_dynamic(prepared, str(path), per_channel=True, weight_type=quantization.QuantType.QInt8)
    return path


def _openvino(name: str, folder: Path, samples: dict[str, np.ndarray], threads: int, **hints: str) -> System:
    """OpenVINO with its default precision, which the processor decides, or another one; `openvino-nncf`: NNCF's int8."""
    ov = _need("openvino", "openvino")
    quantized = name == "openvino-nncf"
    path = folder / "openvino-int8.xml" if quantized else folder / "openvino-float.xml"
    if not path.exists():  # else another thread count or precision left it
        model = ov.Core().read_model(folder / "float.onnx")
        ov.save_model(_nncf(model, folder, samples) if quantized else model, path, compress_to_fp16=False)
    model = ov.Core().read_model(path)
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", **hints}
    compiled = ov.compile_model(model, "CPU", options)
    request = compiled.create_infer_request()
    chosen = str(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
    precision = "int8" if quantized else PRECISIONS.get(chosen, chosen)

    def run(arrays: Arrays) -> Arrays:
        request.infer(dict(enumerate(arrays)))
        return [np.array(request.get_output_tensor(i).data) for i in range(len(compiled.outputs))]

    return System(name, precision, path.with_suffix(".bin").stat().st_size, run, samples)


def _nncf(model: Any, folder: Path, samples: dict[str, np.ndarray]) -> Any:
    """NNCF's default int8 for the kind of model."""
    nncf = _need("nncf", "nncf")
    count = len(next(iter(samples.values())))
    rows = [{name: value[i] for name, value in samples.items()} for i in range(count)]
    kind = nncf.ModelType.TRANSFORMER if _is_transformer(folder / "float.onnx") else None
    return nncf.quantize(model, nncf.Dataset(rows), subset_size=count, model_type=kind)


def _torch_compile(folder: Path, samples: dict[str, np.ndarray], threads: int) -> System:
    import torch

    from ...ir.load import load_program

    torch.set_num_threads(threads)
    program = load_program(folder / "float.onnx")
    compiled = torch.compile(program.graph_module, backend="inductor")

    def run(arrays: Arrays) -> Arrays:
        with torch.no_grad():
            outputs = compiled(*[torch.from_numpy(x) for x in arrays])
        outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        return [value.numpy() for value in outputs]

    size = sum(t.numel() * t.element_size() for t in program.parameters().values())
    return System("torch-compile", "float32", size, run, samples)
