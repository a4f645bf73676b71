"""CUDA: kernels compiled ahead of time into cubins, one graph of launches, and the library that carries them.

launch      what a step of a CUDA program is: a Triton kernel with its shapes bound, or a function of the TIR road
kernels/    the kernel families that have a GPU version of their own, under the names of `backends/tvm/kernels`
"""
