"""The chat page in a headless Chromium: it streams, stops, shows errors and never the model's text as markup."""

import os
import re
import shutil

import pytest
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright

from tests.predict.served import PATIENCE_S, ModellessLLM, serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ANSWER = ".turn.assistant"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        sandbox = [] if os.getuid() else ["--no-sandbox"]  # which root cannot have
        try:
            running = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        except Error as error:
            pytest.skip(f"no Chromium to test the chat page in; install the package chromium ({error.message:.200})")
        yield running
        running.close()


@pytest.fixture
def llm():
    return ModellessLLM()


@pytest.fixture
def served(llm):
    with serving(llm) as running:
        yield running


@pytest.fixture
def page(browser: Browser, served):
    with opened(browser, served.url) as page:
        yield page


class opened:  # reads as a function
    """A page that has asked nothing of anybody else and has had no error when it is closed."""

    def __init__(self, browser: Browser, url: str):
        self.page, self.url, self.errors = browser.new_page(), url, []

    def __enter__(self) -> Page:
        self.page.set_default_timeout(PATIENCE_S * 1000)
        self.page.on("pageerror", lambda error: self.errors.append(error))
        self.page.on("request", lambda r: r.url.startswith(self.url) or self.errors.append(r.url))
        self.page.goto(self.url)
        return self.page

    def __exit__(self, *_) -> None:
        self.page.close()
        assert self.errors == []


def ask(page: Page, text: str) -> None:
    page.fill("#question", text)
    page.press("#question", "Enter")


def test_it_streams_an_answer_and_counts(page, served, llm):
    expect(page.locator("#model")).to_have_text("demo")
    page.click("summary")
    page.fill("#max_tokens", "40")
    ask(page, "Hello")
    expect(page.locator(".under")).to_have_text(re.compile(r"^\d+ tokens in [\d.]+ s, [\d.]+ tokens/s$"))
    expect(page.locator(".turn.user")).to_have_text("Hello")
    expect(page.locator("#send")).to_be_visible()
    assert page.locator(ANSWER).text_content()
    before = served.service.metrics.prompt_tokens._value.get()
    ask(page, "And then?")
    expect(page.locator(".under").nth(1)).to_have_text(re.compile("tokens/s$"))
    # The second question came with the first and its answer.
    assert served.service.metrics.prompt_tokens._value.get() - before > before


def test_it_stops_in_the_middle_and_keeps_what_came(page, served, llm):
    llm.runner.steps_left = 5
    ask(page, "Hello")
    expect(page.locator(".under")).to_have_text(re.compile("^5 tokens"))
    page.click("#stop")
    expect(page.locator(".under")).to_have_text(re.compile("^5 tokens in .*, stopped$"))
    expect(page.locator("#send")).to_be_visible()
    assert page.locator(ANSWER).text_content()
    served.wait_until(lambda: not served.service.in_flight)
    llm.runner.go.set()
    served.wait_until_idle()
    assert served.stats.generated_tokens == 6  # the step under way


def test_it_stops_before_the_first_token_and_gives_the_question_back(page, served, llm):
    llm.runner.go.clear()
    ask(page, "Hello")
    page.click("#stop")
    expect(page.locator(".under")).to_have_text("stopped")
    expect(page.locator("#question")).to_have_value("Hello")
    llm.runner.go.set()
    served.wait_until_idle()


def test_it_shows_errors(page, served, llm):
    page.click("summary")
    page.fill("#max_tokens", "100000")
    ask(page, "Hello")
    expect(page.locator(".under.error")).to_have_text(
        re.compile("^max_tokens is 100000, with .* more than the 256 tokens of context")
    )
    page.fill("#max_tokens", "5")
    llm.runner.error = RuntimeError("out of luck")
    ask(page, "Hello")
    expect(page.locator(".under.error").nth(1)).to_have_text(re.compile("the engine failed .*out of luck"))


def test_the_settings_reach_the_server(page, served, monkeypatch):
    seen = []
    page.on("request", lambda r: r.method == "POST" and seen.append(r.post_data_json))
    page.click("summary")
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "3")
    ask(page, "Hello")
    expect(page.locator(".under")).to_have_text(re.compile("^[123] tokens?"))
    [request] = seen
    assert request["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert (request["temperature"], request["max_tokens"], request["stream"]) == (0, 3, True)


def test_text_is_never_markup(page):
    ask(page, "<img src=x onerror=alert(1)><b>bold</b>")
    expect(page.locator(".turn.user")).to_have_text("<img src=x onerror=alert(1)><b>bold</b>")
    assert page.locator("main img, main b").count() == 0


def test_it_asks_for_the_key(browser, llm):
    with serving(llm, api_key="secret") as served, opened(browser, served.url) as page:
        expect(page.locator("#key")).to_be_visible()
        expect(page.locator("#question")).to_be_hidden()
        page.fill("#key", "wrong")
        page.click("text=Unlock")
        expect(page.locator(".error")).to_have_text(re.compile("the API key is not the server's"))
        page.fill("#key", "secret")
        page.click("text=Unlock")
        ask(page, "Hello")
        expect(page.locator(".under").last).to_have_text(re.compile("tokens/s$"))
