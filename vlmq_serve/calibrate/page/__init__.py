"""The report of a run as one HTML file: what `vlmq/run.json` and `vlmq/layers.csv` hold, drawn."""
