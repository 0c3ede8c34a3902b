"""What a run takes: operations, memory, time and disk."""
