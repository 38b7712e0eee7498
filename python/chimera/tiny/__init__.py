"""Makes small checkpoints of real architectures on the spot, so that everything runs on any machine without a download.

Owns their words, their shapes and their files. Their weights are random and their answers gibberish: they show that
tokens are right, never that a model is good. Knows no engine: it writes the files that a Hugging Face checkpoint has.
"""
