"""The one family of errors: what went wrong, where, and what to do about it."""


class SecateurError(Exception):
    """A mistake the user can mend.

    >>> raise SecateurError("the ratio 1.5 is outside 0..1", where="target", fix="give a share such as 50%")
    Traceback (most recent call last):
    ...
    secateur.errors.SecateurError: target: the ratio 1.5 is outside 0..1; give a share such as 50%
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None):
        self.what, self.where, self.fix = what, where, fix
        text = f"{where}: {what}" if where else what
        super().__init__(f"{text}; {fix}" if fix else text)


class SecateurWarning(UserWarning):
    """What a user should know before trusting a result, such as a library version that was never tested."""
