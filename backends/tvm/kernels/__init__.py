"""Designed kernels: generators of TIR PrimFuncs with static shapes, and the packers of what they read.

Each int8 module has a frozen spec, `build(spec, tail, level) -> PrimFunc` and `pack(spec, tail, level, ...) -> arrays`; the
function's buffers are the inputs, the tail's residual if it has one, the packed arrays in order, the output.

    convolution_int8   ConvolutionInt8   X [N, H, W, Cp] -> Y [N, OH, OW, Op]; dense, depthwise and grouped
    linear_int8        LinearInt8        X [M, K] -> Y [M, N]
    matmul_int8        MatmulInt8        A [B, M, K], B [B, K, N] or [B, N, K] -> Y [B, M, N]

Levels: "avx512-vnni", and "portable", which is right on every processor. Inside: `isa` (the levels), `gemm_int8` (register tile
and blocking), `tail` (rescaling), `emit` (TIR building), `base` (layouts, shapes and tails shared with the lowering).
"""
