"""Two CUDA devices on a machine that has none: values are real, costs are counted.

A `Phantom` is a tensor that says it is on a GPU; its values lie in a tensor on the CPU, where every
operation computes them. What a GPU refuses raises here as well: tensors of two devices in one
operation, and a wait or a copy from the host inside a capture. What makes the host wait is noted
with the line that asked for it, and so is every launch with the bytes that it reads and writes.
Triton kernels run in the interpreter on the same memory. A captured graph is a tape of operations,
which a replay runs again on the memory of the first time, as a GPU does.
"""

import ctypes
import math
import os
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from nanoglimpse import load
from nanoglimpse.kernels.backends import select
from nanoglimpse.kernels.quantize import QuantizedMatmul
from nanoglimpse.kernels.reference.rope import Rope
from nanoglimpse.kernels.reference.table import TORCH
from nanoglimpse.kernels.varlen import Segments

VIEWS = frozenset(
    [
        "view",
        "_unsafe_view",
        "slice",
        "select",
        "split",
        "split_with_sizes",
        "unbind",
        "transpose",
        "expand",
        "unsqueeze",
        "as_strided",
        "squeeze",
        "narrow",
        "t",
        "permute",
        "alias",
        "detach",
        "diagonal",
        "unfold",
        "view_as",
        "_reshape_alias",
        "chunk",
        "lift_fresh",
        "lift",
    ]
)
ALLOCATIONS = frozenset(["empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"])
# The number of results depends on values, so the host waits for it.
WAITS = frozenset(
    [
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique_consecutive",
        "_unique2",
        "unique_dim",
        "bincount",
        "equal",
        "is_nonzero",
    ]
)
INDEXED = frozenset(["index", "index_put_", "index_put", "_index_put_impl_"])


class Launch(NamedTuple):
    """An operation that the device ran."""

    name: str
    nbytes: int
    where: str


class Ledger:
    """What happened on the phantom devices since `clear`."""

    def __init__(self):
        self.tape = None
        self.fake_attention = None
        self.clear()

    def clear(self):
        self.waits, self.launches, self.pageable = [], [], []

    def wait(self, what):
        if self.tape is not None:
            raise RuntimeError(f"a capture waits: {what} at {where()}")
        self.waits.append(f"{what} at {where()}")

    def copy(self, x, non_blocking=False):
        """A copy of `x` from the host."""
        pinned = getattr(x, "pinned", False)
        if not pinned:
            self.pageable.append(f"{moved(x)} bytes at {where()}")
        if not (pinned and non_blocking):
            self.wait(f"copy of {tuple(x.shape)} from the host")

    def launch(self, name, tensors):
        seen = {id(x): x for x in tensors if isinstance(x, torch.Tensor)}
        self.launches.append(Launch(name, sum(map(moved, seen.values())), where()))

    def names(self):
        return Counter(launch.name for launch in self.launches)

    def nbytes(self):
        return sum(launch.nbytes for launch in self.launches)


LEDGER = Ledger()


