"""Text in, batches out: corpora, tokenizer, preparation into token shards, and the order in which they are read."""
