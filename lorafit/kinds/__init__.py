"""Whatever a recipe can name: one folder a family, one file a kind. Adding a file adds the kind, nothing else."""
