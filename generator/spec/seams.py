"""Declarations of what engines compute between the replays of a speculative step's graphs.

SGLang's: each function declares a graph's input buffers by the names of the engine's attributes, for one draft chain
(topk 1). Formulas name tokens by the request's row of req_to_token: the write locations of the tokens after
``base_len``. Where a graph is padded, ``bind(padding_len=...)`` gives padding requests their length, and these fields
have their own pads.
Sources: sglang.srt.speculative, the EAGLE graph runners and workers, and sglang.kernels.ops.speculative.

vLLM's: what vllm.v1.worker.gpu.block_table and the builders' update_draft_decode_metadata write before a draft step.
FlashInfer's: what the plans of its wrappers read.
"""

from __future__ import annotations

from .expressions import Dtype
from .fields import Declaration, RunningSum, Vector, packed, running_sum, vector

# The input buffers of a graph, by the engine's names.
REQUEST_BUFFERS = ("seq_lens", "req_pool_indices")
TOKEN_BUFFERS = ("positions", "out_cache_loc", "input_ids")
DRAFT_BUFFERS = (*REQUEST_BUFFERS, "positions", "out_cache_loc", "topk_index", "topk_p")
VERIFY_BUFFERS = (*REQUEST_BUFFERS, *TOKEN_BUFFERS)
DRAFT_EXTEND_BUFFERS = (
    *REQUEST_BUFFERS,
    *TOKEN_BUFFERS,
    *("extend_seq_lens", "num_accept_tokens", "num_correct_drafts", "select_index"),
)
# How many tokens of a request are inputs, one each, so that the launch copies them too. With more the engine does.
MAX_TOKEN_INPUTS = 8


def of_requests() -> dict[str, Declaration]:
    """seq_lens and req_pool_indices: the batch's own, and padding's."""
    return {
        "seq_lens": vector("base_len", "request", dtype="int64"),
        "req_pool_indices": vector("pool_rows", "request", dtype="int64"),
    }


def of_tokens(tokens: int) -> dict[str, Declaration]:
    """positions, out_cache_loc and input_ids of the next ``tokens`` tokens of each request.

    Without ``input_ids`` where that would take more than MAX_TOKEN_INPUTS inputs.
    """
    declared: dict[str, Declaration] = {
        "positions": vector("base_len + row", rows=tokens, dtype="int64", pad=0),
        "out_cache_loc": vector("token(base_len + row)", rows=tokens, dtype="int64", pad=0),
    }
    if tokens <= MAX_TOKEN_INPUTS:
        formula = token_input(tokens - 1)
        for number in reversed(range(tokens - 1)):
            formula = f"where(row == {number}, {token_input(number)}, {formula})"
        declared["input_ids"] = Vector(formula, rows=tokens, dtype="int64")
    return declared


def token_input(number: int) -> str:
    """The name of the input that has a token of each request."""
    return f"token_{number}"


def draft_step(steps: int) -> dict[str, Declaration]:
    """The draft graph: a chain of ``steps`` tokens, the first of which is given.

    ``topk_p`` is copied by its bits: the input is the tensor seen as int32 (``first_probability``).
    """
    return {
        **of_requests(),
        "positions": vector("base_len", "request", dtype="int64", pad=0),
        "out_cache_loc": vector("token(base_len + row)", rows=steps, dtype="int64", pad=0),
        "topk_index": vector("first_token", "request", dtype="int64"),
        "topk_p": vector("first_probability", "request"),
    }


def verify(tokens: int) -> dict[str, Declaration]:
    """The verification's graph, and the chain that is verified: ``tokens`` draft tokens a request.

    ``retrieve_*`` are those of a chain: request by request the token's number, the next one's place or -1, and no
    sibling. ``mask`` is of the draft tokens alone, [tokens, tokens] a request: each sees those up to itself.
    """
    return {
        **of_requests(),
        **of_tokens(tokens),
        "retrieve_index": vector("request * draft_tokens + row", rows=tokens, dtype="int64"),
        "retrieve_next_token": vector("where(row < draft_tokens - 1, row + 1, -1)", rows=tokens, dtype="int64"),
        "retrieve_next_sibling": vector("-1", rows=tokens, dtype="int64"),
        "mask": vector("row % draft_tokens <= row // draft_tokens", rows=tokens * tokens, dtype="bool"),
        # Triton's: the queries, and the full mask's bytes of each request.
        "qo_indptr": running_sum("draft_tokens", dtype="int64"),
        "mask_indptr": RunningSum("draft_tokens * (base_len + draft_tokens)", dtype="int64"),
        "full_mask": packed(_full_mask(tokens), at="mask_indptr", dtype="bool"),
    }


