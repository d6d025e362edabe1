"""The endpoint: programs behind an OpenAI-compatible API, in front of vLLM."""
