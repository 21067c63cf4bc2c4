"""Forge Neo's command line arguments, and its notes on prompts."""


class _Items(type):
    """Lets the class be used as a dictionary."""

    def __getitem__(cls, key):
        return getattr(cls, key)

    def __setitem__(cls, key, value):
        setattr(cls, key, value)


class dynamic_args(metaclass=_Items):  # noqa: N801
    """``last_extra_generation_params`` are the last prompts' entries for the infotext."""

    embedding_dir = None
    last_extra_generation_params = {}  # noqa: RUF012
