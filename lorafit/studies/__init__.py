"""Commands that stand on the pipeline: those that run many runs, and those that come before or after one."""
