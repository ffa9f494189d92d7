"""What is reported: one file a metric, each with a version and the direction in which higher counts."""
