"""The page of `xlfa app` and how it is served: nothing but this machine is asked for anything."""

from pathlib import Path

import gradio as gr

from xlfa.alignment.aligner import Aligner
from xlfa.app.alignment_tab import build_alignment_tab
from xlfa.app.answering_tab import QuestionModel, build_answering_tab
from xlfa.app.comparison_tab import build_comparison_tab

# Names of fonts as text are the system's; gradio's own come from Google.
THEME = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
STYLE = """
.gradio-container { max-width: 1280px !important }
textarea { unicode-bidi: plaintext }
.xlfa-message { padding: .6em .8em; border-left: 4px solid #b35900; background: #b359001a; overflow-wrap: anywhere }
.xlfa-facts { display: grid; gap: .3em; margin: 0 }
.xlfa-facts div { display: flex; gap: .6em }
.xlfa-facts dt { flex: 0 0 12em; opacity: .7 }
.xlfa-facts dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums }
.xlfa-passage { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6; font-size: 1.05em }
.xlfa-passage mark { background: #ffd54f; color: #1f2328; padding: .1em .15em; border-radius: 3px }
.xlfa-picture { max-width: 100%; height: auto; border-radius: 4px }
"""


def build_page(aligner: Aligner, question_model: QuestionModel | None, runs: Path) -> gr.Blocks:
    """The three tabs.

    Args:
        question_model: None where there is none; the second tab then says how to train one.
        runs: folder below which the third tab finds scored runs; no other file can be read.
    """
    with gr.Blocks(title="XLFA", analytics_enabled=False) as page:
        with gr.Tab("Align two sentences", elem_id="align-tab"):
            build_alignment_tab(page, aligner)
        with gr.Tab("Ask a question", elem_id="ask-tab"):
            build_answering_tab(question_model)
        with gr.Tab("Compare two runs", elem_id="compare-tab"):
            build_comparison_tab(page, runs)
    return page


def serve(page: gr.Blocks, host: str, port: int) -> str:
    """Start to serve the page, in threads; returns its address.

    What environment variables could open (a public link, files, a history on the Hub) is named here, and closed.
    """
    # Calls that pass the queue by would compute several at a time, on one model.
    page.queue(api_open=False)
    _, address, _ = page.launch(
        # An IPv6 address as URLs have it.
        server_name=f"[{host}]" if ":" in host else host,
        server_port=port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        # No field shows or takes a file.
        blocked_paths=[Path.cwd().anchor],
        max_file_size=1,
        enable_monitoring=False,
        run_history=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        footer_links=[],
        theme=THEME,
        css=STYLE,
    )
    return address
