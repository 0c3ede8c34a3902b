"""Rewards: functions that score the completions of prompts, for reinforcement learning and for selecting samples."""
