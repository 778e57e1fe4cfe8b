"""`lorafit serve`: a base with its adapters behind HTTP, in OpenAI's forms."""
