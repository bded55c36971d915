"""What all tests here run under."""

from tests.reference.threads import one_thread

__all__ = ["one_thread"]
