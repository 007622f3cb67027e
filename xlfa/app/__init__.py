"""A local page: align two sentences, ask a question about a paragraph, compare two runs by language."""