def where():
    """The innermost lines of the package on the stack."""
    frame, lines = sys._getframe(1), []
    while frame is not None and len(lines) < 3:
        file = frame.f_code.co_filename
        ours = any(part in file for part in ("/nanoglimpse/", "/kernels/", "/weights/"))
        if ours and "/tests/" not in file:
            lines.append(f"{'/'.join(file.split('/')[-2:])}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines)


def moved(x):
    """Bytes of a tensor; what is expanded is read once."""
    shape = (n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return x.element_size() * math.prod(shape)


class Phantom(torch.Tensor):
    """A tensor on a phantom device."""

    @staticmethod
    def __new__(cls, values, device):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=device,
        )

    def __init__(self, values, device):
        self.values = values

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __repr__(self):
        return f"Phantom({tuple(self.shape)}, {self.dtype}, {self.device})"

    def tolist(self):
        return self.cpu().tolist()

    def data_ptr(self):
        return self.values.data_ptr()

    def untyped_storage(self):
        return self.values.untyped_storage()

    def __getitem__(self, index):
        # torch makes tensors of lists where no dispatch sees it.
        return super().__getitem__(tree_map(uploaded, index, is_leaf=is_list))

    def __setitem__(self, index, value):
        super().__setitem__(tree_map(uploaded, index, is_leaf=is_list), value)


class Mode(TorchDispatchMode):
    """Sees what makes tensors on a phantom device out of none; no gradients."""

    def __enter__(self):
        self.grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch._C._set_grad_enabled(self.grad)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def is_list(x):
    return isinstance(x, list)


def uploaded(index):
    """A list as torch indexes by it."""
    return torch.tensor(index, dtype=None if index else torch.int64) if is_list(index) else index


def plain(x):
    return x.values if isinstance(x, Phantom) else x


def run(func, args, kwargs):
    """Runs an operation on the CPU, and notes what a GPU would have done."""
    name = func.overloadpacket.__name__
    flat = tree_flatten((args, kwargs))[0]
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    phantoms = [x for x in tensors if isinstance(x, Phantom)]
    wanted = kwargs.get("device")
    wanted = torch.device(wanted) if wanted is not None else None
    on_device = wanted is not None and wanted.type == "cuda"
    if not phantoms and not on_device:
        return func(*args, **kwargs)
    key = "CompositeImplicitAutograd"
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)
    if composite and name not in ("to", "linear", "matmul"):
        decomposed = func.decompose(*args, **kwargs)
        if decomposed is not NotImplemented:
            return decomposed
    device = wanted if on_device else phantoms[0].device if phantoms else None
    device = torch.device("cuda", device.index or 0)
    cpu = kwargs | ({"device": torch.device("cpu")} if wanted is not None else {})

    def compute():
        return func(*tree_map(plain, args), **tree_map(plain, cpu))

    if name in ("_to_copy", "to"):
        return transferred(func, args, cpu, compute(), phantoms, wanted, device)
    if phantoms and wanted is not None and not on_device:
        return compute()
    if name == "copy_" and not isinstance(args[0], Phantom):
        LEDGER.wait("copy to the host")
        compute()
        return args[0]
    mixed(name, args, tensors, phantoms)
    waits(name, args, kwargs)
    out = compute()
    if LEDGER.tape is not None:
        LEDGER.tape.append((func, tree_map(plain, args), tree_map(plain, cpu), out))
    return wrapped(name, tensors, phantoms, out, device)


def transferred(func, args, kwargs, out, phantoms, wanted, device):
    source = args[0]
    if phantoms and wanted is not None and wanted.type == "cpu":
        LEDGER.wait(f"copy of {tuple(source.shape)} to the host")
        return out
    if not phantoms:
        if LEDGER.tape is not None:
            raise RuntimeError(f"a capture copies from the host at {where()}")
        LEDGER.copy(source, kwargs.get("non_blocking", False))
        return Phantom(out, device)
    if LEDGER.tape is not None:
        LEDGER.tape.append((func, tree_map(plain, args), tree_map(plain, kwargs), out))
    return wrapped("_to_copy", [source], phantoms, out, device)


def mixed(name, args, tensors, phantoms):
    """Refuses tensors of two devices; torch lets scalars and host indices pass."""
    devices = {x.device for x in phantoms}
    if len(devices) > 1:
        raise RuntimeError(f"{name} of tensors on {sorted(map(str, devices))} at {where()}")
    others = [x for x in tensors if not isinstance(x, Phantom) and x.dim()]
    if not others:
        return
    if name == "copy_":
        LEDGER.copy(args[1], len(args) > 2 and args[2])
    elif name in INDEXED and all(any(x is i for i in args[1]) for x in others):
        for index in others:
            LEDGER.copy(index)
    else:
        raise RuntimeError(f"{name} of tensors on cpu and cuda at {where()}")


def waits(name, args, kwargs):
    if name in WAITS:
        LEDGER.wait(name)
    elif name == "repeat_interleave" and kwargs.get("output_size") is None:
        if not isinstance(args[-1], int):
            LEDGER.wait("repeat_interleave without output_size")
    elif name in INDEXED:
        indices = [x for x in args[1] if isinstance(x, torch.Tensor)]
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            LEDGER.wait(f"boolean {name}")
        if name != "index" and not isinstance(args[2], Phantom):
            LEDGER.wait(f"{name} of a value on the host")


