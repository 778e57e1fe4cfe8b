"""Chats: templates, their rendering with traced text, and the spans that the assistant writes."""
