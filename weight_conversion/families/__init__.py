"""One small file per family of HuggingFace models: a config mapping and a table of rules, as data."""
