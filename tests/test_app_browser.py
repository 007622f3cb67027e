"""`xlfa app` as its users have it: the command, in a real browser that moves the slider and types what it must not."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from app_models import HOSTILE, IMAGE, SCRIPT, question_model
from matplotlib.image import imread
from test_app_commands import free_port
from test_comparison import guesses, write_run

pytest.importorskip("gradio")
pytest.importorskip("selenium")

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

pytestmark = pytest.mark.full

FLAGS = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"
SECONDS = 180
TYPED = [SCRIPT, IMAGE, HOSTILE["templates"], HOSTILE["mixed directions"], "عربي ไทย 日本語"]


@pytest.fixture(scope="module")
def address(tiny_encoder, tmp_path_factory):
    """Where `xlfa app` runs, with a tiny encoder, a tiny model that answers, and two scored runs."""
    folder = tmp_path_factory.mktemp("app")
    for name, accuracy in (("plain", 0.5), ("aligned", 0.8)):
        write_run(
            folder / "runs" / name / "scores" / "xnli", guesses(1, accuracy), [index // 3 for index in range(300)]
        )
    model, tokenizer = question_model(tiny_encoder, fusion="dlfa", fusion_layer=2)
    model.save_pretrained(folder / "qa")
    tokenizer.save_pretrained(folder / "qa")
    command = [sys.executable, "-c", "from xlfa.app.commands import main; main()", "--port", str(free_port())]
    command += ["--model", tiny_encoder, "--question_model", str(folder / "qa"), "--runs", str(folder / "runs")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        line = server.stdout.readline()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/ \(stop with Ctrl-C\)\n", line)
        yield line.split()[0]
        server.terminate()


@pytest.fixture
def browser(tmp_path):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver (apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS.split(), "disable-sync", "headless", "window-size=1280,1200"]:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


class Page:
    """The page in the browser, by the ids of its fields."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get(address)
        self.wait(lambda: self.find("#plan img"))

    def wait(self, condition):
        ignored = (Exception,)
        return WebDriverWait(self.browser, SECONDS, 0.2, ignored).until(lambda _: condition())

    def find(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.find(selector).get_attribute("textContent")

    def facts(self, selector="#plan-facts"):
        names, values = (
            [each.text for each in self.browser.find_elements(By.CSS_SELECTOR, f"{selector} {tag}")]
            for tag in ("dt", "dd")
        )
        return dict(zip(names, values))

    def open_tab(self, number):
        self.browser.find_elements(By.CSS_SELECTOR, "button[role=tab]")[number].click()

    def type(self, selector, text):
        field = self.find(selector)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text)

    def shoot(self, path):
        """A screenshot that shows something, as an array."""
        assert self.browser.save_screenshot(str(path))
        image = imread(path)[..., :3]
        assert image.std() > 0.05
        return image


def changed(page, before):
    return page.wait(lambda: (now := page.facts()) and now != before and now)


def test_moving_the_slider_redraws_the_plan(browser, address, tmp_path):
    page = Page(browser, address)
    before, picture = page.facts(), page.find("#plan img").get_attribute("src")
    first = page.shoot(tmp_path / "hard.png")
    assert before["epsilon"].startswith("0.1 ×")
    slider = page.find("#epsilon input[type=range]")
    for _ in range(20):
        slider.send_keys(Keys.ARROW_RIGHT)
    page.wait(lambda: page.facts()["epsilon"].startswith("1 ×"))
    after = page.facts()
    assert float(after["perplexity"].split()[0]) > float(before["perplexity"].split()[0])
    page.wait(lambda: page.find("#plan img").get_attribute("src") != picture)
    assert np.abs(page.shoot(tmp_path / "soft.png") - first).max() > 0.2
    page.find("#unbalanced input").click()
    page.wait(lambda: "unmatched" in page.facts())


@pytest.mark.parametrize("text", TYPED)
def test_what_is_typed_is_only_text(browser, address, text):
    page = Page(browser, address)
    before = page.facts()
    page.type("#source textarea", text)
    page.find("#align").click()
    changed(page, before)
    page.open_tab(1)
    page.type("#paragraph textarea", text)
    page.find("#ask").click()
    page.wait(lambda: page.find("#answer mark"))
    assert page.text("#answer").strip() == text
    assert browser.title == "XLFA"
    assert not browser.find_elements(By.CSS_SELECTOR, "#plan script, #answer script, #answer img")


def test_what_cannot_be_aligned_is_said_in_the_page(browser, address, tmp_path):
    page = Page(browser, address)
    page.type("#source textarea", Keys.DELETE)
    page.find("#align").click()
    assert "the source sentence is empty" in page.wait(lambda: page.find("#plan-facts [role=alert]")).text
    assert not browser.find_elements(By.CSS_SELECTOR, "#plan img")
    page.type("#source textarea", "the cat")
    page.find("#align").click()
    page.wait(lambda: page.find("#plan img"))
    page.shoot(tmp_path / "again.png")


def test_the_other_tabs(browser, address, tmp_path):
    page = Page(browser, address)
    page.open_tab(1)
    page.type("#paragraph textarea", "the cat sat on the mat.")
    page.type("#question textarea", "who sat?")
    page.find("#ask").click()
    marked = page.wait(lambda: page.find("#answer mark")).text
    assert marked and marked in "the cat sat on the mat."
    facts = page.facts("#answer-facts")
    assert facts["answer"] == marked and "mean gate, answer" in facts
    page.wait(lambda: "layer 2 alone" in page.text("#parts"))
    page.shoot(tmp_path / "answer.png")
    page.open_tab(2)
    page.wait(lambda: page.find("#run-a input").get_attribute("value") == "aligned (xnli)")
    page.find("#compare").click()
    page.wait(lambda: page.find("#differences img"))
    page.wait(lambda: "germanic" in page.text("#differences-table"))
    page.shoot(tmp_path / "comparison.png")


def test_no_other_machine_is_asked(browser, address):
    page = Page(browser, address)
    for tab in (1, 2):
        page.open_tab(tab)
        time.sleep(1)
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if url.startswith(address)]
    assert not [url for url in asked if url.startswith(("http", "ws")) and not url.startswith(address)]
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