def wrapped(name, tensors, phantoms, out, device):
    own = {id(x.values): x for x in phantoms}
    if name not in VIEWS | ALLOCATIONS | {"_local_scalar_dense"}:
        inplace = name.endswith("_")
        results = [] if inplace else [plain(x) for x in tree_flatten(out)[0]]
        LEDGER.launch(name, [*map(plain, tensors), *results])
    return tree_map_only(
        torch.Tensor, lambda x: own[id(x)] if id(x) in own else Phantom(x, device), out
    )


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options):
    """One launch on a GPU; its result has the layout that `LEDGER.fake_attention` gives it."""
    if not isinstance(q, Phantom):
        return sdpa(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, **options)
    inside = (plain(q), plain(k), plain(v), plain(attn_mask))
    out = sdpa(*inside, dropout_p, is_causal, scale=scale, **options)
    out = LEDGER.fake_attention(out) if LEDGER.fake_attention else out.contiguous()
    if LEDGER.tape is not None:
        raise RuntimeError("the emulated capture has no attention of torch")
    LEDGER.launch("scaled_dot_product_attention", [*inside, out])
    return Phantom(out, q.device)


sdpa = F.scaled_dot_product_attention


class Event:
    """A moment on the host."""

    def __init__(self, enable_timing=False):
        self.moment = None

    def record(self, stream=None):
        if stream is None or torch.device(stream.device).type != "cuda":
            raise RuntimeError("an event is recorded on whatever device is current")

    def elapsed_time(self, other):
        return 0.0

    def synchronize(self):
        LEDGER.wait("an event")


class Stream:
    """Operations run at once, so that streams need no order."""

    def __init__(self, device=None):
        self.device = device

    def wait_stream(self, other):
        pass


class Graph:
    """A tape; replaying it writes to the memory of the capture."""

    def replay(self):
        LEDGER.launches.append(Launch("replay", 0, where()))
        for func, args, kwargs, out in self.tape:
            if func is None:
                kernel, grid = args[:2]
                kernel[grid](*args[2], **kwargs)
                continue
            new = func(*args, **kwargs)
            pairs = zip(tree_flatten(out)[0], tree_flatten(new)[0], strict=True)
            for old, value in pairs:
                if isinstance(old, torch.Tensor) and old.data_ptr() != value.data_ptr():
                    old.copy_(value)


@contextmanager
def capture(graph, stream=None, **options):
    if stream is None or torch.device(stream.device).index is None:
        raise RuntimeError("a capture needs a stream of its own device")
    LEDGER.tape = []
    try:
        yield
    finally:
        graph.tape, LEDGER.tape = LEDGER.tape, None


def launch_of(patched):
    """Launches a kernel in the interpreter, on the memory behind phantoms."""

    def launch(kernel, grid, *args, **options):
        if not math.prod(grid):
            return
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if len({x.device for x in tensors}) > 1:
            raise RuntimeError(f"{kernel.fn.__name__}: tensors on two devices at {where()}")
        inside = tuple(map(plain, args))
        if isinstance(tensors[0], Phantom):
            LEDGER.launch(kernel.fn.__name__, map(plain, tensors))
            if LEDGER.tape is not None:
                LEDGER.tape.append((None, (kernel, grid, inside), options, None))
        patched(kernel, grid, *inside, **options)

    return launch


