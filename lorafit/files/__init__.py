"""Files whole or not at all: the run folder, the cache, strict JSON, values without paths of this machine."""
