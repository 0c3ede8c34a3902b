"""The small world of whole runs."""

from tests.stages.world import pairs, teacher, text

__all__ = ["pairs", "teacher", "text"]
