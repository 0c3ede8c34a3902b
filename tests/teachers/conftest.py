"""The small world of whole runs."""

from tests.stages.world import pairs, short_samples, teacher, text

__all__ = ["pairs", "short_samples", "teacher", "text"]