def install(monkeypatch, capability=(9, 0)):
    """Two devices, cuda:0 and cuda:1, until the test ends; returns the ledger."""
    library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libc10.so"))
    guards = (ctypes.c_void_p * 21).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # c10::DeviceType; a guard of the meta device does nothing
    guards[cuda] = guards[meta]
    put = monkeypatch.setattr
    for name, value in {
        "is_available": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 2,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "phantom",
        "get_device_capability": lambda *_: capability,
        "synchronize": lambda *_: LEDGER.wait("torch.cuda.synchronize"),
        "max_memory_allocated": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": capture,
        "current_stream": Stream,
        "stream": nullcontext,
        "device": nullcontext,
        "device_of": nullcontext,
    }.items():
        put(torch.cuda, name, value)
    # A view of a phantom has a version, which an inference tensor cannot.
    put(torch.inference_mode, "__enter__", lambda self: None)
    put(torch.inference_mode, "__exit__", lambda self, *_: None)
    put(F, "scaled_dot_product_attention", attention)
    put(torch.Tensor, "pin_memory", pinned)
    generator, tensor = torch.Generator, torch.tensor

    class Generator:
        def __new__(cls, device=None):
            return generator()

    put(torch, "Generator", Generator)

    def made(data, *args, device=None, **options):
        out = tensor(data, *args, **options)
        return out if device is None else out.to(device)

    put(torch, "tensor", made)
    select("triton", torch.device("cpu"))  # imports the launchers
    for name, module in list(sys.modules.items()):
        launcher = getattr(module, "launch", None)
        if name.startswith("nanoglimpse.kernels.triton_ops.") and callable(launcher):
            put(module, "launch", launch_of(launcher))
    for name, module in list(sys.modules.items()):
        if name.startswith("nanoglimpse."):
            for kept in vars(module).values():
                # Tables of an earlier test: their copies and waits would not be seen in this one.
                getattr(kept, "cache_clear", int)()
    LEDGER.__init__()
    return LEDGER


def pinned(x):
    copy = x.clone()
    copy.pinned = True
    return copy


def fused(*kernels):
    """The operations of "auto" on a GPU: one launch each, computed by the references.

    The kernels themselves take the interpreter a hundred times as long; those of the operations
    named `kernels` run in it.
    """

    def one_launch(name, reference):
        def call(*args, **options):
            known = name != "skinny_linear" or args[6] is F.linear
            if not (known or isinstance(args[6], QuantizedMatmul)):
                return reference(*args, **options)  # as the launcher, which knows no other product
            flat = tree_flatten((args, options))[0]
            phantoms = [x for x in flat if isinstance(x, Phantom)]
            values = inside(args)
            options = {key: inside(x) for key, x in options.items()}
            out = reference(*values, **options)
            if LEDGER.tape is not None:
                LEDGER.tape.append((reference, values, options, out))
            results = [x for x in tree_flatten(out)[0] if isinstance(x, torch.Tensor)]
            LEDGER.launch(name, [*map(plain, phantoms), *results])
            return tree_map_only(torch.Tensor, lambda x: Phantom(x, phantoms[0].device), out)

        return call

    gpu = select("auto", torch.device("cuda"))
    own = {n for n, op in vars(gpu).items() if callable(op) and op is not getattr(TORCH, n)}
    names = own.difference(kernels)
    return replace(gpu, **{name: one_launch(name, getattr(TORCH, name)) for name in names})


def inside(x):
    """An argument of an operation with the tensors behind its phantoms."""
    if isinstance(x, Segments):
        copy = object.__new__(Segments)
        copy.__dict__ = {name: plain(value) for name, value in vars(x).items()}
        return copy
    if isinstance(x, Rope):
        return Rope(plain(x.cos), plain(x.sin))
    if isinstance(x, QuantizedMatmul):
        if not isinstance(x.scales, Phantom):
            raise RuntimeError(f"scales on the host at {where()}")
        return replace(x, scales=plain(x.scales), dequantize=TORCH.dequantize)
    if isinstance(x, tuple):
        values = map(inside, x)
        return type(x)(*values) if hasattr(x, "_fields") else tuple(values)
    return plain(x)


def engine_on(device, *args, backend="auto", **options):
    """An engine that is loaded on a phantom device."""
    with Mode():
        return load(
            *args, device=device, backend=fused() if backend == "fused" else backend, **options
        )


def move(part, device):
    """Makes the parameters of a module phantoms, in place."""
    for module in part.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                phantom = Phantom(weight.detach(), device)
                setattr(module, name, torch.nn.Parameter(phantom, requires_grad=False))
    return part
