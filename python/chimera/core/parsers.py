"""What SGLang calls its parsers of calls and of thoughts, so that a placement file can be checked without importing SGLang."""

from __future__ import annotations

AUTO = "auto"
"""Found out from the model's chat template."""

_CALLS = """
apertus2509 cohere_command4 deepseekv3 deepseekv31 deepseekv32 deepseekv4 dots gemma4 gigachat3 glm glm45 glm47 gpt-oss hermes
hunyuan inkling interns1 k2_horizon kimi_k2 kimi_k3 lfm2 ling3 llama3 mimo minicpm5 minimax-m2 minimax-m3 mistral muse nanbeige
poolside_v1 pythonic qwen qwen25 qwen3_coder spark25 step3 step3p5 trinity
"""
_THOUGHTS = """
apertus2509 cohere_command4 deepseek-r1 deepseek-v3 deepseek-v4 dots gemma4 glm45 gpt-oss granite_thinking_parser hunyuan
inkling interns1 k2_horizon kimi kimi_k2 kimi_k3 ling3 mimo minimax minimax-append-think minimax-m3 mistral muse nanbeige
nemotron_3 poolside_v1 qwen3 qwen3-thinking step3 step3p5
"""

TOOL_CALL_PARSERS = frozenset(_CALLS.split())
REASONING_PARSERS = frozenset(_THOUGHTS.split())
