"""The small world of whole runs."""

from tests.pipeline.world import pairs, teacher, text

__all__ = ["pairs", "teacher", "text"]
