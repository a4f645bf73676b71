"""Designed kernels: generators of TIR PrimFuncs with static shapes, and the packers of what they read.

Each int8 module has a frozen spec, `build(spec, tail, level) -> PrimFunc` and `pack(spec, tail, level, ...) -> arrays`; the
function's buffers are the inputs, the tail's residual if it has one, the packed arrays in order, the output.

    convolution_int8   ConvolutionInt8   X [N, H, W, Cp] -> Y [N, OH, OW, Op]; dense, depthwise and grouped
    linear_int8        LinearInt8        X [M, K] -> Y [M, N]
    matmul_int8        MatmulInt8        A [B, M, K], B [B, K, N] or [B, N, K] -> Y [B, M, N]
    attention_int8     AttentionInt8     Q, K, V, (mask) through strides -> Y [*batch, M, D] or with the heads side by side

The float32 modules have `generator(shape, FloatSpec) -> PrimFunc` (`float_base.FloatSpec`: activation, residual, level, tile),
`pack_weight` and `pack_bias`; buffers are the input, the residual if the spec has one, W, bias, the output:

    convolution_f32    Convolution     X [N, H, W, Cp] or planar -> Y [N, OH, OW, Op]; dense, grouped
    depthwise_f32      Convolution     X [N, H, W, Cp] -> Y [N, OH, OW, Cp]
    linear_f32         MatrixProduct   X [M, K] -> Y [M, N]
    matmul_f32         MatrixProduct   A [B, M, K], B [B, K, N] or [B, N, K] -> Y [B, M, N]

Each also stores its tensors as bfloat16 or float16 (`FloatSpec.dtype`, or the type as an argument): `half` widens and rounds, and
`product_source` widens the input of a product once for a tile.

Each of these states an error bound and holds it (`vector_math` has the polynomials and their bounds):

    attention_f32      attention(Attention, level)                Q, K, V where they lie, mask -> Y
    activation_f32     activation(size, Activation)               X [size] -> Y [size]
    softmax_f32        softmax(rows, N)                           X [rows, N] -> Y [rows, N]
    layer_norm_f32     layer_norm(rows, N, eps)                   X [rows, N], weight [N], bias [N] -> Y [rows, N]
    pooling_f32        max_pool(shape, level), mean_pool          X [N, H, W, Cp] -> Y [N, OH, OW, Cp]

The exact ones give the bits of the `gw::` float ops on every target (`exact_float` says how); they have one level:

    softmax_exact      softmax(rows, N)                           X [rows, N] -> Y [rows, N]
    layer_norm_exact   layer_norm(rows, N, eps, ...)              X [rows, N], weight [N], bias [N] -> Y [rows, N], 8-bit codes
    reduce_exact       reduce_sum(shape, axis, keepdim)           X [shape] -> Y
    exact_elementwise  elementwise(shape, dtypes, dtype, expression)

Int8 levels: "avx512-amx", "avx512-vnni", "i8mm", "dotprod", "neon" and "portable"; float levels: "avx512", "avx512-bf16"
(bfloat16 alone), "fp16fml" and "fullfp16" (products of float16 on AArch64) and "portable"; "portable" is right everywhere.
Inside: `isa` (the int8 levels), `register_tile` (how sums lie in registers), `gemm_int8` (blocking), `gemm_tiles` and
`convolution_tiles` (the same on a `tile_unit`), `frame` (borders of images), `slices` (what a slice of a parallel loop does
once), `tail` (rescaling), `float_base` (the float levels, costs and register tile), `multiply` (how a float product reads weights
and adds), `half_neon` (that of float16 on AArch64), `window` (taps inside the image), `emit` (TIR building), `base` (layouts,
shapes and tails shared with the lowering).
"""
