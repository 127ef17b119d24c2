"""A loaded kernel with its constant parameter words. A plan launches it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import log
from ..build import toolchain
from ..errors import LaunchError
from ..load import loader
from ..spec import layout
from ..spec.config import KernelConfig
from ..spec.fields import FIELDS, MetadataBuffers
from ..variables import NVTX_VARIABLE

# The codes that leave CUDA's context unusable, which a kernel causes while it runs: "the process must be terminated and
# relaunched" in driver_types.h, and uncorrectable errors of memory (214) and NVLink (220).
_LOST = {214, 220, 226, 700, 702, 710, *range(714, 720), 721}
LOST = (
    "A kernel that was launched before this call, of any library in this process, has failed, and CUDA refuses "
    "everything since. CUDA_LAUNCH_BLOCKING=1 or compute-sanitizer finds that kernel; start the process again."
)
_CAPTURE_FAILED = 901
_CAPTURE_ADVICE = "Something before this launch ended the capture: end the capture, and capture again without it."


class BoundKernel:
    """A loaded kernel with its constant parameter words set.

    Args:
        config: the configuration.
        device: the device of all tensors.
        values: the words of the parameters that no call changes, by the parameter's name. Parameters that the kernel
            doesn't have are ignored; what the launch sets, ``device`` and ``sm_count`` are added here.

    Attributes:
        kernel: the kernel.
        run: run(owner, arguments...): one launch on the device's current stream. If the arguments (tensors, ints and
            None) differ from those of the last 8 different calls, it calls owner._check(arguments...), which raises or
            returns the words.
        launch: launch(words..., stream): the bare launch, for measurements.
        follow: follow(inputs, spans, arguments): from now on run() with so many arguments calls owner._check only for
            those that differ from the last calls' in more than the addresses of tensors, or overlap the spans (first
            and last addresses). The call's words begin with an address and a stride of each input, which is an
            argument or a view of one: ``inputs`` has that argument's index.

    Raises:
        LaunchError: the kernel can't run on the device, or can't read the tensors of this torch.
        ToolchainError, CompileError, JitPolicyError, StoreError: see loader.load.
    """

    def __init__(self, config: KernelConfig, device: torch.device, values: dict[str, list[int]]) -> None:
        start = time.perf_counter()
        archs, ordinal, sm_count = None, 0, 1
        if device.type == "cuda":  # pragma: gpu
            archs, ordinal = toolchain.architectures(device.index), device.index
            sm_count = torch.cuda.get_device_properties(device).multi_processor_count
        self._config, self._device = config, device
        self.kernel = loader.load(config, archs)
        module = self.kernel.module
        try:
            # Loads the kernel on the device now, because a first launch inside a graph capture couldn't.
            module.prepare(ordinal)
        except RuntimeError as error:
            built_for = ", ".join("sm_" + arch for arch in self.kernel.archs) or "the CPU"
            advice = _advice(error) or f"It was built for {built_for}."
            raise LaunchError(f"{config.symbol} can't be loaded on {device}: {error}. {advice}") from error
        try:
            module.register_classes(Tensor, torch.dtype, MetadataBuffers, tuple(FIELDS))
        except (AttributeError, RuntimeError) as error:  # no such functions, or of another DLPack version
            raise LaunchError(
                f"{config.symbol} can't read the tensors of torch {torch.__version__}: {error}. It needs "
                "torch.Tensor.__dlpack_c_exchange_api__ of DLPack 1: install torch 2.11 or later."
            ) from error
        launched = {name: [0] for name in layout.SET_BY_LAUNCH}
        values = {"device": [ordinal], "sm_count": [sm_count], **launched, **values}
        words = [word for m in layout.members(config) if not m.per_call for word in values[m.name]]
        self._plan = module.bind(words, ordinal if device.type == "cuda" else -1)
        self.run, self.launch = _with_nvtx(self._plan.run, config.symbol), self._plan.launch
        self.follow = self._plan.follow
        outcome = "hit" if self.kernel.since < start else "miss"
        mark = "edited by hand" if self.kernel.edited else ""
        log.event("bind", config.symbol, self.kernel.key, outcome, time.perf_counter() - start, f"on {device}", mark)

    def launch_error(self, error: RuntimeError) -> LaunchError:
        """The error that a plan's run() raises if its launch failed."""
        return LaunchError(
            f"{self._config.symbol} wasn't launched on {self._device}: {error}. {_advice(error)}".rstrip()
        )


def zeros(what: str, shape: tuple[int, ...], device: torch.device, *, pinned: bool = False) -> Tensor:
    """int64 memory of a plan, which later calls write to: so it is no inference tensor.

    Args:
        what: what it is, in words.
        pinned: in the host's memory, where the device can write.

    Raises:
        LaunchError: CUDA's context is lost.
    """
    try:
        with torch.inference_mode(False):
            return torch.zeros(shape, dtype=torch.int64, device="cpu" if pinned else device, pin_memory=pinned)
    except torch.AcceleratorError as error:
        said = str(error).partition("\n")[0]
        raise LaunchError(f"{what} can't be allocated on {device}: {said}. {LOST}") from error


def _advice(error: RuntimeError) -> str:
    """Whose error it is, where that isn't this kernel's; "" if it may be. The binding's messages have CUDA's code."""
    found = re.match(r"CUDA error (\d+):", str(error))
    code = int(found[1]) if found else 0
    return LOST if code in _LOST else _CAPTURE_ADVICE if code == _CAPTURE_FAILED else ""


def _with_nvtx(run: Callable[..., None], name: str) -> Callable[..., None]:
    """``run`` itself, or with $ONELAUNCH_NVTX=1 ``run`` in an NVTX range. Decided here once, so calls needn't check."""
    if not NVTX_VARIABLE.is_on():
        return run
    nvtx: Any = torch.cuda.nvtx  # its functions have no annotations
    push, pop = nvtx.range_push, nvtx.range_pop
    try:
        push(name)
        pop()
    except RuntimeError as error:
        log.warn_once(f"{NVTX_VARIABLE} is set, but this torch has no NVTX ({error}); there are no ranges.")
        return run

    def ranged(*arguments: Any) -> None:
        push(name)
        try:
            run(*arguments)
        finally:
            pop()

    return ranged
