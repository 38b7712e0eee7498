"""A worker's spans: of each request the prompt and the tokens, and of each activation the loading. Told when they are over."""

from __future__ import annotations

from chimera.core.record import ANSWERED
from chimera.spans.spans import Spans


class EngineSpans:
    def __init__(self, spans: Spans) -> None:
        self._spans = spans

    def request(
        self,
        trace: str,
        model: str,
        began_s: float,
        first_token_s: float | None,
        ended_s: float,
        *,
        prompt_tokens: int,
        cached_tokens: int,
        output_tokens: int,
        outcome: str,
    ) -> None:
        """From the moment at which the engine was given it."""
        fault = "" if outcome in ANSWERED else outcome
        prefill = self._spans.begin(
            f"prefill {model}",
            trace,
            began_s,
            gen_ai__request__model=model,
            gen_ai__usage__input_tokens=prompt_tokens,
            gen_ai__usage__cache_read__input_tokens=cached_tokens,
        )
        if first_token_s is None:
            self._spans.end(prefill, ended_s, fault)
            return
        self._spans.end(prefill, first_token_s)
        decode = self._spans.begin(
            f"decode {model}",
            trace,
            first_token_s,
            gen_ai__request__model=model,
            gen_ai__usage__output_tokens=output_tokens,
        )
        self._spans.end(decode, ended_s, fault)

    def activation(self, trace: str, model: str, began_s: float, ended_s: float, fault: str = "") -> None:
        span = self._spans.begin(f"load {model}", trace, began_s, gen_ai__request__model=model)
        self._spans.end(span, ended_s, "failed" if fault else "", fault)

    def close(self) -> None:
        self._spans.close()
