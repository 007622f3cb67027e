"""The vocabulary of an encoder: trimmed to what texts use, or with new pieces for a language."""
