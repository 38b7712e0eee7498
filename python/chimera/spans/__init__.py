"""Spans of OpenTelemetry, told by every process under the context that a request carries.

The only room that knows OpenTelemetry, which is an extra: imported where traces are on, and nowhere else.
"""
