"""Waiting for a device, seen without one.

Tensors on "meta" have shapes and no numbers, and are no CPU's. So whatever needs a number
fails by itself, and what moves numbers to them can be looked at.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NoWaiting(TorchDispatchMode):
    """Fails where a GPU would be waited for: numbers asked for, blocking copies, and tensors
    made on the device from Python's numbers, as by a list of indices."""

    ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")

    def __init__(self, *there):
        super().__init__()
        self.known = list(there)  # kept, so that no id is used twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__.split(".")[0]
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        far = [t for t in tensors if t.device.type == "meta"]
        assert not (far and name in self.ASKS), f"{name} asks the device"
        known = set(map(id, self.known))
        assert all(id(t) in known for t in far), f"{name} of a tensor made of Python's numbers"
        out = func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            came = out.device.type == "meta" and len(far) < len(tensors)
            assert not came or kwargs.get("non_blocking"), "a blocking copy"
        self.known += [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        return out
