"""The front-end process: HTTP in, server-sent events out. Speaks to control and to workers in messages; decides nothing.

errors     the only place with HTTP codes
gate       keys, limits and sites: who is let in
routes     how a route is declared; openapi makes the document of them
words      what several APIs' requests share
intake     bodies decoded, fields checked, prompts measured
openai     what OpenAI's two completions share; chat and completions are each of them
responses  /v1/responses: OpenAI's newer words; responses_told what it answers
anthropic  /v1/messages: Anthropic's words; anthropic_told what it answers
passages   an answer as thoughts, text and calls, one after the other
logprobs   log-probabilities in OpenAI's two spellings
native     /generate: SGLang's words
embeddings /v1/embeddings and /encode
catalogue  the models that control told of, and their tokenizers
answer     one answer under way: tokens to text to its reader
readers    who waits for an answer: an event stream, or a body sent whole
desk       every open answer, and what becomes of it when a worker or control is lost
relay      the sockets to control and workers
bodies     a body read within its limits, a body written
operator   load, unload, pin, events: the operator's verbs
app        routes
front      the parts put together
"""
