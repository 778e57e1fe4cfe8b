"""Merging an adapter into the files of its base, tensor by tensor, each proven as it was written."""
