"""What `chimera serve` is told of records and metrics, and the words that tell control and front-ends."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from chimera.config.exporter import trace_exporter
from chimera.errors import ConfigError
from chimera.records import store
from chimera.units import MIB, parse_bytes

FILE = "records.sqlite"
OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    metrics: bool = True
    records: bool = True
    path: Path | None = None
    """Where; else beside the logs, else in the run directory, and gone with it."""
    limit_bytes: int = 256 * MIB
    days: float = 7.0
    prompts: bool = False
    trace_exporter: str = ""
    """By which spans of requests and activations go to OpenTelemetry; empty: none are made."""

    @property
    def words_for_all(self) -> list[str]:
        return ["--traces", self.trace_exporter] if self.trace_exporter else []

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
        if not self.records:
            return []
        return ["--records", str(self.path or folder / FILE), *(["--record-prompts"] if self.prompts else [])]


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
        help="send spans of requests and activations to where OTEL_EXPORTER_OTLP_ENDPOINT says (needs the extra `traces`)",
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
    if arguments.traces and arguments.no_metrics:
        raise ConfigError.single("--traces", "a span is made of what is counted: leave --no-metrics out")
    keeping = Keeping(
        metrics=not arguments.no_metrics,
        records=arguments.records != OFF,
        path=path,
        limit_bytes=limit_bytes,
        days=arguments.records_days,
        prompts=arguments.record_prompts,
        trace_exporter=trace_exporter() if arguments.traces else "",
    )
    if keeping.metrics and keeping.records and path is not None:
        if not path.parent.is_dir():
            raise ConfigError.single("--records", f"there is no folder {path.parent}")
        store.open_to_write(path).close()
    return keeping
