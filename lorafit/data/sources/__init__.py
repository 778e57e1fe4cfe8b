"""Rows as they lie in files, on the hub or in memory."""
