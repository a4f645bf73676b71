"""CUDA C++ as this backend writes it, run on a CPU: every thread of a grid in turn. For kernels whose threads share nothing."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from graphwright.backends.tvm.cuda.overlap import WAIT

HERE = Path(__file__).parent

#: What nvcc brings along, as far as generated kernels use it.
SHIM = r"""
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>
using std::fmaf; using std::nearbyintf;
typedef unsigned char uchar; typedef unsigned short ushort; typedef unsigned int uint;
struct dim { int x, y, z; };
static dim blockIdx, threadIdx;
#define CUDART_INF_F INFINITY
#define __global__
#define __launch_bounds__(n)
#define VECTOR(name, type) struct alignas(4 * sizeof(type)) name { type x, y, z, w; }; \
  static inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }
VECTOR(float4, float) VECTOR(int4, int) VECTOR(uint4, uint) VECTOR(longlong4, long long)
template <typename A, typename B> auto min(A a, B b) { using C = std::common_type_t<A, B>; return C(b) < C(a) ? C(b) : C(a); }
template <typename A, typename B> auto max(A a, B b) { using C = std::common_type_t<A, B>; return C(a) < C(b) ? C(b) : C(a); }
template <typename... P, size_t... I>
void grid(void (*kernel)(P...), const unsigned* n, void** arguments, std::index_sequence<I...>) {
  for (unsigned long b = 0; b < (unsigned long)n[0] * n[1] * n[2]; ++b) {
    blockIdx = {int(b % n[0]), int(b / n[0] % n[1]), int(b / n[0] / n[1])};
    for (unsigned long t = 0; t < (unsigned long)n[3] * n[4] * n[5]; ++t) {
      threadIdx = {int(t % n[3]), int(t / n[3] % n[4]), int(t / n[3] / n[4])};
      kernel(*static_cast<P*>(arguments[I])...);
    }
  }
}
template <typename... P> int count(void (*)(P...)) { return sizeof...(P); }
template <typename... P> void run(void (*kernel)(P...), const unsigned* n, void** arguments) {
  grid(kernel, n, arguments, std::index_sequence_for<P...>{});
}
"""


def emulate(source: str, folder: Path) -> Path:
    """A library with `emulate_NAME(extents, arguments)` and `arguments_of_NAME()` for each kernel of CUDA `source`."""
    kernels = re.sub(r"\A.*?(?=extern \"C\" __global__)", "", source, flags=re.DOTALL)
    kernels = kernels.replace(f'asm volatile("{WAIT}" ::: "memory");', "")  # kernels run one after another here
    names = sorted(set(re.findall(r"__launch_bounds__\(\d+\) (\w+)\(", kernels)))
    entries = [
        f'extern "C" void emulate_{n}(const unsigned* extents, void** arguments) {{ run({n}, extents, arguments); }}\n'
        f'extern "C" int arguments_of_{n}() {{ return count({n}); }}'
        for n in names
    ]
    path, library = folder / "kernels.cc", folder / "kernels.so"
    path.write_text("\n".join([SHIM, kernels, *entries]))
    # As --fmad=false: nothing is contracted.
    command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w", str(path), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def fake_driver(folder: Path) -> Path:
    """`libcuda.so.1` of fake_cuda.c, in `folder`."""
    library = folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", str(HERE / "fake_cuda.c"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library
