"""What schemathesis is told beside the document: the names of models, without which most requests would end at the door.

Imported by schemathesis itself, in a process of its own.
"""

from typing import Any

import schemathesis

EMBEDDING = ("/v1/embeddings", "/encode")


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    path = context.operation.path
    asks = path in (*EMBEDDING, "/generate") or path.startswith("/v1/")
    if asks and isinstance(body, dict) and "model" in body:
        return {**body, "model": "e" if path in EMBEDDING else "m"}
    return body
