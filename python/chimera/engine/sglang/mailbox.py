"""What takes the place of SGLang's sockets: orders become its requests on one side, its batches our deltas on the other.

SGLang's scheduler reads a socket until it is empty and writes its output to another. Both are objects it is given, so
it is given these. The order of things stays SGLang's own: one look at the post per step, before the step.
"""

from __future__ import annotations

import re
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import zmq
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchEmbeddingOutput,
    BatchTokenIDOutput,
    FlushCacheReqInput,
    FlushCacheReqOutput,
    TokenizedEmbeddingReqInput,
    TokenizedGenerateReqInput,
)
from sglang.srt.sampling.sampling_params import SamplingParams

from chimera.engine.api import Flush, Limit, Order, Post, Submission, Withdrawal
from chimera.errors import ChimeraError
from chimera.msg.events import Outcome
from chimera.msg.stream import Sampling, TokenDelta, TokenLogprobs

_END_OF_ID = ";"
"""SGLang aborts every request whose id *starts* with the given one: with a mark at the end, no id begins another."""

_ENDINGS = {"stop": Outcome.STOP, "length": Outcome.LENGTH}


_PLACE_IN_SOURCE = re.compile(r"\[[\d:]+\] \S+:\d+: ")
"""What a grammar's compiler puts before its reasons."""
_LOOK_AGAIN_S = 0.002
_SHORT_OF_MEMORY = "Out of memory"
"""How SGLang begins when it aborts a request that it could not keep: no fault of the request, so it is brought again."""


class Memory(Protocol):
    """KV memory that changes between two steps."""

    @property
    def stalled(self) -> bool:
        """Requests wait, nothing runs, and no step will change that."""

    @property
    def restless(self) -> bool:
        """Something is under way that goes on without a step."""

    def limit(self, order: Limit) -> None: ...

    def breathe(self, give_back: Callable[[str, str], None]) -> None:
        """Change what can be changed now. `give_back` takes SGLang's name of a request that must leave, and why."""


class Forms(Protocol):
    """What answers can be held to, once it is there."""

    fault: str
    """Why none can."""

    def are_ready(self) -> bool: ...

    def resume(self, rid: str, tokens: int) -> None: ...


class Mailbox:
    """One model's requests in this process, from their submission to their last token."""

    def __init__(
        self,
        post: Post,
        *,
        idle: Callable[[], bool],
        memory: Memory | None = None,
        grammars: Forms | None = None,
        embeds: bool = False,
    ) -> None:
        self._post = post
        self._idle = idle
        self._memory = memory
        self._grammars = grammars
        self._embeds = embeds
        self._held: list[Submission] = []
        """Requests with a form, until forms can be kept."""
        self._incoming: deque[Any] = deque()
        self._submitted = 0
        self._open: dict[str, int] = {}
        """Request id → log-probability alternatives wanted, -1 for none."""

    def abandon(self) -> None:
        """Whatever requests SGLang has of an earlier post, it shall let go of."""
        self._incoming.append(AbortReq(abort_all=True))

    # As the socket that SGLang reads.

    def recv_pyobj(self, flags: int = 0) -> Any:
        if not self._incoming:
            self._look_up()
        if not self._incoming:
            raise zmq.Again
        return self._incoming.popleft()

    def _look_up(self) -> None:
        """Between two steps: what changes now, the next step sees whole."""
        if self._memory is not None:
            self._memory.breathe(self._give_back)
        if self._held and self._grammars is not None and self._grammars.are_ready():
            held, self._held = self._held, []
            for submission in held:
                self._bring(submission)
        limited = False
        for order in self._post.collect(self._patience_s()):
            limited |= isinstance(order, Limit)
            self._take(order)
        if limited and self._memory is not None:
            self._memory.breathe(self._give_back)

    def _patience_s(self) -> float | None:
        """With nothing open and SGLang's own queues empty, sleeping in `collect` is the whole cost of an idle worker."""
        if self._incoming:
            return 0.0
        if self._held and len(self._held) == len(self._open):
            return _LOOK_AGAIN_S
        restless = self._memory is not None and self._memory.restless
        if self._memory is not None and self._memory.stalled:
            return _LOOK_AGAIN_S
        if not self._open and self._idle():
            return _LOOK_AGAIN_S if restless else None
        return 0.0

    def _take(self, order: Order) -> None:
        match order:
            case Submission(request_id, payload):
                self._open[request_id] = -1 if payload.logprobs is None else payload.logprobs
                self._bring(order)
            case Withdrawal(request_id):
                if self._open.pop(request_id, None) is None:
                    return
                others = [held for held in self._held if held.request_id != request_id]
                if len(others) < len(self._held):
                    self._held = others
                else:
                    self._incoming.append(AbortReq(rid=request_id + _END_OF_ID))
            case Flush():
                self._incoming.append(FlushCacheReqInput())
            case Limit():
                if self._memory is None:
                    raise ChimeraError("a limit was set on a KV pool of fixed size")
                self._memory.limit(order)

    def _bring(self, submission: Submission) -> None:
        """To SGLang, if it can do what is asked."""
        payload = submission.payload
        if payload.embeds != self._embeds:
            makes = "makes embeddings and no text" if self._embeds else "generates text and makes no embeddings"
            self._refuse(submission, f"the model {makes}")
            return
        if payload.sampling.grammar is not None:
            if self._grammars is None or not self._grammars.are_ready():
                self._held.append(submission)
                return
            if self._grammars.fault:
                self._refuse(submission, self._grammars.fault)
                return
            if payload.resumed_tokens:
                self._grammars.resume(submission.request_id + _END_OF_ID, payload.resumed_tokens)
        self._submitted += 1
        make = _embedding_request if self._embeds else _generate_request
        self._incoming.append(make(submission, turn=self._submitted))

    def _refuse(self, submission: Submission, reason: str) -> None:
        del self._open[submission.request_id]
        self._post.fail(submission.request_id, "unsupported_parameter", reason)

    # As the sender that SGLang hands its batches to.

    def send_output(self, output: Any, recv_obj: object = None) -> None:
        if isinstance(output, BatchTokenIDOutput | BatchEmbeddingOutput):
            deltas = list(self._deltas(output) if isinstance(output, BatchTokenIDOutput) else self._embeddings(output))
            if deltas:
                self._post.deliver(deltas)
        elif isinstance(output, FlushCacheReqOutput):
            self._post.flushed()
        elif isinstance(output, AbortReq) and (request_id := output.rid.removesuffix(_END_OF_ID)) in self._open:
            # Thrown out of SGLang's waiting queue, not asked for by us.
            self._give_up(request_id, output.finished_reason)

    def _deltas(self, batch: BatchTokenIDOutput) -> Iterator[TokenDelta]:
        for i, rid in enumerate(batch.rids):
            request_id = rid.removesuffix(_END_OF_ID)
            alternatives = self._open.get(request_id)
            if alternatives is None:
                continue  # withdrawn while the step ran
            reason = batch.finished_reasons[i]
            if reason is not None and reason["type"] == "abort":
                self._give_up(request_id, reason)
                continue
            outcome = matched = None
            if reason is not None:
                outcome = _ENDINGS[reason["type"]]
                matched = reason.get("matched")
                del self._open[request_id]
            yield TokenDelta(
                request_id,
                list(batch.output_ids[i]),
                outcome,
                cached_tokens=batch.cached_tokens[i],
                matched_stop=matched if isinstance(matched, int) else None,
                logprobs=_logprobs(batch, i, alternatives) if alternatives >= 0 else None,
            )

    def _embeddings(self, batch: BatchEmbeddingOutput) -> Iterator[TokenDelta]:
        for i, rid in enumerate(batch.rids):
            request_id = rid.removesuffix(_END_OF_ID)
            reason = batch.finished_reasons[i]
            if request_id not in self._open:
                continue
            if reason is not None and reason["type"] == "abort":
                self._give_up(request_id, reason)
                continue
            del self._open[request_id]
            numbers = array("f", batch.embeddings[i])
            if sys.byteorder == "big":
                numbers.byteswap()
            yield TokenDelta(request_id, [], Outcome.STOP, cached_tokens=batch.cached_tokens[i], embedding=numbers.tobytes())

    def _give_back(self, rid: str, why: str) -> None:
        """Unless it has ended meanwhile: it leaves SGLang, and comes again from outside when there is room for it."""
        request_id = rid.removesuffix(_END_OF_ID)
        if self._open.pop(request_id, None) is not None:
            self._post.give_back(request_id, why)
            self._incoming.append(AbortReq(rid=rid))

    def _give_up(self, request_id: str, reason: dict[str, Any] | None) -> None:
        del self._open[request_id]
        message = (reason or {}).get("message") or "the engine gave the request up"
        status = (reason or {}).get("status_code")
        if self._memory is not None and message.startswith(_SHORT_OF_MEMORY):
            self._post.give_back(request_id, message)
            return
        code = "bad_request" if status == 400 else "engine_failure"
        self._post.fail(request_id, code, _PLACE_IN_SOURCE.sub("", message).strip())


