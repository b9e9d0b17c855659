"""What a step would launch on a GPU, counted on the CPU, alike for this repository and the libraries it is held against.

A launch takes the host some 5 us, whatever it computes: small steps wait for launches alone. Their number depends on the depth
of a model and neither on its width nor on the machine, so models of the published depth and small widths do.

    with Launches() as count:
        step()
    count.total, count.by_name["mm"], count.reads

PyTorch operations count as one each, unless they only make another view of memory or reserve some. That is what a GPU launches
for nearly all of them; where the CPU takes an operation apart (attention with a mask), the parts count. A kernel of ours counts
as one: with ops.set_backend("triton") and TRITON_INTERPRET=1 the models call their kernels here.
"""

from collections import Counter
from unittest import mock

import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# Beside views: new names for the same memory, and memory that nothing has been written to.
FREE = {
    "_reshape_alias", "_unsafe_view", "alias", "detach", "empty", "empty_like", "empty_permuted", "empty_strided", "lift_fresh",
    "new_empty", "new_empty_strided", "resize_", "set_",
}  # fmt: skip

# What hands values to the host, which on a GPU waits for everything queued before. nonzero: the host must know its length.
READS = (
    "item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__", "__dlpack__",
)  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts while it is entered. total: launches; by_name: of each operation or kernel; reads: transfers to the host.

    run_kernels=False counts kernels without running them, which takes the interpreter milliseconds per program: what they would
    have written holds anything then, so it serves where launches do not depend on values.
    """

    def __init__(self, run_kernels: bool = True):
        super().__init__()
        self.run_kernels, self.by_name, self.reads = run_kernels, Counter(), 0

    @property
    def total(self) -> int:
        return self.by_name.total()

    def __enter__(self):
        count, run = self, (kind := type(_kernel)).run

        def launch(kernel, *args, **kwargs):
            count.by_name[kernel.__name__] += 1
            if count.run_kernels:
                with _disable_current_modes():  # the interpreter's own operations are none of the step's
                    return run(kernel, *args, **kwargs)

        self._patch, self._reads = mock.patch.object(kind, "run", launch), _Reads(self)
        self._patch.start()
        self._reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._reads.__exit__(*error)
        self._patch.stop()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, result = function._schema.name.partition("::")[2], function(*args, **(kwargs or {}))
        if isinstance(result, Tensor | tuple | list) and not function.is_view and name not in FREE:
            self.by_name[name] += 1
        return result


class _Reads(TorchFunctionMode):
    def __init__(self, count: Launches):
        super().__init__()
        self.count = count

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        self.count.reads += name in READS and isinstance(args[0], Tensor)
        return function(*args, **(kwargs or {}))


@triton.jit
def _kernel():
    """Its class is that of every kernel: the interpreter's here, the compiler's on a GPU."""
