"""The page over HTTP: it answers as its functions do, serves no file, loads nothing, and stays closed."""

import json
import re
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from app_models import HOSTILE, question_model
from test_app_commands import free_port
from test_comparison import guesses, write_run

pytest.importorskip("gradio")

from gradio_client import Client

from xlfa.alignment.aligner import Aligner
from xlfa.app.alignment_tab import show_alignment
from xlfa.app.answering_tab import QuestionModel, show_answer
from xlfa.app.page import build_page, serve

SETTINGS = {"layer": 2, "power": -1.0, "unbalanced": False, "method": "mutual_argmax", "threshold": 2.0}
OPENED = {
    "GRADIO_SHARE": "True",
    "GRADIO_ALLOWED_PATHS": "/",
    "GRADIO_SERVER_NAME": "0.0.0.0",
    "GRADIO_MCP_SERVER": "True",
    "GRADIO_RUN_HISTORY": "True",
}


@pytest.fixture(scope="module")
def parts(tiny_encoder, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    for name, accuracy in (("plain", 0.5), ("aligned", 0.7)):
        write_run(runs / name / "scores" / "xnli", guesses(1, accuracy, 30), [index // 3 for index in range(30)])
    model = QuestionModel("qa", *question_model(tiny_encoder, fusion="dlfa", fusion_layer=2))
    return Aligner.from_pretrained(tiny_encoder), model, runs


@pytest.fixture(scope="module")
def asked():
    """Every host that was looked up, from before the page is built."""
    hosts, look_up = set(), socket.getaddrinfo
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            socket, "getaddrinfo", lambda host, *rest, **named: hosts.add(host) or look_up(host, *rest, **named)
        )
        yield hosts


@pytest.fixture(scope="module")
def served(parts, asked):
    """The page and its address; what the environment asks for must not open it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in OPENED.items():
            patch.setenv(name, value)
        page = build_page(*parts)
        address = serve(page, "127.0.0.1", free_port())
        yield page, address
    page.close()


@pytest.fixture(scope="module")
def client(served):
    return Client(served[1], verbose=False)


def rows(table):
    return table["data"]


def align(client, source, target):
    return client.predict(source, target, *SETTINGS.values(), api_name="/align")


def test_it_answers_as_its_functions_do(client, parts):
    aligner, model, _ = parts
    picture, facts, links = align(client, "the cat sat.", "a cat.")
    expected = show_alignment(aligner, "the cat sat.", "a cat.", **SETTINGS, kept=None)
    assert (picture, facts, rows(links)) == expected[:3]
    shown, facts, scores = client.predict("who?", "the cat sat.", api_name="/ask")
    assert (shown, facts, rows(scores)) == show_answer(model, "who?", "the cat sat.")
    picture, facts, table = client.predict("plain (xnli)", "aligned (xnli)", api_name="/compare")
    assert picture.startswith("<img") and "en" in [row[0] for row in rows(table)]


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "half a surrogate pair"])
def test_no_text_breaks_it(client, name):
    """Half a surrogate pair cannot be sent as UTF-8; the functions' tests have it."""
    shown = [align(client, HOSTILE[name], "a cat."), client.predict("who?", HOSTILE[name], api_name="/ask")]
    for first, second, _ in shown:
        assert "Traceback" not in first + second
        assert re.search('<img class|<mark>|role="alert"', first + second)


def status(address, body=None):
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data=body)) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("name", ["align", "ask", "compare"])
def test_nothing_passes_the_queue_by(served, name):
    body = json.dumps({"data": ["who?", "the cat sat."]}).encode()
    headers = {"Content-Type": "application/json"}
    for path in (f"gradio_api/run/{name}", f"gradio_api/api/{name}", f"run/{name}"):
        request = urllib.request.Request(f"{served[1]}{path}", data=body, headers=headers)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code in (403, 404, 405)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "README.md", str(Path(__file__)), "../../etc/passwd", "pyproject.toml", "%2fetc%2fpasswd"]
)
def test_it_serves_no_file(served, path):
    for prefix in ("gradio_api/file=", "file=", "gradio_api/stream/"):
        assert status(f"{served[1]}{prefix}{path}") in (403, 404, 405)


def test_it_takes_no_file(served):
    boundary = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nhello\r\n--x--\r\n'
    request = urllib.request.Request(f"{served[1]}gradio_api/upload", data=boundary)
    request.add_header("Content-Type", "multipart/form-data; boundary=x")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code in (400, 413)


def test_the_environment_does_not_open_it(served):
    page, address = served
    assert address.startswith("http://127.0.0.1:")
    assert (page.share, page.share_url, page.mcp_server) == (False, None, False)
    assert not (page.analytics_enabled or page.run_history or page.enable_monitoring)


def test_it_loads_nothing_from_elsewhere(served):
    with urllib.request.urlopen(served[1]) as response:
        text = response.read().decode()
    loaded = re.findall(r"""<(?:script|link|img|iframe)[^>]*?(?:src|href)=["']?([^"'\s>]+)""", text)
    assert loaded and not [each for each in loaded if re.match("(https?:)?//", each) and not each.startswith(served[1])]
    for style in ("theme.css", *re.findall(r"[^\"'\s]+\.css", text)):
        content = urllib.request.urlopen(urllib.request.Request(served[1] + style.removeprefix("./"))).read().decode()
        assert not re.search(r"""(?:url\(|@import)\s*["']?(?:https?:)?//""", content), style


def test_the_server_asks_no_other_machine(client, asked):
    align(client, "the cat", "a cat")
    assert asked and {str(host) for host in asked} <= {"127.0.0.1", "localhost"}
