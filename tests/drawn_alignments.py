"""Plans to draw: random masses between given words."""

import numpy as np

from xlfa.alignment.aligner import Alignment

ENGLISH = "The cat sat on the mat".split()


def make_alignment(source, target, sharpness=3.0, unmatched=0.0, **changes):
    """Random masses, sharper or flatter."""
    rng = np.random.default_rng(0)
    weights = rng.random((len(source), len(target))) ** sharpness
    weights *= (1 - unmatched) / (weights.sum() or 1)
    rows = weights / weights.sum(1, keepdims=True)
    fields = {
        "source": list(source),
        "target": list(target),
        "weights": weights,
        "source_mass": np.full(len(source), 1 / max(len(source), 1)),
        "target_mass": np.full(len(target), 1 / max(len(target), 1)),
        "null_source": unmatched * rng.dirichlet(np.ones(len(source))),
        "null_target": unmatched * rng.dirichlet(np.ones(len(target))),
        "source_pieces": list(source),
        "target_pieces": list(target),
        "piece_plan": weights,
        "source_word_of_piece": np.arange(len(source)),
        "target_word_of_piece": np.arange(len(target)),
        "epsilon": 0.1,
        "perplexity": float(np.exp(-(rows * np.log(rows)).sum() / max(len(source), 1))),
        "marginal_error": 1e-6,
        "converged": True,
    }
    return Alignment(**(fields | changes))


def make_strip(source, target, **options):
    return {f"ε = {sharpness}": make_alignment(source, target, sharpness, **options) for sharpness in (3, 20, 8, 2, 0)}
