"""What `chimera serve` is told of records and metrics, and the words that tell control and front-ends."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from chimera.errors import ConfigError
from chimera.records import store
from chimera.units import MIB, parse_bytes

FILE = "records.sqlite"
OFF = "off"
_EXPORTER = "opentelemetry.exporter.otlp.proto.http"
_INSTALL = "pip install 'chimera-serving[traces]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    metrics: bool = True
    records: bool = True
    path: Path | None = None
    """Where; else beside the logs, else in the run directory, and gone with it."""
    limit_bytes: int = 256 * MIB
    days: float = 7.0
    prompts: bool = False
    traces: bool = False
    """A span of each request, for OpenTelemetry."""

    def words_for_control(self, folder: Path) -> list[str]:
        if not self.metrics:
            return ["--no-metrics"]
        if not self.records:
            return []
        limits = ["--records-bytes", str(self.limit_bytes), "--records-days", str(self.days)]
        return ["--records", str(self.path or folder / FILE), *limits]

    def words_for_front(self, folder: Path) -> list[str]:
        if not self.metrics:
            return ["--no-metrics"]
        traces = ["--traces"] if self.traces else []
        if not self.records:
            return traces
        return ["--records", str(self.path or folder / FILE), *(["--record-prompts"] if self.prompts else []), *traces]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--records",
        metavar="FILE",
        help="keep what happens to requests and models in this file, or `off` (default: in --log-dir, else in the run folder)",
    )
    parser.add_argument(
        "--records-size", metavar="256MiB", default="256MiB", help="the most that file may hold (default: %(default)s)"
    )
    parser.add_argument(
        "--records-days", type=float, metavar="7", default=7.0, help="how long it is kept (default: %(default)s)"
    )
    parser.add_argument("--record-prompts", action="store_true", help="keep what is asked and answered there, too")
    parser.add_argument(
        "--traces",
        action="store_true",
        help="send a span of each request to where OTEL_EXPORTER_OTLP_ENDPOINT says (needs the extra `traces`)",
    )
    parser.add_argument("--no-metrics", action="store_true", help="count nothing and keep no records")


def of(arguments: argparse.Namespace) -> Keeping:
    """ConfigError when the file cannot be the server's."""
    path = None if arguments.records in (None, OFF) else Path(arguments.records).absolute()
    if path is None and arguments.log_dir is not None:
        path = arguments.log_dir.absolute() / FILE
    try:
        limit_bytes = parse_bytes(arguments.records_size)
    except ValueError as fault:
        raise ConfigError.single("--records-size", str(fault)) from None
    if limit_bytes < store.LEAST_BYTES:
        raise ConfigError.single("--records-size", f"at least {store.LEAST_BYTES // MIB} MiB, not {arguments.records_size}")
    if not arguments.records_days > 0:
        raise ConfigError.single("--records-days", f"more than none, not {arguments.records_days:g}")
    keeping = Keeping(
        metrics=not arguments.no_metrics,
        records=arguments.records != OFF,
        path=path,
        limit_bytes=limit_bytes,
        days=arguments.records_days,
        prompts=arguments.record_prompts,
        traces=arguments.traces,
    )
    if keeping.traces and not keeping.metrics:
        raise ConfigError.single("--traces", "a span is made of what is counted: leave --no-metrics out")
    if keeping.traces and not _has_exporter():
        raise ConfigError.single("--traces", "OpenTelemetry's exporter is not installed", hint=_INSTALL)
    if keeping.metrics and keeping.records and path is not None:
        if not path.parent.is_dir():
            raise ConfigError.single("--records", f"there is no folder {path.parent}")
        store.open_to_write(path).close()
    return keeping


def _has_exporter() -> bool:
    try:
        return find_spec(_EXPORTER) is not None
    except ModuleNotFoundError:  # not even what it is a part of
        return False
