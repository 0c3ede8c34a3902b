"""Writes a model as a GGUF file, which llama.cpp and Ollama read: architecture, tensors and tokenizer."""