def _full_mask(tokens: int) -> str:
    """Triton's mask: for each draft token a row of the request's tokens, of which it sees those up to itself."""
    seen = "column <= base_len"
    for row in range(1, tokens):
        first = f"{row} * (base_len + draft_tokens)"
        seen = f"where(column >= {first}, column - {first} <= base_len + {row}, {seen})"
    return seen


def draft_extend(tokens: int) -> dict[str, Declaration]:
    """The draft extension's graph: the draft model sees the ``tokens`` verified ones. ``base_len`` is without them.

    ``accepted`` counts a request's accepted tokens, the target's own included.
    """
    return {
        **of_requests(),
        **of_tokens(tokens),
        "seq_lens": vector("base_len + draft_tokens", "request", dtype="int64"),
        "prefix_lens": vector("base_len", "request"),
        "extend_seq_lens": vector("draft_tokens", "request"),
        "extend_start_loc": vector("request * draft_tokens", "request"),
        "num_accept_tokens": vector("accepted", "request", pad=tokens),
        "num_correct_drafts": vector("accepted - 1", "request", pad=tokens),
        # Padding requests accept nothing: theirs is the last token, and -1 % n is n - 1.
        "select_index": vector("request * draft_tokens + (accepted - 1) % draft_tokens", "request", dtype="int64"),
        # The same + 1, which the engine has in between.
        "select_end": vector("request * draft_tokens + accepted", "request", dtype="int64"),
        "cu_seqlens_q": running_sum("draft_tokens"),
        "qo_indptr": running_sum("draft_tokens", dtype="int64"),
    }


INPUTS: dict[str, Dtype] = {
    "pool_rows": "int64",
    "first_token": "int64",
    "first_probability": "int32",
    "accepted": "int32",
    **{token_input(number): "int64" for number in range(MAX_TOKEN_INPUTS)},
}
"""The inputs that the formulas name."""

# ------------------------------------------------------------------------------------------ vLLM


def vllm_slot_mapping(group: int, *, enabled: bool = True) -> dict[str, Vector]:
    """The slot mapping of a KV-cache group, slots_0 of group 0, with the terms that it names.

    They name the inputs ``idx`` and ``position``, the source table_0 and the constant size_0, of its blocks. A slot
    outside of the block table is -1, also where idx is -1; so is the padding after the requests.

    Args:
        enabled: whether the group has slots; all of them are -1 otherwise.
    """
    g = group
    declared = {
        f"entry_{g}": vector(f"position // size_{g}", "request", dtype="int64"),
        f"offset_{g}": vector(f"position % size_{g}", "request", dtype="int64"),
        f"block_{g}": vector(f"table_{g}(idx, entry_{g})", "request", dtype="int64", missing=-1),
    }
    slot = f"max(block_{g} * size_{g} + offset_{g}, -1)" if enabled else "-1"
    return {**declared, f"slots_{g}": vector(slot, "request", dtype="int64", pad=-1)}


def vllm_request_of_token(index: int) -> Vector:
    """The request of a token in a step with a token for each request, and of padding the last request, ``last``.

    Args:
        index: query_end_0 is the map of where requests end, for index 0.
    """
    return vector(f"where(query_end_{index}(request) > request, request, last)", "request")


# What FlashInfer's plans read, beside the standard kv_indptr and kv_indices, which count tokens. A length below zero
# counts as no tokens, as there. query_len is a constant.
FLASHINFER: dict[str, Declaration] = {
    "kv_len": vector("max(base_len, 0) + offset", "request"),
    "page_indptr": running_sum("ceil_div(kv_len, page_size)"),
    "pages": packed("token(column * page_size) // page_size", at="page_indptr"),
    "last_page_len": vector("where(kv_len > 0, (kv_len - 1) % page_size + 1, 0)", "request"),
    "kv_len_arr": vector("kv_len", "request"),
    "qo_indptr": running_sum("query_len"),
}
