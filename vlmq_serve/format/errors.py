"""The one error type that users see."""


class VLMQError(ValueError):
    """Bad input from the outside: one line that says what, got, allowed and what to do."""
