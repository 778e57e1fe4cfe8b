"""Work that takes many runs: methods compared with each other. It stands on the pipeline and knows no torch."""
