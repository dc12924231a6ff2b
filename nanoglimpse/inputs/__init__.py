"""From pictures, videos and text to packed prompts."""
