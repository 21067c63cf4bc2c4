"""The fixture that several tests of the demo use."""

from tests.support.demo_models import models

__all__ = ["models"]
