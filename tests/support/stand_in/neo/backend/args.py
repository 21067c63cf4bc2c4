"""What Forge Neo was started with, and what it notes on the way."""


class _Items(type):
    """Lets the class be used as a dictionary."""

    def __getitem__(cls, key):
        return getattr(cls, key)

    def __setitem__(cls, key, value):
        setattr(cls, key, value)


class dynamic_args(metaclass=_Items):  # noqa: N801
    """``last_extra_generation_params`` is what the prompts encoded last add to a picture's text."""

    embedding_dir = None
    last_extra_generation_params = {}  # noqa: RUF012
