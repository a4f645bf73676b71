"""Takes out of torch.export what costs a small network more than its capture does: tests capture hundreds of them.

Each call of `run_decompositions` lists all composite operators of torch, and gives each one of them Python kernels for a dozen
dispatch keys. The list is kept, and the kernels are registered without the checks; what is captured is the same.
"""

from __future__ import annotations

import functools

import torch
from torch._ops import OperatorBase
from torch.export import decomp_utils, exported_program


def install() -> None:
    listed = functools.cache(lambda namespaces, collect=exported_program._collect_all_valid_cia_ops: collect())
    for module in (exported_program, decomp_utils):
        module._collect_all_valid_cia_ops = lambda: listed(frozenset(torch.ops._dir))
    checked = OperatorBase.py_impl

    def py_impl(self, key):
        if not isinstance(key, torch._C.DispatchKey) or key in self.py_kernels:
            return checked(self, key)

        def register(function):
            self.py_kernels[key] = function
            self._dispatch_cache.clear()
            return function

        return register

    OperatorBase.py_impl = py_impl
