"""The `chimera` command: one module per verb, wiring only. Whatever a verb does lives in the room that owns it."""
