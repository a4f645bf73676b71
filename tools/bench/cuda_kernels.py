"""Measures and tunes the Triton kernels on a GPU; needs torch, Triton and the kernels' own files, no TVM.

    python -m graphwright.tools.bench.cuda_kernels gemm               rates of large products beside torch's, JSON lines
    python -m graphwright.tools.bench.cuda_kernels gemv               layers of one row with weights of 16, 8 and 4 bits
    python -m graphwright.tools.bench.cuda_kernels tune OUT SECONDS [PART OF A KEY]   rows of the tuning database

A kernel is timed as the product runs it: launches of one CUDA graph, one after another, operands in the second-level cache. All
cores compile kernels into Triton's cache before they are timed. Whatever does not compile or fit becomes a row with its error.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...backends.tvm.cuda.kernels import plan_coded, plan_float, plan_fp8, plan_image, plan_int8
from ...backends.tvm.cuda.kernels.blocks import Block, Problem, choose, space
from ...backends.tvm.cuda.kernels.plans import Plan, run
from ...backends.tvm.cuda.kernels.timing import LAUNCHES, Compiler, cause_of, microseconds, operands, timed, torch_type
from ...backends.tvm.kernels.base import Convolution, Tail
from .cuda_shapes import SHAPES, Product

LEVEL = "sm_90"
TAIL = Tail("rescale", "uint8", 0, 0, 255)
RELU = plan_float.FloatTail(low=0.0)

#: torch's products of int8 and of 8-bit floats, which it has no public names for.
INT_MM: Any = torch._int_mm  # pyright: ignore[reportPrivateImportUsage]
SCALED_MM: Any = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]


def say(**row: Any) -> None:
    print(json.dumps(row), flush=True)


def checked_operands(product: Product) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Operands of the product's plan, packed as the compiler packs them, and what it must give (None: too large to compute
    otherwise), by torch in float64, where these sums are exact."""
    plan = plan_of(product, None)
    tensors = operands(plan)
    shape = product.shape
    if product.fp8:
        tensors[:2] = [codes(tuple(tensor.shape)) for tensor in tensors[:2]]
    if product.half or product.fp8:
        return tensors, None
    scale = np.full(1, 2e-4, np.float32)
    rng = np.random.default_rng(0)
    if isinstance(shape, Convolution):
        weight = rng.integers(-128, 128, (shape.filters, shape.channels // shape.groups, *shape.kernel), np.int8)
        layer = (shape, product.dtype, product.zero_point, TAIL, weight, None)
        packed = plan_image.pack(*layer, scale=scale) if product.image else plan_int8.pack_convolution(*layer, scale=scale)
    else:
        weight = rng.integers(-128, 128, (shape[2], shape[1]), np.int8)
        packed = plan_int8.pack_linear(product.dtype, product.zero_point, TAIL, weight, None, scale=scale)
    tensors[1:-1] = [torch.from_numpy(array).cuda() for array in packed]
    if tensors[0].numel() > 30_000_000 or product.image:
        return tensors, None
    x, w = tensors[0].double() - product.zero_point, torch.from_numpy(weight).cuda().double()
    if isinstance(shape, Convolution):
        (top, left), (bottom, right) = shape.padding, shape.padding_end or shape.padding
        x = torch.nn.functional.pad(x[..., : shape.channels].permute(0, 3, 1, 2), (left, right, top, bottom))
        acc = torch.nn.functional.conv2d(x, w, None, shape.stride, 0, shape.dilation, shape.groups).permute(0, 2, 3, 1)
    else:
        acc = x @ w.t()
    real = acc.to(torch.int32).float() * float(scale[0])
    return tensors, torch.round(real.clamp(0, 255)).to(torch.uint8)


def codes(shape: tuple[int, ...]) -> torch.Tensor:
    """Bytes of e4m3 numbers: of any byte, two are no number."""
    return torch.randn(shape, device="cuda").to(torch.float8_e4m3fn).view(torch.uint8)


# -- large products ----------------------------------------------------------------------------------------------------------

LARGE = [
    Block(rows, columns, depth, warps, stages)
    for rows, columns in ((128, 256), (256, 128), (128, 128), (64, 256))
    for depth in (64, 128)
    for warps in (4, 8)
    for stages in (3, 4, 5)
    if rows * columns < 32768 or warps == 8
]

#: Products of one sum of the tensor cores, by what a row is called.
FP8_SUMS = {"fp8": plan_fp8.SUMMED, "fp8 one sum": 1 << 30}

#: Further blocks for float16.
LARGE_HALF = [
    Block(rows, columns, depth, 8, stages, group)
    for rows, columns in ((128, 256), (256, 128))
    for depth, stages in ((64, 3), (64, 4), (32, 6))
    for group in (4, 16)
]


def gemm(part: str = "", size: int = 4096) -> None:
    """size^3: int8 with and without a rescale, of s8 and u8, beside `torch._int_mm`; float16 beside cuBLAS; fp8, as it ships and
    in one sum of the tensor cores, beside `torch._scaled_mm` with sums in float32 and in the tensor cores ("fast").
    part: of the names to keep."""
    compiler = Compiler()
    half = plan_float.FloatTail()
    plans: list[tuple[str, Block, Plan]] = []
    for block in LARGE:
        if plan_fits(block):
            for dtype, tail in (("int8", Tail("none", "int32")), ("int8", TAIL), ("uint8", TAIL)):
                plan = plan_int8.linear(size, size, size, dtype, tail, LEVEL, block)
                plans.append((f"{dtype} {tail.kind}", block, plan))
            halved = replace(block, depth=block.depth // 2)
            plans.append(("float16", halved, plan_float.linear(size, size, size, "float16", half, LEVEL, halved)))
            for name, summed in FP8_SUMS.items():
                plan = plan_fp8.linear(size, size, size, "float16", half, LEVEL, block=block, summed=summed)
                plans.append((name, block, plan))
    for block in LARGE_HALF:
        plans.append(("float16", block, plan_float.linear(size, size, size, "float16", half, LEVEL, block)))
    plans = [one for one in plans if part in one[0]]
    futures = [compiler.start(plan) for _, _, plan in plans]
    a, b = (torch.randint(-128, 128, (size, size), device="cuda", dtype=torch.int32).to(torch.int8) for _ in range(2))
    c, d = (torch.randn(size, size, device="cuda").half() for _ in range(2))
    e, f = codes((size, size)), codes((size, size))
    unit = torch.tensor(1 / 64, device="cuda"), torch.ones((), device="cuda")
    x, y = e.view(torch.float8_e4m3fn), f.view(torch.float8_e4m3fn).t()
    scaled: dict[str, Callable[[], torch.Tensor]] = {
        name: lambda fast=fast: SCALED_MM(x, y, *unit, out_dtype=torch.float16, use_fast_accum=fast)
        for name, fast in (("fp8", False), ("fp8 fast", True))
    }
    exact = (x.double() @ y.double() / 64).float()
    expected = {"int8 none": INT_MM(a, b.t()), "float16": c @ d.t(), **dict.fromkeys(FP8_SUMS, exact)}
    reference = {"int8": microseconds(lambda: INT_MM(a, b.t()), 5), "float16": microseconds(lambda: c @ d.t(), 5)}
    reference |= {name: microseconds(call, 5) for name, call in scaled.items()}
    for name, call in scaled.items():
        say(what=f"torch {name}", off=(call().float() - exact).abs().max().item(), deviation=exact.std().item())
    for name, taken in reference.items():
        say(what=f"torch {name}", size=size, microseconds=taken, tops=2e-6 * size**3 / taken)
    best: dict[str, dict[str, Any]] = {}
    for (name, block, plan), future in zip(plans, futures, strict=True):
        error = future.result()
        taken, off = float("inf"), None
        if not error:
            tensors = operands(plan)
            kind = name.split()[0]
            tensors[:2] = {"int8": (a, b), "uint8": (a.view(torch.uint8), b), "float16": (c, d), "fp8": (e, f)}[kind]
            if kind == "fp8":
                tensors[2].fill_(1 / 64)
            tensors[3 if kind == "fp8" else 2].zero_()
            taken, error = timed(plan, tensors)
            if not error and name in expected:
                off = (tensors[-1].double() - expected[name].double()).abs().max().item()
                # Results of fp8 are near 1; what its sums may lose is in `triton_fp8`.
                error = f"off by {off}" if off > (0 if name == "int8 none" else 0.1 if kind == "fp8" else 1.0) else ""
        row = {"what": f"gemm {name}", "block": asdict(block), "microseconds": taken, "off": off, "error": error}
        if error:
            say(**row)
        elif taken < best.get(name, {"microseconds": float("inf")})["microseconds"]:
            torch_s = reference[name.split()[0].replace("uint8", "int8")]
            best[name] = row | {"tops": 2e-6 * size**3 / taken, "of_torch": torch_s / taken}
    for row in best.values():
        say(**row)
    compiler.close()


# -- one row -----------------------------------------------------------------------------------------------------------------

#: (inputs, outputs): the layers of GPT-2 and its classifier, then those of a 7B model, then larger ones.
ROWS_OF_ONE = ((768, 768), (768, 2304), (768, 3072), (3072, 768), (768, 50257))
ROWS_OF_ONE += ((1024, 1024), (2048, 2048), (4096, 4096), (4096, 11008), (11008, 4096), (8192, 8192), (8192, 28672))

#: Copies of a weight together exceed this, so that every launch finds its own in memory and not in the second-level cache.
COLD_BYTES = 160 << 20


def copied(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Copies of a launch's tensors, enough to empty the cache between two uses of one."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return [[tensor.clone() for tensor in tensors] for _ in range(max(1, min(64, COLD_BYTES // size)))]


def rotating(calls: list[Callable[[], Any]]) -> float:
    """Microseconds of one of `calls`, run in turn inside one graph."""

    def once() -> None:
        for call in calls:
            call()

    return microseconds(once, max(1, LAUNCHES // len(calls))) / len(calls)


def gemv() -> None:
    """Weight-only int8 and int4 (groups of 64) with float16 activations beside float16, ours and cuBLAS's, and the roofline: the
    time that the bytes of the weights take at the bandwidth of a large sum or copy, whichever is faster."""
    compiler = Compiler()
    bandwidth = _bandwidth()
    say(what="bandwidth", bytes_a_second=bandwidth)
    compiled = {layer: {name: (plan, compiler.start(plan)) for name, plan in _row_plans(*layer).items()} for layer in ROWS_OF_ONE}
    for (inputs, outputs), plans in compiled.items():
        x, w = torch.randn(1, inputs, device="cuda").half(), torch.randn(outputs, inputs, device="cuda").half()
        cublas = rotating([lambda pair=pair: torch.nn.functional.linear(*pair) for pair in copied([x, w])])
        say(what="gemv", layer=f"{inputs} -> {outputs}", weights="torch float16", microseconds=cublas)
        best: dict[str, dict[str, Any]] = {}
        for name, (plan, future) in plans.items():
            future.result()
            try:
                taken = rotating([lambda one=one, plan=plan: run(plan, one) for one in copied(operands(plan))])
            except Exception as error:  # the other kernels are worth their time
                say(what="gemv", layer=f"{inputs} -> {outputs}", weights=name, error=cause_of(error))
                continue
            read = sum(prod(shape) * torch_type(dtype).itemsize for _, shape, dtype in plan.buffers[1:-1])
            floor = read / bandwidth * 1e6
            row = {"microseconds": taken, "floor": floor, "of_floor": floor / taken, "faster_than_torch": cublas / taken}
            kind = name.partition(",")[0]
            if "," not in name:  # the choice of the compiler; of the others the best is worth a row
                say(what="gemv", layer=f"{inputs} -> {outputs}", weights=name, **row)
            if taken < best.get(kind, row | {"microseconds": float("inf")})["microseconds"]:
                best[kind] = row | {"block": asdict(plan_coded.Row(plan.warps, int(plan.constants.get("UNROLL") or 1)))}
        for kind, row in best.items():
            if kind != "float16":
                say(what="gemv", layer=f"{inputs} -> {outputs}", weights=f"{kind}, best", **row)
    compiler.close()


def _bandwidth() -> float:
    """Bytes a second of a sum or a copy of 1 GiB, whichever is faster."""
    source, target = (torch.zeros(1 << 28, dtype=torch.float32, device="cuda") for _ in range(2))
    size = 4 * source.numel()
    return 1e6 * max(size / microseconds(lambda: source.sum(), 3), 2 * size / microseconds(lambda: target.copy_(source), 3))


def _row_plans(inputs: int, outputs: int) -> dict[str, Plan]:
    plans = {"float16": plan_float.linear(1, inputs, outputs, "float16", plan_float.FloatTail(), LEVEL)}
    for bits in (8, 4):
        codes = plan_coded.Codes(outputs, inputs, bits, 64, inputs // 64, 1 << bits, rule="integers", first=-(1 << bits - 1))
        guess = plan_coded.row_of(codes)
        for row in dict.fromkeys([guess, *(plan_coded.Row(warps, unroll) for warps in (1, 2, 4, 8, 16) for unroll in (2, 4))]):
            name = f"int{bits} g64" if row == guess else f"int{bits} g64, {row.warps} warps, {row.unroll} lines"
            plans[name] = plan_coded.linear(1, codes, "float16", plan_float.FloatTail(), row)
    return plans


def plan_fits(block: Block) -> bool:
    return (block.rows + block.columns) * block.depth * block.stages <= 227 * 1024


# -- tuning ------------------------------------------------------------------------------------------------------------------


def plan_of(product: Product, block: Block | None) -> Plan:
    shape = product.shape
    if product.fp8:
        if isinstance(shape, Convolution):
            return plan_fp8.convolution(shape, "float16", RELU, LEVEL, block=block)
        return plan_fp8.linear(*shape, "float16", RELU, LEVEL, block=block)
    if product.half:
        if isinstance(shape, Convolution):
            return plan_float.convolution(shape, product.dtype, RELU, LEVEL, product.image, block)
        return plan_float.linear(*shape, product.dtype, RELU, LEVEL, block)
    if isinstance(shape, Convolution):
        if product.image:
            quantize = plan_int8.ImageQuantize(50.0, 0, 255)
            return plan_image.convolution(shape, product.dtype, product.zero_point, TAIL, LEVEL, quantize, block)
        return plan_int8.convolution(shape, product.dtype, product.zero_point, TAIL, LEVEL, block)
    return plan_int8.linear(*shape, product.dtype, TAIL, LEVEL, block)


def problem_of(product: Product) -> Problem:
    if product.fp8:
        if isinstance(product.shape, Convolution):
            return plan_fp8.convolution_problem(product.shape)
        return plan_fp8.linear_problem(*product.shape)
    if product.half and isinstance(product.shape, Convolution):
        return plan_float.convolution_problem(product.shape, product.dtype)
    if isinstance(product.shape, Convolution):
        return plan_image.problem(product.shape) if product.image else plan_int8.convolution_problem(product.shape)
    return replace(plan_int8.linear_problem(*product.shape), unit=2 if product.half else 1)


def blocks_of(product: Product, most: int) -> list[Block]:
    """The guess first, then the others worth measuring, each kernel once."""
    shape = product.shape
    if isinstance(shape, Convolution) and shape.depthwise:
        guess = plan_int8.depthwise_block(shape)
        others = plan_int8.depthwise_space(shape)
    elif isinstance(shape, Convolution) and product.image and not product.half:
        guess = plan_image.guess(shape, LEVEL)
        others = plan_image.space(shape)
    else:
        guess = choose(problem_of(product), LEVEL)
        others = space(problem_of(product), LEVEL, most)
    return list(dict.fromkeys([guess, *others]))


def tune(path: Path, seconds: float, named: str = "", most: int = 14) -> None:
    """Appends a database row a product to `path`; those it holds already are left out, and those whose key has not `named` in it.
    Stops in time."""
    deadline = time.monotonic() + seconds
    done = {json.loads(line)["key"] for line in path.read_text().splitlines()} if path.exists() else set()
    todo = [product for product in SHAPES if product.key not in done and named in product.key]
    compiler = Compiler()
    say(what="tune", products=len(todo), done=len(done))
    pending: list[tuple[Product, list[Block], list[Future[str]]]] = []
    waiting: Iterator[Product] = iter(todo)
    machine = torch.cuda.get_device_name()

    def feed() -> None:
        while len(pending) < 12:
            product = next(waiting, None)
            if product is None:
                return
            blocks = blocks_of(product, most)
            pending.append((product, blocks, [compiler.start(plan_of(product, block)) for block in blocks]))

    feed()
    while pending and time.monotonic() < deadline:
        product, blocks, futures = pending.pop(0)
        tensors, expected = checked_operands(product)
        times, errors = [], []
        for block, future in zip(blocks, futures, strict=True):
            error = future.result(timeout=120)
            taken = float("inf")
            if not error:
                taken, error = timed(plan_of(product, block), tensors)
            if not error:
                expected = tensors[-1].clone() if expected is None else expected
                given = tensors[-1][..., : expected.shape[-1]]
                # Half precision: another order of the sums may round otherwise.
                rounds = product.half or product.fp8
                same = torch.allclose(given, expected, 2e-3, 1e-2) if rounds else torch.equal(given, expected)
                if not same:
                    taken, error = float("inf"), "wrong"
            times.append(taken)
            if error:
                errors.append({"block": asdict(block), "error": error})
        feed()
        best = min(range(len(blocks)), key=lambda index: times[index])
        row = {
            "key": product.key,
            "level": LEVEL,
            "choice": asdict(blocks[best]) if times[best] < 0.97 * times[0] else None,
            "microseconds": round(times[best], 3),
            "guess_microseconds": round(times[0], 3),
            "threads": 1,
            "machine": machine,
            "date": time.strftime("%Y-%m-%d"),
        }
        if times[best] < float("inf"):
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        macs = problem_of(product)
        tops = 2e-6 * macs.rows * macs.columns * macs.depth / times[best]
        say(what="tuned", key=product.key, us=row["microseconds"], guess=row["guess_microseconds"], tops=round(tops, 1))
        for error in errors:
            say(what="failed", key=product.key, **error)
    say(what="end", left=len(pending) + sum(1 for _ in waiting), seconds=round(seconds - deadline + time.monotonic(), 1))
    compiler.close()


def main() -> None:
    if sys.argv[1] == "gemm":
        gemm(sys.argv[2] if len(sys.argv) > 2 else "")
    elif sys.argv[1] == "gemv":
        gemv()
    elif sys.argv[1] == "tune":
        tune(Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else "")
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
