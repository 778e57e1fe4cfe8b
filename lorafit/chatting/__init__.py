"""`lorafit chat`: talking with a model in a terminal, or through a pipe."""
