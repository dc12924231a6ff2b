"""From prompts to answers: prefill, decoding, sessions, scheduling."""
