"""`xlfa app`: what it refuses before it loads a model, what it warns of, and which model answers."""

import importlib.util
import logging
import socket
import subprocess
import sys

import pytest
from app_models import question_model
from huggingface_hub import constants

from xlfa.app.commands import _check, _is_loopback, _load_question_model, _parser, main
from xlfa.errors import XLFAError


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def parse():
    pytest.importorskip("gradio")
    return lambda *argv: _parser().parse_args(["--port", str(free_port()), *argv])


def test_help_is_quick_and_fits_a_screen():
    code = "import sys; from xlfa.app.commands import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'gradio', 'transformers'} & set(sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert len(shown.splitlines()) <= 24 and "xlfa app --model" in shown and "--share" not in shown


def test_a_missing_gradio_is_one_error(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find_spec(name))
    with pytest.raises(XLFAError, match=r'pip install "xlfa\[app\]"'):
        main(["--port", str(free_port())])


def test_a_taken_port_is_one_error(parse):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        with pytest.raises(XLFAError, match=f"--port {port}.*another --port"):
            _check(parse("--port", port))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--port", "0"], "--port 0"),
        (["--port", "65536"], "--port 65536"),
        (["--runs", "nowhere"], "--runs nowhere"),
        (["--runs", "n" * 300], "--runs n+: no such folder"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1"),
        (["--host", "not a host"], "--host not a host"),
    ],
)
def test_what_is_refused(parse, argv, message):
    with pytest.raises(XLFAError, match=message):
        _check(parse(*argv))


@pytest.mark.parametrize("host, warned", [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
def test_other_hosts_get_one_warning(parse, caplog, host, warned):
    with caplog.at_level(logging.WARNING):
        _check(parse("--host", host))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warned
    assert all("network" in record.message for record in caplog.records)


def test_a_host_that_is_no_name_is_named(parse):
    with pytest.raises(XLFAError, match="cannot listen on --host a..b"):
        _check(parse("--host", "a..b"))


def test_loopback():
    assert [_is_loopback(host) for host in ("127.0.0.5", "::1", "localhost", "::", "10.0.0.1", "example.org")] == [
        *[True] * 3,
        *[False] * 3,
    ]


@pytest.mark.offline
def test_the_packaged_backbone_is_loaded_without_a_network(monkeypatch):
    """`xlfa app` up to the serving, also where nothing says that there is no network."""
    gradio = pytest.importorskip("gradio")
    asked, served = [], []

    def refuse(*address, **kind):
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("xlfa.app.page.serve", lambda page, host, port: served.append((page, host, port)))
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda page: None)
    port = free_port()
    main(["--port", str(port)])
    [(page, *place)] = served
    assert place == ["127.0.0.1", port] and not asked
    assert {"align-tab", "ask-tab", "compare-tab"} <= {block.elem_id for block in page.blocks.values()}


def test_a_model_that_was_trained_to_answer_answers(parse, tiny_encoder, tmp_path):
    from xlfa.alignment.aligner import Aligner

    model, tokenizer = question_model(tiny_encoder, fusion="dlfa")
    model.save_pretrained(tmp_path / "qa")
    tokenizer.save_pretrained(tmp_path / "qa")
    trained, plain = (Aligner.from_pretrained(str(folder)) for folder in (tmp_path / "qa", tiny_encoder))
    arguments = parse("--model", str(tmp_path / "qa"))
    assert _load_question_model(arguments, trained).name == str(tmp_path / "qa")
    assert _load_question_model(parse("--model", tiny_encoder), plain) is None
    asked = parse("--model", tiny_encoder, "--question_model", str(tmp_path / "qa"))
    assert _load_question_model(asked, plain).model.qa_outputs.weight.equal(model.qa_outputs.weight)
    with pytest.raises(XLFAError, match="--question_model n+: no model there"):
        _load_question_model(parse("--question_model", "n" * 300), plain)
    with pytest.raises(XLFAError, match=f"--question_model {tiny_encoder}: a 'bert' model, not an XLFA one"):
        _load_question_model(parse("--question_model", tiny_encoder), plain)
