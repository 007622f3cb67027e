"""A study: a grid of training runs over any fields, with controls and seeds; running it, and its report."""
