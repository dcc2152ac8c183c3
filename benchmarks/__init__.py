"""The experiments: scenarios, cells, records and reports."""
