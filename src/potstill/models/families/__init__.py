"""Name maps between Hugging Face's spellings and ours, both ways."""
