"""The exceptions that are meant for the person at the screen."""


class UserError(ValueError):
    """Something that the user can fix: the text names the file, the value, the rule and the remedy.

    Bytes of a file name that are not UTF-8 are written out (`\\udce9`), so that every screen, log and library takes the text.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text.encode("utf-8", "backslashreplace").decode())


class TemporaryFailure(UserError):
    """What the same command may get over when it is run again: a full disk, memory that was taken, a process that was killed."""