def _generate_request(submission: Submission, *, turn: int) -> TokenizedGenerateReqInput:
    payload = submission.payload
    return TokenizedGenerateReqInput(
        rid=submission.request_id + _END_OF_ID,
        input_text="",
        input_ids=array("q", payload.input_ids),
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=_sampling_params(payload.sampling),
        return_logprob=payload.logprobs is not None,
        logprob_start_len=-1,
        top_logprobs_num=payload.logprobs or 0,
        token_ids_logprob=None,
        stream=True,
        # Scheduled in the order in which it comes, whatever this says; who yields when memory is short, `plugin.py` reads here.
        priority=-turn,
    )


def _embedding_request(submission: Submission, *, turn: int) -> TokenizedEmbeddingReqInput:
    params = SamplingParams(max_new_tokens=0)
    params.normalize(None)
    return TokenizedEmbeddingReqInput(
        rid=submission.request_id + _END_OF_ID,
        input_text="",
        input_ids=array("q", submission.payload.input_ids),
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=params,
        priority=-turn,
    )


def _sampling_params(sampling: Sampling) -> SamplingParams:
    params = SamplingParams(
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=sampling.min_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        repetition_penalty=sampling.repetition_penalty,
        stop_token_ids=set(sampling.stop_token_ids) or None,
        ignore_eos=sampling.ignore_eos,
        sampling_seed=sampling.seed,
        logit_bias=None if sampling.logit_bias is None else {str(t): bias for t, bias in sampling.logit_bias.items()},
        **({} if sampling.grammar is None else {sampling.grammar.kind: sampling.grammar.text}),
    )
    params.normalize(None)
    return params


def _logprobs(batch: BatchTokenIDOutput, i: int, alternatives: int) -> list[TokenLogprobs]:
    values, ids = batch.output_token_logprobs_val[i], batch.output_token_logprobs_idx[i]
    if not alternatives:
        return [TokenLogprobs(int(token), float(value)) for token, value in zip(ids, values, strict=True)]
    tops = zip(batch.output_top_logprobs_idx[i], batch.output_top_logprobs_val[i], strict=True)
    return [
        TokenLogprobs(int(token), float(value), tuple(zip(map(int, top_ids), map(float, top_values), strict=True)))
        for token, value, (top_ids, top_values) in zip(ids, values, tops, strict=True)
    ]
