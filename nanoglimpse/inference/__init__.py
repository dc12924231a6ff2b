"""A batch of prompts on its way to answers: prefill, decoding, sessions, scheduling."""
