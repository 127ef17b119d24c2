"""Plan: N backends' buffers bound to one kernel, so that a step is one call and one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..errors import ArgumentError, LaunchError, missing
from ..load.loader import Kernel
from ..spec.config import KernelConfig
from ..spec.cpp import user_name
from ..spec.violations import DIFFERS, VIOLATIONS
from .arguments import Arguments
from .audit import Places, on_host, record
from .bound import LOST, BoundKernel
from .declared import Declarations
from .destinations import Destinations
from .hashes import hashes_of
from .memory import HeldStorages


class Plan:
    """N backends' buffers bound to one kernel. Made by bind().

    Attributes:
        config: the configuration that the kernel is specialized to.
        kernel: the kernel.
        device: the device of all tensors.
        capacity: the largest batch that fits the destinations.
        row_capacity: the largest number of rows that fits. The caller keeps the sum of variable extend lengths within
            it.
        exact: how many requests each call has, whose inputs may be longer: only their first ``exact`` elements count.
            0, the default, for as many as the inputs have, up to ``capacity``.
        regions: the memory that the kernel writes.
        launches: kernel launches so far, without those of audits.
    """

    def __init__(
        self,
        destinations: Destinations,
        config: KernelConfig,
        req_to_token: Tensor,
        columns: int,
        max_len: int | None,
        keep: bool,
        declared: Declarations | None = None,
        audit_every: int | None = None,
    ) -> None:
        self.config = config
        self.device = destinations.device
        self.regions = destinations.regions
        self.launches = 0
        self.exact = 0
        self._arguments = Arguments(destinations, config, columns, max_len)
        self._input_names = self._arguments.input_names
        self.capacity, self.row_capacity = self._arguments.capacity, destinations.rows.capacity
        # Of a checked plan kind, request, value and limit of the first violation; of an audit see audit.py.
        self._violation = record(self.device) if config.reports else None
        self._seen = None if self._violation is None or not config.audits else on_host(self._violation)
        self._places = Places(destinations) if config.audits else None
        self._audit_every, self._auditor = audit_every, None
        if audit_every is not None:
            self._auditor = Plan(
                destinations, config.replace(writes="audit"), req_to_token, columns, max_len, keep, declared
            )
        # Held as it is: it lasts as long as one of the plans that share it.
        self._hashes = hashes_of(destinations, config) if config.hashes_tiles else None
        hashes = None if self._hashes is None else self._hashes.words
        self._bound = BoundKernel(
            config,
            self.device,
            {
                "req_to_token": [req_to_token.data_ptr()],
                "req_to_token_stride": [req_to_token.stride(0)],
                "req_to_token_width": [req_to_token.shape[1]],
                "pool_rows": [req_to_token.shape[0]],
                "row_capacity": [self.row_capacity],
                "filled_width": [destinations.width(config.tables[0]) or 0] if config.page_fill is not None else [0],
                "num_sms": [(destinations.length("paged_mqa_schedule_metadata") or 1) - 1],
                "num_sm_parts": [destinations.length("flashmla_metadata") or 0],
                "packed_capacity": [destinations.length(config.packed) or 0] if config.packed else [0],
                "violation": [0 if self._violation is None else self._violation.data_ptr()],
                "tile_hashes": [0 if hashes is None else hashes.data_ptr()],
                "tile_hashes_stride": [0 if hashes is None else hashes.stride(0)],
                **{config.member(name): destinations.words(name) for name in config.fields},
                **_bounds(destinations, config),
                **{user_name(name): declared.words(name) for name, _ in (*config.sources, *config.maps) if declared},
            },
        )
        self.kernel: Kernel = self._bound.kernel
        self._run = self._bound.run
        self._storages = HeldStorages(
            [*destinations.named(), ("req_to_token", req_to_token), *(declared.read() if declared else [])]
            if keep
            else []
        )

    def run(
        self,
        seq_lens: Tensor,
        req_pool_indices: Tensor,
        extend_seq_lens: Tensor | None = None,
        *,
        max_len: int | None = None,
        captured_size: int | None = None,
        **inputs: Tensor,
    ) -> None:
        """Refreshes every backend: one launch on the device's current stream and nothing else. Capturable.

        Args:
            seq_lens: int [bs] of the dtype that was given to bind(), of any stride, bs up to ``capacity``.
            req_pool_indices: int [bs], likewise; rows of req_to_token. The caller guarantees their range.
            extend_seq_lens: int [bs], likewise: the rows of each request, for a plan with variable extend lengths;
                None for all other plans. The caller guarantees that their sum is at most ``row_capacity``.
            max_len: bound on the columns of this call; None is the bound that was given to bind().
            captured_size: requests, padding included, up to which fields are padded: with padding_len all of them,
                otherwise declared fields with a ``pad``, as many as fit those. None is bs, so that nothing is padded.
            inputs: the declared inputs by name, int [bs], of the dtype that they were declared with, any stride.

        Raises:
            ArgumentError: a tensor doesn't fit; nothing was written.
            LaunchError: CUDA refused the launch.
            AuditError: the refresh was launched, and an earlier audit found something (see ``audit_every`` of bind()).

        In a function compiled by torch.compile it causes a graph break and runs between two graphs; with
        ``fullgraph=True`` that is an error. The functions of api.py can be part of a graph.
        """
        if is_dynamo_compiling():
            # A graph doesn't know which addresses are written, or when.
            torch._dynamo.skip_frame(
                msg="Plan.run can't be in a graph. fused_metadata_precompute_and_broadcast_cuda can, see onelaunch.ops."
            )
        try:
            if not inputs:
                self._run(self, seq_lens, req_pool_indices, extend_seq_lens, max_len, captured_size)
            else:
                values = self._arguments.values(inputs)
                self._run(self, seq_lens, req_pool_indices, extend_seq_lens, max_len, captured_size, *values)
        except RuntimeError as error:
            self._refused(error)
        self.launches += 1
        if self._audit_every and self.launches % self._audit_every == 0:
            self._canary(
                seq_lens, req_pool_indices, extend_seq_lens, max_len=max_len, captured_size=captured_size, **inputs
            )

    def _refused(self, error: RuntimeError) -> NoReturn:
        """Raises the error of a launch that failed."""
        raise self._bound.launch_error(error) from error

    def _canary(self, *tensors: Tensor | None, **named: Any) -> None:
        """Raises what the last audit found, or launches the next one. Waits only to raise."""
        assert self._auditor is not None
        recorded, seen = self._auditor._violation, self._auditor._seen
        assert recorded is not None
        assert seen is not None
        if self.device.type == "cuda":  # pragma: gpu
            with torch.cuda.device(self.device):
                if torch.cuda.is_current_stream_capturing():
                    return
        if int(seen[0]):
            self.check()
        self.audit(*tensors, **named)  # type: ignore[arg-type]
        if seen is not recorded:  # pragma: gpu
            seen.copy_(recorded, non_blocking=True)

    def audit(
        self,
        seq_lens: Tensor,
        req_pool_indices: Tensor,
        extend_seq_lens: Tensor | None = None,
        *,
        max_len: int | None = None,
        captured_size: int | None = None,
        **inputs: Tensor,
    ) -> None:
        """Compares every element that run() would write with what is there: one launch and nothing else. Capturable.

        It writes nothing. check() raises what it found: the first difference reported since the last check(). If
        several elements differ, it isn't defined which one is reported. Columns after the live ones and rows after the
        batch aren't compared, because a refresh leaves them alone.

        Args:
            seq_lens, req_pool_indices, extend_seq_lens, max_len, captured_size, inputs: see run(). Pass those of the
                last run, and launch the audit before they change.

        Raises:
            ArgumentError: a tensor doesn't fit, or the plan wasn't bound with ``audit_every``.
            LaunchError: CUDA refused the launch.
        """
        if self._auditor is None:
            raise ArgumentError("the plan was bound without an audit. Bind it with audit_every=0.")
        self._auditor.exact = self.exact
        self._auditor.run(
            seq_lens, req_pool_indices, extend_seq_lens, max_len=max_len, captured_size=captured_size, **inputs
        )

    def follow_addresses(self, views: Sequence[int] = ()) -> None:
        """Checks inputs once for each dtype, shape and stride: for callers whose inputs are new tensors in each step.

        From now on, inputs at other addresses than the last ones are only checked for overlap with what the plan
        writes. The caller guarantees that no bound tensor and no input was resized (see bind).

        Args:
            views: for a caller that is the owner of its calls (see BoundKernel.run) and passes tensors of which the
                declared inputs are views: for each input the number of that argument, of which seq_lens is 0.
        """
        self._bound.follow(*self._arguments.followed(views))

    def admit(
        self,
        seq_lens: Tensor,
        req_pool_indices: Tensor,
        extend_seq_lens: Tensor | None = None,
        *,
        max_len: int | None = None,
        captured_size: int | None = None,
        **inputs: Tensor,
    ) -> None:
        """Checks the arguments of run() without a launch.

        Raises:
            ArgumentError: as run().
        """
        self._check(
            seq_lens, req_pool_indices, extend_seq_lens, max_len, captured_size, *self._arguments.values(inputs)
        )

    def _check(self, *arguments: Any) -> list[int]:
        """The words of a call. The binding calls it when the arguments differ from those of the last calls."""
        words = self._arguments.words(self.exact, *arguments)
        self._storages.check()
        return words

    def check(self) -> None:
        """Raises what a checked plan's kernel or an audit recorded, and clears it. Waits for the device.

        After a violation the kernel goes on, but reads and writes nothing out of bounds. Only the first violation since
        the last call of check() is reported, and of audits the first difference.

        Raises:
            ArgumentError: an input violated a check, or the plan was bound with neither ``checked`` nor
                ``audit_every``.
            AuditError: an audit found an element that isn't what a refresh writes.
            LaunchError: a kernel failed on the device, of this plan or of any library, so nothing can be read.
        """
        if self._violation is None and self._auditor is None:
            raise ArgumentError(
                "the plan was bound without device checks and without an audit. Bind it with checked=True or "
                "audit_every=0."
            )
        if self.device.type == "cuda":  # pragma: gpu
            try:
                torch.cuda.synchronize(self.device)  # the launch may be on any stream
            except RuntimeError as error:
                said = str(error).partition("\n")[0]
                raise LaunchError(f"{self.config.symbol} can't be checked on {self.device}: {said}. {LOST}") from error
        for plan in (self, self._auditor):
            if plan is not None and plan._violation is not None:
                plan._raise_recorded(plan._violation)

    def _raise_recorded(self, recorded: Tensor) -> None:
        kind, request, value, limit = recorded.tolist()
        if not kind:
            return
        recorded.zero_()
        if self._seen is not None:
            self._seen.zero_()
        if kind == DIFFERS.number:
            assert self._places is not None
            raise self._places.error(request, value, limit)
        raise ArgumentError(VIOLATIONS[kind - 1].sentence.format(request=request, value=value, limit=limit))

    def forget(self) -> None:
        """Makes the next run write everything: somebody else wrote to the tables, or their memory was lost.

        For plans that are bound with ``writes="verified"``, and all that write the same tables; a fill on the device's
        current stream, which can be captured. Call it after a sleep and wake, after an eager write, before a capture.
        Other plans have nothing to forget.
        """
        if self._hashes is not None:
            self._hashes.words.zero_()

    def __repr__(self) -> str:
        return f"Plan({self.config.symbol}, device={self.device}, capacity={self.capacity})"

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise missing("Plan", name, {"limit_columns": "pass max_len to run()"})


def _bounds(destinations: Destinations, config: KernelConfig) -> dict[str, list[int]]:
    """The columns of declared tables and the elements of declared packed fields, by the parameter's name."""
    bounds = {}
    for name in config.computed:
        is_table = config.field(name).kind == "table"
        held = destinations.width(name) if is_table else destinations.length(name)
        bounds[f"{config.member(name)}_{'width' if is_table else 'capacity'}"] = [held or 0]
    return bounds
