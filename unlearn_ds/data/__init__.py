"""Sources to rows, rows to token ids, token ids to packed batches."""
