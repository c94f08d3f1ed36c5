"""What instruments share: tables, statistics, strata, text that a model is read on, drawing."""
