"""The one exception a person is meant to read: a line that names the file and says what to do."""


class InputError(Exception):
    """Bad input or a full disk: printed as one line without a traceback; `exit_code` is the verdict."""

    exit_code = 2
