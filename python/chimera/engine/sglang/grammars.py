"""Answers held to a form: SGLang's grammar backend, built when a model's first such request comes.

Building it needs the tokenizer, which costs more than becoming a tiny model, so a worker has neither until then; a thread
builds both while the steps of others go on. Knows SGLang's scheduler and requests, no order and no post.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from sglang.srt.constrained.base_grammar_backend import BaseGrammarObject, create_grammar_backend
from sglang.srt.utils.hf_transformers_utils import get_tokenizer

from chimera.engine.sglang import versions

log = logging.getLogger(__name__)

_FIRST_ON_CPU = (0, 5, 20)
"""Before, a grammar's mask could not be laid over logits on a CPU: SGLang's scheduler died of it."""


class Grammars:
    """Of the model that is up. `bind` gives it the scheduler."""

    def __init__(self, tokenizer_path: str, *, on_cpu: bool) -> None:
        self._tokenizer_path = tokenizer_path
        self._scheduler: Any = None
        self._building: threading.Thread | None = None
        self._resumed: dict[str, int] = {}
        self.fault = ""
        """Why no answer can be held to a form."""
        release = versions.require_supported()
        if on_cpu and release < _FIRST_ON_CPU:
            told = ".".join(map(str, release))
            self.fault = f"SGLang {told} cannot hold an answer to a form on a CPU"

    def bind(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def are_ready(self) -> bool:
        """Whether requests may come, be it to fail. Begins to build with the first question."""
        if self.fault or self._scheduler.grammar_manager.grammar_backend is not None:
            return True
        if self._building is None:
            self._building = threading.Thread(target=self._build, name="grammars", daemon=True)
            self._building.start()
        return False

    def resume(self, rid: str, tokens: int) -> None:
        """The last `tokens` of this request's prompt are its answer so far."""
        self._resumed[rid] = tokens

    def catch_up(self, req: Any) -> None:
        """The request is about to be scheduled: its grammar goes through what the answer has of it already."""
        tokens = self._resumed.pop(req.rid, 0)
        if not tokens or not isinstance(req.grammar, BaseGrammarObject):
            return
        try:
            for token_id in req.origin_input_ids[-tokens:]:
                req.grammar.accept_token(token_id)
        except ValueError as fault:
            req.set_finish_with_abort(f"the answer so far does not keep to the form, so it cannot go on: {fault}")

    def settle(self) -> None:
        """No thread builds any more."""
        if self._building is not None:
            self._building.join()

    def close(self) -> None:
        """The scheduler is going; a thread that still builds must not hold it."""
        self.settle()
        self._scheduler = None

    def _build(self) -> None:
        began_s = time.perf_counter()
        scheduler = self._scheduler
        try:
            backend = create_grammar_backend(
                scheduler.server_args,
                get_tokenizer(self._tokenizer_path),
                scheduler.model_config.vocab_size,
                scheduler.model_config.hf_eos_token_id,
            )
        except Exception as fault:
            log.warning("no grammar backend", exc_info=True)
            self.fault = f"the model's answers cannot be held to a form: {type(fault).__name__}: {fault}"
            return
        if backend is None:
            self.fault = "the model's tokenizer is not one that answers can be held to a form with"
            return
        scheduler.grammar_manager.grammar_backend = backend
        log.info("built grammar backend seconds=%.3f", time.perf_counter() - began_s)
