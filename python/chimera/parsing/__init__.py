"""Text to tokens and back: tokenisers, chat templates, stop strings. Knows files of a model folder; no socket and no HTTP."""
