"""The systems of a bench: ours, and the peers in their recommended configuration. Built inside a worker process."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from ...ir.errors import GraphwrightError

PEERS = ("ort", "ort-int8", "openvino", "openvino-nncf", "torch-compile")

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


def build(name: str, folder: Path, threads: int) -> System:
    """Builds the system called `name` from float.onnx, samples.npz, float.gw and int8.gw in `folder`."""
    with np.load(folder / "samples.npz") as loaded:
        samples = dict(loaded)
    builders = {
        "graphwright-float": lambda: _graphwright(folder / "float.gw", "float32", samples, threads),
        "graphwright-int8": lambda: _graphwright(folder / "int8.gw", "int8", samples, threads),
        "ort": lambda: _ort(folder / "float.onnx", "float32", samples, threads),
        "ort-int8": lambda: _ort(_ort_quantized(folder, samples), "int8", samples, threads),
        "openvino": lambda: _openvino(folder, samples, threads, quantized=False),
        "openvino-nncf": lambda: _openvino(folder, samples, threads, quantized=True),
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


def _ort_quantized(folder: Path, samples: dict[str, np.ndarray]) -> Path:
    """Static QDQ quantization with ONNX Runtime's own tool: u8 activations, per-channel s8 weights, min-max calibration."""
    quantization = _need("onnxruntime.quantization", "onnxruntime")
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            count = len(next(iter(samples.values())))
            self._rows = iter([{name: value[i] for name, value in samples.items()} for i in range(count)])

        def get_next(self):
            return next(self._rows, None)

    prepared, path = folder / "ort-prepared.onnx", folder / "ort-int8.onnx"
    quant_pre_process(str(folder / "float.onnx"), str(prepared))
    quantization.quantize_static(
        str(prepared), str(path), Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
        activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
    )  # fmt: skip
    return path


def _openvino(folder: Path, samples: dict[str, np.ndarray], threads: int, quantized: bool) -> System:
    """OpenVINO with its default precision (it picks bfloat16 where the processor has it), or NNCF's default int8."""
    ov = _need("openvino", "openvino")
    model = ov.Core().read_model(folder / "float.onnx")
    if quantized:
        nncf = _need("nncf", "nncf")
        count = len(next(iter(samples.values())))
        rows = [{name: value[i] for name, value in samples.items()} for i in range(count)]
        model = nncf.quantize(model, nncf.Dataset(rows), subset_size=count)
    path = folder / f"openvino-{'int8' if quantized else 'float'}.xml"
    ov.save_model(model, path, compress_to_fp16=False)
    compiled = ov.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"})
    request = compiled.create_infer_request()
    precision = "int8" if quantized else str(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())

    def run(arrays: Arrays) -> Arrays:
        request.infer(dict(enumerate(arrays)))
        return [np.array(request.get_output_tensor(i).data) for i in range(len(compiled.outputs))]

    name = "openvino-nncf" if quantized else "openvino"
    return System(name, precision, path.with_suffix(".bin").stat().st_size, run, samples)


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
