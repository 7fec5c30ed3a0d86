"""One rule for what a store may do to a request: try again or say, in a line, why not.

Trade-off: a request is given up after half a minute, so a longer outage fails its shard; the same command resumes it.
"""

import errno
import random
import tempfile
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import InputError

ATTEMPTS = 8  # of one request; with the pauses below they span 13 s on average and 25 s at most
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 20.0  # seconds; doubled each time, and drawn from [0, pause]
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of the local disk
# What no repetition cures. s3fs gives EINVAL to everything that S3 answers with "your request is wrong".
_LASTING = (*FULL, errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.EMSGSIZE, errno.ENAMETOOLONG, errno.EREMCHG)
_T = TypeVar("_T")


class UploadLost(InputError):
    """A multipart upload that the store does not know, or no longer."""


def retried(path: str, call: Callable[[], _T]) -> _T:
    """The call's result; what throttling, time-outs and torn connections break is tried again, ATTEMPTS times at most.

    The pauses are drawn at random, so that workers that were throttled together do not come back together.
    """
    attempt = 0
    while True:
        attempt += 1
        try:
            return call()
        except InputError:
            raise
        except Exception as error:
            if attempt == ATTEMPTS or not _passing(error):
                raise _explained(path, error, attempt) from error
        time.sleep(random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1))))  # noqa: S311


def _passing(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    import aiohttp
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    if isinstance(error, boto.BotoCoreError):
        broken = (boto.IncompleteReadError, boto.FlexibleChecksumError, ResponseParserError)
        return isinstance(error, (boto.HTTPClientError, boto.ConnectionError, *broken))  # others: the configuration
    if isinstance(error, OSError):
        return not isinstance(error, (FileNotFoundError, PermissionError)) and error.errno not in _LASTING
    return isinstance(error, (aiohttp.ClientError, ResponseParserError))


def _explained(path: str, error: Exception, attempts: int) -> InputError:
    """The line that a person reads."""
    from botocore import exceptions as boto

    said = " ".join(str(error).split()) or type(error).__name__
    if code(error) == "NoSuchBucket":
        return InputError(f"{path}: no such bucket; check its name, and AWS_ENDPOINT_URL if it is not at AWS")
    if code(error) == "NoSuchUpload":
        return UploadLost(f"{path}: the store has dropped the upload; run the same command again")
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path}: no such object")
    if isinstance(error, PermissionError):
        return InputError(
            f"{path}: access denied ({said}); check AWS_PROFILE or AWS_ACCESS_KEY_ID and the bucket's policy"
        )
    if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError)):
        return InputError(f"{path}: no credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if isinstance(error, boto.EndpointConnectionError):
        return InputError(f"{path}: cannot reach the store ({said}); check the network and AWS_ENDPOINT_URL")
    if isinstance(error, OSError) and error.errno in FULL:
        return full(path)
    times = f"{attempts} times" if attempts > 1 else "and cannot be asked again"
    return InputError(
        f"{path}: the store failed {times} ({type(error).__name__}: {said}); run the same command again later"
    )


def full(path: str) -> InputError:
    return InputError(
        f"{path}: no room in {tempfile.gettempdir()}; free some or point TMPDIR to a larger disk, and run the same "
        "command again"
    )


def code(error: BaseException) -> str:
    """S3's own word for an error that s3fs has translated."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))
