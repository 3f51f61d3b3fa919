"""What a run shows in TensorBoard besides plain curves: charts in groups, a figure, texts, and a table of runs."""
