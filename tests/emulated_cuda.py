"""A CUDA device without a GPU: tensors in main memory that behave as if they were on a device.

`OnCuda` wraps a CPU tensor and refuses what a CUDA tensor refuses: to be mixed with CPU tensors, to
become a numpy array, to be pickled. Streams are numbers. `WAITS` counts what makes the host wait;
a copy that does not wait is done only when its stream is waited for, so reading it too early gives
wrong values. `RACES` lists tensors that a stream reads although nothing waited for the stream that
wrote them, and JPEGs that are decoded while the current stream still uses memory that the decoder
may write to. Reuse of memory and real asynchrony are not emulated.

`with emulated_cuda() as device:` turns it on, for this thread and for the package's reading
threads.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import pickle
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import torch
import torchvision.io
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
# Operations whose result the host needs.
WAITING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2"}
# Operations that take tensors of several devices.
MIXING = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_"}
MIXING |= {"_foreach_copy_"}


class EmulatedDevice:
    """What happened on the device: host waits by their reason, and races."""

    def __init__(self):
        self.waits, self.races = collections.Counter(), []
        self.local, self.lock = threading.local(), threading.Lock()
        self.clock, self.written_until = itertools.count(1), 0
        self.waited_until, self.launched = (collections.defaultdict(int) for _ in range(2))
        self.pending = collections.defaultdict(list)

    @property
    def stream(self):
        return getattr(self.local, "stream", 0)

    def tick(self):
        with self.lock:
            self.written_until = self.launched[self.stream] = next(self.clock)
            return self.written_until

    def wait(self, reason, stream=None):
        """Count a wait of the host; everything on the stream is done afterwards."""
        stream = self.stream if stream is None else stream
        self.waits[reason] += 1
        with self.lock:
            self.waited_until[stream] = self.written_until
            copies, self.pending[stream] = self.pending[stream], []
        for target, source in copies:
            target.copy_(source)

    def busy(self, stream):
        """Return whether something was launched on a stream since it was last waited for."""
        return self.launched[stream] > self.waited_until[stream]

    def check(self, tensor, reason):
        if tensor.stream != self.stream and tensor.written > self.waited_until[tensor.stream]:
            where = "".join(traceback.format_stack(limit=12)[:-2])
            self.races.append((reason, tensor.stream, self.stream, where))


DEVICE = EmulatedDevice()


class OnCuda(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        assert not isinstance(inner, OnCuda)
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CPU,
            requires_grad=False,
        )
        wrapper.inner = inner.detach()
        wrapper.stream, wrapper.written = DEVICE.stream, DEVICE.tick()
        return wrapper

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self, **options):
        return f"OnCuda({self.inner!r})"

    def __reduce_ex__(self, protocol):
        if getattr(DEVICE.local, "saves", False):
            return self.inner.__reduce_ex__(protocol)
        raise pickle.PicklingError("a CUDA tensor is being pickled")

    def __array__(self, *args, **options):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = OnCuda(self.inner.clone())
            if getattr(self, "_is_param", False):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]

    def write(self):
        self.stream, self.written = DEVICE.stream, DEVICE.tick()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        base = str(function).split(".")[1]
        tensors = [arg for arg in tree_flatten((args, kwargs))[0] if isinstance(arg, torch.Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, OnCuda)]
        if base not in MIXING and any(t.ndim for t in tensors if not isinstance(t, OnCuda)):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! ({function})"
            )
        for tensor in ours:
            DEVICE.check(tensor, str(function))
        if base in WAITING:
            DEVICE.wait(base)
        if base == "copy_":
            if not isinstance(args[0], OnCuda):
                DEVICE.wait("copy_ to the CPU")
            elif not isinstance(args[1], OnCuda) and args[1].ndim:
                DEVICE.wait("copy_ from pageable memory")
        arguments, options = tree_map(_inner, (args, kwargs))
        result = function(*arguments, **options)
        return cls.result(function, base, result, args, kwargs)

    @staticmethod
    def result(function, base, result, args, kwargs):
        """Return the result of an operation, or its arguments if it changed them."""
        if base.startswith(("_foreach", "_fused")) and base.endswith("_"):
            ours = [arg for arg in tree_flatten((args, kwargs))[0] if isinstance(arg, OnCuda)]
            for tensor in ours:
                tensor.write()
            return None
        if base.endswith("_") and not base.endswith("__") and args:
            if isinstance(args[0], OnCuda):
                args[0].write()
            return args[0]
        if kwargs.get("out") is not None:
            return kwargs["out"]
        return return_and_correct_aliasing(function, args, kwargs, tree_map(_wrapped, result))


def _inner(value):
    return value.inner if isinstance(value, OnCuda) else value


def _wrapped(value):
    is_plain = isinstance(value, torch.Tensor) and not isinstance(value, OnCuda)
    return OnCuda(value.detach()) if is_plain else value


def is_cuda(device):
    return str(device).startswith("cuda") if device is not None else False


class Redirect(TorchFunctionMode):
    """Sends what asks for cuda to `OnCuda`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
        handler = getattr(self, f"_{getattr(function, '__name__', '')}", None)
        if handler is not None and tensor is not None:
            return handler(function, *args, **kwargs)
        if kwargs.pop("pin_memory", False):
            pinned = function(*args, **kwargs)
            pinned.is_emulated_pinned = True
            return pinned
        if is_cuda(kwargs.get("device")):
            result = tree_map(_wrapped, function(*args, **{**kwargs, "device": CPU}))
            if getattr(function, "__name__", "") in ("tensor", "as_tensor", "asarray"):
                DEVICE.wait("copy from the host")
            return result
        return function(*args, **kwargs)

    def _numpy(self, function, tensor, **options):
        if not isinstance(tensor, OnCuda):
            return function(tensor, **options)
        if not options.get("force"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        return self._cpu(None, tensor).numpy()

    def _pin_memory(self, function, tensor, *args):
        assert not isinstance(tensor, OnCuda), "cannot pin: only CPU tensors can be pinned"
        pinned = tensor.clone(memory_format=torch.preserve_format)
        pinned.is_emulated_pinned = True
        return pinned

    def _copy_(self, function, target, source, non_blocking=False):
        if not isinstance(source, OnCuda) or isinstance(target, OnCuda):
            return function(target, source)
        if non_blocking and getattr(target, "is_emulated_pinned", False):
            DEVICE.check(source, "copy_")
            DEVICE.pending[DEVICE.stream].append((target, source.inner.clone()))
            return target
        return function(target, self._cpu(None, source))

    def _cpu(self, function, tensor, **options):
        if not isinstance(tensor, OnCuda):
            return function(tensor, **options)
        DEVICE.check(tensor, "cpu")
        DEVICE.wait("copy to the host")
        return tensor.detach().inner.clone(memory_format=torch.preserve_format)

    def _tolist(self, function, tensor):
        return self._cpu(None, tensor).tolist() if isinstance(tensor, OnCuda) else function(tensor)

    def _cuda(self, function, tensor, *args, **options):
        return self._to(function, tensor, CUDA)

    def _one_hot(self, function, tensor, *args, **options):
        # C++ asks the tensor for its device, which is the CPU.
        return OnCuda(function(_inner(tensor), *args, **options))

    def _to(self, function, tensor, *args, **options):
        device = options.pop("device", None)
        non_blocking = options.pop("non_blocking", False)
        copy = options.pop("copy", False)
        rest = []
        for arg in args:
            if isinstance(arg, str | torch.device):
                device = arg
            elif isinstance(arg, torch.Tensor):
                device = arg.device
                rest.append(arg.dtype)
            elif isinstance(arg, torch.dtype):
                rest.append(arg)
            elif arg is True:
                non_blocking = True
        moves = device is not None and is_cuda(device) != isinstance(tensor, OnCuda)
        if not moves:
            if copy:
                tensor = tensor.clone(memory_format=torch.preserve_format)
            return function(tensor, *rest, **options) if rest or options else tensor
        if not is_cuda(device):
            moved = self._cpu(None, tensor)
            return function(moved, *rest, **options) if rest or options else moved
        converted = function(tensor.detach(), *rest, **options) if rest or options else tensor
        moved = OnCuda(converted.detach().clone(memory_format=torch.preserve_format))
        if not (non_blocking and getattr(tensor, "is_emulated_pinned", False)):
            DEVICE.wait("copy from the host")
        return moved


class Stream:
    numbers = itertools.count(1)

    def __init__(self, device=None, priority=0):
        self.number, self.device = next(self.numbers), CUDA

    def synchronize(self):
        DEVICE.wait("stream", self.number)


class CurrentStream(Stream):
    def __init__(self, number):
        self.number, self.device = number, CUDA


@contextlib.contextmanager
def use_stream(stream):
    before = DEVICE.stream
    DEVICE.local.stream = before if stream is None else stream.number
    try:
        yield
    finally:
        DEVICE.local.stream = before


def synchronize(device=None):
    for stream in {0, *DEVICE.waited_until, *DEVICE.pending, *range(next(Stream.numbers))}:
        DEVICE.wait("device", stream)


class RedirectedPool(ThreadPoolExecutor):
    def submit(self, function, *args, **options):
        def redirected():
            with Redirect():
                return function(*args, **options)

        return super().submit(redirected)


def decode_jpeg(encoded, mode=torchvision.io.ImageReadMode.UNCHANGED, device="cpu", **options):
    """Decode as torchvision does on a device: without waiting for the caller's stream."""
    if not is_cuda(device):
        return _decode_jpeg(encoded, mode, device, **options)
    DEVICE.waits["decode_jpeg"] += 1
    stream = DEVICE.stream
    if DEVICE.busy(stream):
        DEVICE.races.append(("decode_jpeg", stream, stream, ""))
    if any(b"\xff\xc2" in bytes(each.numpy()) for each in encoded):
        raise RuntimeError("nvJPEG cannot decode a progressive JPEG")
    decoded = [OnCuda(_decode_jpeg(each, mode, "cpu")) for each in encoded]
    DEVICE.launched[stream] = 0  # the decoder has a stream of its own
    return decoded


_decode_jpeg = torchvision.io.decode_jpeg


_save = torch.save


def save(*args, **options):
    """Save as torch does: only pickles of the package must not contain CUDA tensors."""
    DEVICE.local.saves = True
    try:
        return _save(*args, **options)
    finally:
        DEVICE.local.saves = False


class _Autocast(torch.autocast):
    def __init__(self, device_type, dtype=None, enabled=True, cache_enabled=None):
        # The CPU has no float16 for many layers, so that all computes in float32.
        is_device = device_type == "cuda"
        super().__init__(
            "cpu" if is_device else device_type,
            dtype=torch.bfloat16 if is_device else dtype,
            enabled=enabled and not is_device,
            cache_enabled=cache_enabled,
        )


_CUDA_FUNCTIONS = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "_lazy_init": lambda: None,
    "Stream": Stream,
    "stream": use_stream,
    "synchronize": synchronize,
    "current_stream": lambda device=None: CurrentStream(DEVICE.stream),
    "empty_cache": lambda: None,
    "device": lambda device: contextlib.nullcontext(),
    "is_bf16_supported": lambda including_emulation=True: True,
    "manual_seed": lambda seed: None,
    "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": lambda state, device="cuda": None,
    "mem_get_info": lambda device=None: (60 << 30, 80 << 30),
    "get_device_name": lambda device=None: "emulated",
    "get_device_properties": lambda device=None: SimpleNamespace(
        total_memory=80 << 30, name="emulated"
    ),
}


@contextlib.contextmanager
def emulated_cuda():
    """Emulate one CUDA device; yields what is counted on it, from zero."""
    from sktransfer.transforms import device_feed, loader

    device_feed._has_decoder.cache_clear()
    DEVICE.waits.clear()
    DEVICE.races.clear()
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    no_check = {
        "_accelerator_graph_capture_health_check": lambda self: None,
        "_cuda_graph_capture_health_check": lambda self: None,
    }
    try:
        with (
            mock.patch.multiple(torch.cuda, **_CUDA_FUNCTIONS),
            mock.patch.multiple(torch.optim.Optimizer, create=True, **no_check),
            mock.patch.object(torch, "autocast", _Autocast),
            mock.patch.object(torch, "save", save),
            mock.patch.object(torchvision.io, "decode_jpeg", decode_jpeg),
            mock.patch.object(loader, "ThreadPoolExecutor", RedirectedPool),
            Redirect(),
        ):
            yield DEVICE
    finally:
        device_feed._has_decoder.cache_clear()
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
