"""The tab that aligns two sentences: the plan is solved again at every move of a slider, from states that are kept."""

import functools
from dataclasses import dataclass, field

import gradio as gr

from xlfa.alignment.aligner import Aligner, Alignment, PairStates, TransportOptions
from xlfa.alignment.commands import strip
from xlfa.alignment.formats import format_pharaoh
from xlfa.alignment.heatmap import figure
from xlfa.alignment.links import DEFAULT_THRESHOLD, METHODS, Link, extract_links, null_words, relative_weights
from xlfa.app.elements import facts, message, picture
from xlfa.app.inputs import check_input
from xlfa.errors import XLFAError
from xlfa.retrieval import FUSED

EXAMPLE = ("The cat sat on the mat.", "Die Katze saß auf der Matte.")
# Powers of ten of epsilon.
LEAST_POWER, LARGEST_POWER, FIRST_POWER, POWER_STEP = -3.0, 1.0, -1.0, 0.05
LEAST_THRESHOLD, LARGEST_THRESHOLD, THRESHOLD_STEP = 0.5, 10.0, 0.1
# Strength of the marginals, in units of the epsilon scale, where words may stay unmatched.
UNBALANCED = 2.0
# Word pairs; a strip of plans of longer sentences takes too long to draw at every move.
LARGEST_STRIP = 1500
LINK_HEADERS = ["source", "target", "% of the mass", "× uniform"]
# Seconds that the states of a visitor's sentences are kept.
KEPT = 3600

# Picture, facts, links, and what is kept for the next move.
View = tuple[str, str, list[list[str]], "KeptPair | None"]


@dataclass(frozen=True)
class KeptPair:
    """The states of a sentence pair at a layer, and the strips of plans over epsilon that were solved from them."""

    source: str
    target: str
    layer: int | str
    states: PairStates
    strips: dict[float | None, dict[str, Alignment]] = field(default_factory=dict)

    def strip(self, aligner: Aligner, options: TransportOptions) -> dict[str, Alignment]:
        """Title → plan, from hard to uniform; none of long sentences."""
        if len(self.states.source_words) * len(self.states.target_words) > LARGEST_STRIP:
            return {}
        if options.unbalanced not in self.strips:
            self.strips[options.unbalanced] = strip(aligner, [self.states], options)
        return self.strips[options.unbalanced]


def show_alignment(
    aligner: Aligner,
    source: str | None,
    target: str | None,
    layer: int | str,
    power: float,
    unbalanced: bool,
    method: str,
    threshold: float,
    kept: KeptPair | None,
) -> View:
    """The tab's results. The encoder runs where the sentences or the layer are not those that were kept.

    Args:
        power: of ten, epsilon.
        method, threshold: see `extract_links`.
        kept: by the last call.

    Returns:
        Picture, facts, links and what to keep; for input that cannot be aligned a message and nothing else.
    """
    try:
        if kept is None or (kept.source, kept.target, kept.layer) != (source, target, layer):
            kept = encode_pair(aligner, source, target, layer)
        options = TransportOptions(10**power, unbalanced=UNBALANCED if unbalanced else None)
        (alignment,) = aligner.align([kept.states], options)
        links = extract_links(alignment, method, threshold)
        plans = {f"epsilon {options.epsilon:.3g}": alignment, **kept.strip(aligner, options)}
        drawn = picture(figure(plans), f"Heat map of the plan; links: {_in_words(alignment, links)}")
    except XLFAError as error:
        return "", message(str(error)), [], None
    return drawn, facts(describe(alignment, options, links)), link_rows(alignment, links), kept


def encode_pair(aligner: Aligner, source: str | None, target: str | None, layer: int | str) -> KeptPair:
    """A pass of the encoder.

    Raises:
        XLFAError: for sentences that cannot be aligned, or a layer that the model does not have.
    """
    sentences = check_input("the source sentence", source), check_input("the target sentence", target)
    at_layer = aligner.at_layer(layer)
    (states,) = at_layer.run([at_layer.encode(*sentences)])
    return KeptPair(*sentences, layer, states)


