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


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Nobody removes the models that all other requests ask for."""
    if case.method.upper() == "DELETE" and case.path_parameters.get("name") in ("m", "e"):
        case.path_parameters["name"] = "nobody"


@schemathesis.check
def no_fault(context: Any, response: Any, case: Any) -> None:
    """A model that is away, or on its way, is said with 503: only 500 is a fault of the server's."""
    assert response.status_code != 500, response.text
