"""What answers prompts: a run by its card, an adapter alone, or a model; batched generation."""
