"""Elastic sharing of GPUs among many language models, on stock SGLang. `README.md` beside this file is the map."""

__version__ = "0.1.0"