def describe(alignment: Alignment, options: TransportOptions, links: list[Link]) -> dict[str, str]:
    """Names and values of what is worth knowing about a plan."""
    known = {
        "epsilon": f"{options.epsilon:.3g} × {options.epsilon_scale} = {alignment.epsilon:.3g} of the cost",
        "perplexity": f"{alignment.perplexity:.2f} target pieces a source piece",
        "marginal error": f"{alignment.marginal_error:.1e}" + ("" if alignment.converged else ", not converged"),
        "Pharaoh": format_pharaoh(links) or "no link",
    }
    if options.unbalanced is not None:
        null_source, null_target = null_words(alignment)
        unmatched = [
            word
            for words, is_null in ((alignment.source, null_source), (alignment.target, null_target))
            for word, null in zip(words, is_null)
            if null
        ]
        known["unmatched"] = "  ".join(unmatched) or "no word"
    return known


def link_rows(alignment: Alignment, links: list[Link]) -> list[list[str]]:
    """The rows of the table of links, as `LINK_HEADERS`."""
    relative = relative_weights(alignment)
    return [
        [
            alignment.source[link.source],
            alignment.target[link.target],
            f"{100 * link.weight:.1f}",
            f"{relative[link.source, link.target]:.1f}",
        ]
        for link in links
    ]


def _in_words(alignment: Alignment, links: list[Link]) -> str:
    return ", ".join(f"{alignment.source[link.source]} – {alignment.target[link.target]}" for link in links) or "none"


def layer_choices(aligner: Aligner) -> list[tuple[str, int | str]]:
    """The layers by name; the fused states where there are any, or where the model was trained to align them."""
    layers: list[int | str] = list(range(aligner.model.config.num_hidden_layers + 1))
    if aligner.model.fusion is not None or aligner.layer == FUSED:
        layers.append(FUSED)
    return [(str(layer), layer) for layer in layers]


def build_alignment_tab(page: gr.Blocks, aligner: Aligner) -> None:
    """The tab's fields, and what happens when they change."""
    with gr.Row():
        source = gr.Textbox(EXAMPLE[0], label="Source sentence", elem_id="source")
        target = gr.Textbox(EXAMPLE[1], label="Target sentence", elem_id="target")
        layer = gr.Dropdown(
            layer_choices(aligner), value=aligner.layer, label="Layer", elem_id="layer", scale=0, min_width=110
        )
        button = gr.Button("Align", variant="primary", elem_id="align", scale=0, min_width=110)
    with gr.Row():
        power = gr.Slider(
            *(LEAST_POWER, LARGEST_POWER, FIRST_POWER),
            step=POWER_STEP,
            label="epsilon, as a power of ten",
            info=f"in units of {TransportOptions().epsilon_scale}, the spread of the pair's cost: −3 is 0.001 (hard), "
            "−1 is 0.1, 1 is 10 (uniform)",
            scale=2,
            min_width=360,
            elem_id="epsilon",
        )
        threshold = gr.Slider(
            *(LEAST_THRESHOLD, LARGEST_THRESHOLD, DEFAULT_THRESHOLD),
            step=THRESHOLD_STEP,
            label="link threshold",
            info="of the method threshold: times the weight in the uniform plan",
            min_width=260,
            elem_id="threshold",
        )
    with gr.Row():
        method = gr.Radio(METHODS, value=METHODS[0], label="links by", scale=2, elem_id="method")
        unbalanced = gr.Checkbox(
            label="words may stay unmatched", info=f"unbalanced, strength {UNBALANCED:g}", elem_id="unbalanced"
        )
    with gr.Row():
        with gr.Column(scale=3):
            drawn = gr.HTML(elem_id="plan")
        with gr.Column(scale=2):
            found = gr.HTML(elem_id="plan-facts")
            table = gr.Dataframe(headers=LINK_HEADERS, interactive=False, label="Links", elem_id="links")
    kept = gr.State(time_to_live=KEPT)
    show = functools.partial(show_alignment, aligner)
    inputs = [source, target, layer, power, unbalanced, method, threshold, kept]
    results = {"fn": show, "inputs": inputs, "outputs": [drawn, found, table, kept], "trigger_mode": "always_last"}
    results |= {"concurrency_limit": 1, "concurrency_id": "computing"}
    encoding = [page.load, button.click, source.submit, target.submit, layer.input]
    gr.on(encoding, **results, show_progress="minimal", api_name="align")
    redrawing = [power.change, unbalanced.input, method.input, threshold.change]
    gr.on(redrawing, **results, show_progress="hidden", api_visibility="private")
