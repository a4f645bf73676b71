"""Kernel families with a GPU version, each under the module and function names of `backends/tvm/kernels`.

A module here replaces the CPUs' one function by function (`backends/tvm/families.py`): the same specification,
the same buffers in the same order (inputs, residual, packed parameters, output), its own packing of the weights. Functions that
are missing here are the CPUs' own; those are written as tensor expressions, and the TIR road schedules them for threads.
"""
