"""TensorBoard beyond plain curves: charts in groups, a figure, texts, and a table of runs."""
