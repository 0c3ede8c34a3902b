"""Whether speculative decoding pays: acceptance and costs on given prompts, predicted and measured speed-ups."""
