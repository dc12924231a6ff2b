"""What a user gives, from pictures and text up to a packed batch of prompts."""
