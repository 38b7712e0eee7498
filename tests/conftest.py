"""What every test may count on, however pytest was started."""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts what runs behind it so, and programs inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
