"""Ray: a running cluster is found, or one is started here that ends with this process."""

import logging
import os
import signal
import threading
from typing import Any

from pipeline.errors import InputError
from pipeline.progress import console

STARTS = 3  # tries of Ray to come up


class NotStarted(InputError):
    """Ray did not come up: nothing is wrong with the input."""

    exit_code = 1


def connected(**settings: Any) -> Any:
    """The module `ray`, connected (RAY_ADDRESS, a running cluster, or a new one with `settings` of ray.init)."""
    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # a task that was given no GPU sees none
    terminate = signal.getsignal(signal.SIGTERM)
    for left in range(STARTS - 1, -1, -1):
        if ray.is_initialized():
            break
        try:
            with console.status("connecting to Ray"):
                _init(ray, {"logging_level": logging.ERROR, **settings})
        except Exception as error:  # Ray raises a bare Exception where its processes do not come up in time
            why = str(error).splitlines()[0][:200]
            ray.shutdown()
            if not left:
                raise NotStarted(
                    f"Ray did not start ({why}); run the same command again when the machine is less busy"
                ) from error
            console.print(f"Ray did not start ({why}); trying again")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)  # Ray's own prints a stack trace and aborts
    return ray


def _init(ray: Any, settings: dict[str, Any]) -> None:
    try:
        ray.init(include_dashboard=False, **settings)
    except ValueError:  # a running cluster takes no settings of its own
        ray.init(**settings)
