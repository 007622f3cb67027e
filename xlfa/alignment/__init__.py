"""Word alignments from transport plans: plans summed to words, hard links, formats, pictures, and their scores."""
