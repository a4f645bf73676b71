"""One mixed-precision run of Sony's Model Compression Toolkit, inside an environment of its own; `mct.py` starts it.

It takes nothing of this package: the model comes as a `torch.package` archive, samples and settings as files of the folder named
on the command line, and results go back there.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.package.package_importer import PackageImporter


def _import_mct() -> tuple[Any, torch.library.Library | None]:
    """MCT, which imports torchvision by way of edge-mdt-cl, and the library of declarations to keep alive.

    PyPI's torchvision is built for CUDA; beside a CPU build of torch its library does not load, and the import of its Python part
    fails for want of two operators' schemas. Declaring these lets it through; MCT calls neither operator on the networks here.
    """
    library = None
    try:
        import torchvision  # pyright: ignore[reportMissingImports]
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401 # pyright: ignore[reportMissingImports]
    import model_compression_toolkit as mct  # pyright: ignore[reportMissingImports]

    return mct, library


def main(folder: Path) -> None:
    settings = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(settings["threads"])
    mct, _library = _import_mct()
    importer = PackageImporter(folder / "model.pt")
    model = importer.load_pickle("model", "model.pkl").eval()
    with np.load(folder / "calibration.npz") as stored:
        calibration = [torch.from_numpy(stored[name]) for name in stored.files]

    def representative():
        yield from ([batch] for batch in calibration)

    start = time.monotonic()
    capabilities = mct.get_target_platform_capabilities("1.0")  # weights of 8, 4 or 2 bits per channel, activations of 8
    config = mct.core.CoreConfig(
        mixed_precision_config=mct.core.MixedPrecisionQuantizationConfig(num_of_images=settings["score_images"])
    )
    full = mct.core.pytorch_resource_utilization_data(model, representative, config, capabilities)
    budget = mct.core.ResourceUtilization(weights_memory=full.weights_memory * settings["average_bits"] / 8)
    quantized, information = mct.ptq.pytorch_post_training_quantization(
        model, representative, budget, core_config=config, target_platform_capabilities=capabilities
    )
    seconds = time.monotonic() - start
    layers = [
        {"name": name, "bits": int(quantizer.num_bits), "weights": getattr(module, attribute).numel()}
        for name, module in quantized.named_modules()
        for attribute, quantizer in getattr(module, "weights_quantizers", {}).items()
    ]
    with torch.no_grad(), np.load(folder / "evaluation.npz") as stored:
        outputs = [quantized(torch.from_numpy(stored[name])).numpy() for name in stored.files]
    np.savez(folder / "outputs.npz", *outputs)
    result = {
        "version": mct.__version__,
        "seconds": seconds,
        "layers": layers,
        "weights_memory": float(information.final_resource_utilization.weights_memory),
    }
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
