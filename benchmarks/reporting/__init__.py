"""Reports: tables, figures, verdicts and a page, made from record files alone."""
