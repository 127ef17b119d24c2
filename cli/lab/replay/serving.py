"""A continuous-batching serving simulation: the lengths and KV pages that a real request trace causes.

No model runs. The simulation provides what a metadata refresh reads: which requests run, how long they are, and where
their tokens are in a paged KV pool.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from onelaunch.errors import ArgumentError
from torch import Tensor

from .pool import Ints, PagedAllocator, row_width
from .traces import Trace


@dataclass(slots=True)
class Request:
    """One request.

    Attributes:
        number: its place in the trace, from 0.
        prompt_tokens: prompt length in tokens, clipped to the context length.
        output_tokens: tokens after which it is finished.
        generated: tokens generated before it last left the batch; preserved over a preemption.
    """

    number: int
    prompt_tokens: int
    output_tokens: int
    generated: int = 0

    @property
    def tokens(self) -> int:
        """Length in tokens with which it enters the batch."""
        return self.prompt_tokens + self.generated


@dataclass(frozen=True, eq=False)
class Step:
    """One decoding step: what a metadata refresh gets. Valid until the next step.

    Attributes:
        number: from 0.
        clock_ms: simulated time, milliseconds.
        seq_lens: int64 [bs] on the device, tokens; 1 for a padding request.
        req_pool_indices: int64 [bs] on the device, rows of req_to_token; 0 for a padding request.
        lengths: the values of seq_lens on the host, int64 [bs].
        requests: how many of the bs aren't padding; they come first.
        max_len: the largest of lengths.
    """

    number: int
    clock_ms: float
    seq_lens: Tensor
    req_pool_indices: Tensor
    lengths: Ints
    requests: int
    max_len: int


class ServingSimulation:
    """Iterates over the decoding steps that serving ``trace`` takes.

    Requests are admitted in the order of their arrival, when the batch has a place and the pool has pages for
    their tokens and a round of drafts. In a step every request accepts 1 to num_backends + 1 tokens, and
    finishes when it has its output or fills the context. If decoding runs out of pages, the request that was
    admitted last gives up its own and waits at the head of the queue, with the tokens it has generated.

    Args:
        trace: the requests.
        max_batch: requests that run at once, at most.
        context_len: tokens of a request, at most. Longer prompts are clipped to it.
        num_backends: draft steps in a step; num_backends + 1 draft tokens are written past a sequence.
        page_size: tokens in a page.
        pages: pages in the pool with the padding page; None is half of what max_batch full contexts need.
        step_ms: simulated milliseconds that a step takes.
        preempt_probability: chance of each running request to lose its pages after a step and queue again.
        pad_batch: round batches up to a multiple of this (and at most to max_batch) with padding requests,
            the way engines fit them to captured CUDA graphs.
        seed: of all random choices.
        device: where the tensors of the steps and req_to_token lie.

    Attributes:
        allocator: rows and pages.
        req_to_token: int32 [max_batch + 1, width] on the device, width odd; its address never changes.
        clock_ms: simulated time, milliseconds.
        finished: requests that are done.
        clipped_prompts: requests that arrived with a prompt above context_len.
        preemptions: times that a request lost its pages, by chance or by lack of pages.
        queued_steps: steps before which a request waited for a place in the batch or for pages.

    Raises:
        ArgumentError: a number is out of range.
    """

    def __init__(
        self,
        trace: Trace,
        *,
        max_batch: int = 64,
        context_len: int = 16384,
        num_backends: int = 3,
        page_size: int = 64,
        pages: int | None = None,
        step_ms: float = 30.0,
        preempt_probability: float = 0.0,
        pad_batch: int = 1,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (
            ("max_batch", max_batch),
            ("context_len", context_len),
            ("num_backends", num_backends),
            ("page_size", page_size),
            ("pad_batch", pad_batch),
        ):
            if value < 1:
                raise ArgumentError(f"{name} is {value}; it must be 1 or more.")
        if not 0 < step_ms < float("inf"):
            raise ArgumentError(f"step_ms is {step_ms}; a step must take more than 0 milliseconds.")
        if not 0 <= preempt_probability <= 1:
            raise ArgumentError(f"preempt_probability is {preempt_probability}; it must be between 0 and 1.")
        if seed < 0:
            raise ArgumentError(f"seed is {seed}; it must be 0 or more.")

        self.max_batch = max_batch
        self.context_len = context_len
        self.num_draft_tokens = num_backends + 1
        self.step_ms = step_ms
        self.preempt_probability = preempt_probability
        self.pad_batch = pad_batch
        self.device = torch.device(device)

        # A request of full length with its drafts must fit, or it would wait forever.
        full = -(-(context_len + self.num_draft_tokens) // page_size)
        if pages is None:
            pages = 1 + max(full, full * max_batch // 2)
        if pages < 1 + full:
            raise ArgumentError(
                f"pages is {pages}; a request of {context_len} tokens with {self.num_draft_tokens} draft "
                f"tokens needs {full} pages of {page_size}, and one is for padding: allow {1 + full} or more."
            )
        self._rng = np.random.default_rng(seed)
        self.allocator = PagedAllocator(
            max_requests=max_batch,
            width=row_width(context_len, self.num_draft_tokens, page_size),
            page_size=page_size,
            pages=pages,
            rng=self._rng,
        )
        # On the CPU the master copy serves; .to() returns it as it is.
        self.req_to_token = self.allocator.req_to_token.to(self.device)

        self.clock_ms = 0.0
        self.finished = 0
        self.clipped_prompts = 0
        self.preemptions = 0
        self.queued_steps = 0
        self._trace = trace
        self._arrived = 0
        self._waiting: deque[Request] = deque()
        # The batch: rows in the order of admission; what belongs to a request is indexed by its row.
        self._rows: Ints = np.empty(0, np.int64)
        self._requests: dict[int, Request] = {}
        self._lengths = np.zeros(max_batch + 1, np.int64)
        self._remaining = np.zeros(max_batch + 1, np.int64)

    @property
    def running(self) -> dict[int, Request]:
        """Requests in the batch by their row."""
        return dict(self._requests)

    @property
    def waiting(self) -> int:
        """Requests that have arrived and aren't in the batch."""
        return len(self._waiting)

    def __iter__(self) -> Iterator[Step]:
        number = 0
        while self._admit():
            self._upload()
            yield self._step(number)
            self._accept()
            self.clock_ms += self.step_ms
            number += 1

    def _admit(self) -> bool:
        """Take arrivals into the queue and the queue into the batch. False when everything is done."""
        arrivals = self._trace.arrival_ms
        if not self._requests and not self._waiting:
            if self._arrived == len(arrivals):
                return False
            self.clock_ms = max(self.clock_ms, float(arrivals[self._arrived]))
        while self._arrived < len(arrivals) and arrivals[self._arrived] <= self.clock_ms:
            self._waiting.append(self._arrival(self._arrived))
            self._arrived += 1

        admitted = []
        while self._waiting:
            request = self._waiting[0]
            room = request.tokens + self.num_draft_tokens
            # The head of the queue isn't overtaken: a shorter request behind it could starve it.
            if not self.allocator.can_admit(room):
                self.queued_steps += 1
                break
            self._waiting.popleft()
            row = self.allocator.admit(room)
            self._requests[row] = request
            self._lengths[row] = request.tokens
            self._remaining[row] = request.output_tokens - request.generated
            admitted.append(row)
        if admitted:
            self._rows = np.concatenate([self._rows, np.array(admitted, np.int64)])
        return True

    def _arrival(self, number: int) -> Request:
        prompt = int(self._trace.input_tokens[number])
        if prompt > self.context_len:
            self.clipped_prompts += 1
            prompt = self.context_len
        return Request(number, prompt, int(self._trace.output_tokens[number]))

    def _upload(self) -> None:
        changes = self.allocator.drain_changes()
        if changes is None or self.device.type == "cpu":
            return
        positions, values = (torch.from_numpy(a).to(self.device) for a in changes)  # pragma: gpu
        self.req_to_token.view(-1).index_copy_(0, positions, values)  # pragma: gpu

    def _step(self, number: int) -> Step:
        requests = len(self._rows)
        bs = min(-(-requests // self.pad_batch) * self.pad_batch, self.max_batch)
        rows = np.zeros(bs, np.int64)
        lengths = np.ones(bs, np.int64)
        rows[:requests] = self._rows
        lengths[:requests] = self._lengths[self._rows]
        return Step(
            number=number,
            clock_ms=self.clock_ms,
            # Copies, so that later changes on either side don't affect the other.
            seq_lens=torch.tensor(lengths, device=self.device),
            req_pool_indices=torch.tensor(rows, device=self.device),
            lengths=lengths,
            requests=requests,
            max_len=int(lengths.max()),
        )

    def _accept(self) -> None:
        """Requests take their accepted tokens; the finished ones leave, the others get room for the next."""
        rows = self._rows
        accepted = self._rng.integers(1, self.num_draft_tokens + 1, size=len(rows))
        self._lengths[rows] = np.minimum(self._lengths[rows] + accepted, self.context_len)
        self._remaining[rows] -= accepted
        done = (self._remaining[rows] <= 0) | (self._lengths[rows] >= self.context_len)
        for row in rows[done].tolist():
            self.allocator.free(row)
            del self._requests[row]
        self.finished += int(done.sum())
        self._rows = rows = rows[~done]

        if self.preempt_probability:
            lost = self._rng.random(len(rows)) < self.preempt_probability
            self._preempt(rows[lost].tolist())
            self._rows = rows = rows[~lost]

        short = self.allocator.short_of_pages(rows, self._lengths[rows] + self.num_draft_tokens)
        if short.any():
            self._grow(rows[short].tolist())

    def _grow(self, short: list[int]) -> None:
        """Give pages to the rows that need them; if none is free, from the requests admitted last."""
        batch = self._rows.tolist()
        preempted: set[int] = set()
        for row in short:
            if row in preempted:
                continue
            while not self.allocator.grow(row, int(self._lengths[row]) + self.num_draft_tokens):
                last = batch.pop()
                preempted.add(last)
                self._preempt([last])
                if last == row:
                    break
        self._rows = np.array(batch, np.int64)

    def _preempt(self, rows: list[int]) -> None:
        """Put requests back at the head of the queue, the earliest admitted first."""
        for row in reversed(rows):
            request = self._requests.pop(row)
            request.generated = int(self._lengths[row]) - request.prompt_tokens
            self.allocator.free(row)
            self._waiting.appendleft(request)
            self.preemptions += 1
