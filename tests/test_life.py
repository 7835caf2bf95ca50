"""life.py: the page of a token's life, opened and used in a real browser, without a network."""

import copy
import itertools
import json
import math
import random
import re
import shutil

import pytest
import tiktoken
import torch
from conftest import SHAPE, assert_same, times

import fineweb
import life
import train_gpt2

webdriver = pytest.importorskip("selenium.webdriver", reason="the page needs selenium to be tested")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = """--headless=new --no-sandbox --disable-gpu --no-first-run --disable-sync
    --disable-background-networking --disable-component-update""".split()
HOSTILE = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'><!--"
ALLOWED = 1e-3  # the largest difference of a logit, as the page itself has it


class Browser:
    """A page opened in Chromium, and what the tests do with it."""

    def __init__(self, profile) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        self.driver.set_network_conditions(offline=True, latency=0, throughput=0)

    def open(self, path, station="start"):
        self.driver.get("about:blank")
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        self.driver.get(f"{path.as_uri()}#{station}")
        self.until("document.getElementById('proof').className !== ''")

    def js(self, expression, *args):
        """The value of an expression, a promise's when it is kept."""
        return self.driver.execute_script(f"return {expression}", *args)

    def until(self, expression, *args):
        WebDriverWait(self.driver, 20, 0.02).until(lambda _: self.js(expression, *args), expression)

    def element(self, css):
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def proof(self):
        badge = self.element("#proof")
        return badge.get_attribute("class"), badge.text

    def tokens(self):
        return self.js("life.state.tokens.map(({id}) => id)")

    def type(self, text):
        """Put text into the field as if typed: a driver cannot type emoji or tabs into it."""
        put = "byId('text').value = arguments[0]; byId('text').dispatchEvent(new Event('input'))"
        self.driver.execute_script(put, text)
        self.until(
            "life.state.all.map(({id}) => id).join() === life.encode(arguments[0]).join()", text
        )

    def visit(self, station):
        self.js("location.hash = arguments[0]", station)
        self.until("life.state.station === arguments[0]", station)

    def visit_all(self):
        """Every station in turn: its name and the text that it shows."""
        for station in self.js("STATIONS.map(({id}) => id)"):
            self.visit(station)
            yield station, self.element("#station").text

    def bars(self):
        """What stands at the ten bars of the sampling panel."""
        return [bar.text for bar in self.driver.find_elements(By.CSS_SELECTOR, "#candidates .n")]

    def log(self, kind):
        return [entry["message"] for entry in self.driver.get_log(kind)]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        pytest.skip("no chromium and chromedriver here (Debian: chromium, chromium-driver)")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(chromium):
    """The browser, of which each test demands that nothing went wrong on the page."""
    yield chromium
    assert chromium.log("browser") == []


@pytest.fixture(scope="module")
def model(tokenizer):
    """A GPT-2 whose weights are large enough for attention, GELU and logits to be far from flat."""
    torch.manual_seed(1)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(vocab_size=384, **SHAPE)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def page(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "life.html"
    life.write_page(model, tokenizer, path, text="the sun sat on the tin", name="tiny <b>")
    return path


def encoding(tokens, end=fineweb.EOT):
    """A tokenizer of the 256 bytes, these tokens and the one that ends a document."""
    ranks = {token: i for i, token in enumerate([*(bytes([b]) for b in range(256)), *tokens])}
    special = {end: len(ranks)}
    return tiktoken.Encoding(
        "tiny", pat_str=fineweb.PATTERN, mergeable_ranks=ranks, special_tokens=special
    )


@torch.no_grad()
def outputs_of(model, ids):
    """What each module gives for ids, (T, …), with the weights rounded to fp16; "" is the model."""
    rounded, outputs = copy.deepcopy(model), {}
    for name, module in rounded.named_modules():
        module.register_forward_hook(
            lambda m, i, out, name=name: outputs.update({name: out.view(len(ids), -1)})
        )
    for p in rounded.parameters():
        p.data = p.half().double()
    rounded(torch.tensor([ids]))
    return outputs


def assert_close(got, expected, atol=ALLOWED):
    got = torch.as_tensor(got, dtype=torch.float64).flatten()
    expected = torch.as_tensor(expected, dtype=torch.float64).flatten()
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


# Pieces that are hard for a tokenizer: what stands side by side decides where a text is cut.
PIECES = [
    " ", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u0085", "\ufeff", "\u2028", "\u3000", "\u180e",
    "\u200b", "\x1c", "\x00", "'s", "'ll", "'LL", "'", "’s", "the", " the", "The", "é", "e\u0301",
    "ß", "你好", "ที่", "अ", "١٢", "½", "Ⅷ", "7", " 42", "_", "...", " !?", "<|endoftext|>", HOSTILE,
    "\U0001f44d\U0001f3fd", "\U0001f469\u200d\U0001f467", "\ud83d", "\udc4d",
    "\U00010940", "\U00011de0",
]  # fmt: skip


def any_text(rng: random.Random) -> str:
    everywhere = [chr(rng.randrange(0x110000)) for _ in range(4)]
    return "".join(rng.choices(PIECES + everywhere, k=rng.randint(0, 12)))


def test_page_gives_the_ids_that_tiktoken_gives_for_any_text(browser, model, tmp_path):
    # A token for each pair of the bytes that occur: wherever a text is cut, the ids show it.
    occurring = sorted({*"".join(PIECES).encode("utf-8", "replace")})
    pairs = encoding([bytes(pair) for pair in itertools.product(occurring, repeat=2)])
    life.write_page(model, pairs, tmp_path / "life.html", text="\x00")
    rng = random.Random(0)
    texts = [any_text(rng) for _ in range(times(5000, 100_000))]
    browser.open(tmp_path / "life.html")
    got = browser.js("JSON.parse(arguments[0]).map(life.encode)", json.dumps(texts))
    expected = [pairs.encode_ordinary(text) for text in texts]
    assert [text for text, a, b in zip(texts, got, expected, strict=True) if a != b] == []


def test_page_knows_the_letters_digits_and_spaces_that_tiktoken_knows(browser, model, tmp_path):
    # This tokenizer joins "s", "1" and the space with the first byte of what follows in the same
    # word, so its ids say whether a character is taken for a letter, a digit, or white space.
    joined = [first + bytes([b]) for first in (b"s", b"1", b" ") for b in range(128, 256)]
    life.write_page(model, encoding(joined), tmp_path / "life.html", text="s")
    points = [*range(0x3400), *random.Random(0).sample(range(0x3400, 0x110000), times(6000, 10**6))]
    texts = [f"s{chr(p)}1{chr(p)} {chr(p)}s" for p in points if not 0xD800 <= p < 0xE000]
    browser.open(tmp_path / "life.html")
    got = browser.js("JSON.parse(arguments[0]).map(life.encode)", json.dumps(texts))
    assert got == encoding(joined).encode_ordinary_batch(texts)
    assert len({len(ids) for ids in got}) > 3  # the characters did differ


def test_page_gives_the_ids_of_gpt2s_own_tokenizer(browser, gpt2, tmp_path):
    config = train_gpt2.GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=16)
    life.write_page(train_gpt2.GPT(config), gpt2, tmp_path / "life.html")
    browser.open(tmp_path / "life.html")
    assert browser.proof()[0] == "good"
    assert browser.js("life.encode('How are you?')") == [2437, 389, 345, 30]
    rng = random.Random(1)
    texts = [any_text(rng) for _ in range(1000)] + [fineweb.__doc__]
    got = browser.js("JSON.parse(arguments[0]).map(life.encode)", json.dumps(texts))
    assert got == [gpt2.encode_ordinary(text) for text in texts]


def test_page_computes_pytorchs_logits_and_says_so(browser, page, model, tokenizer):
    browser.open(page)
    kind, text = browser.proof()
    assert kind == "good" and "proven" in text and browser.js("life.difference") < ALLOWED
    for text in ("the sun", "naïve 👍\n\n  end", "a" * 25):
        browser.type(text)
        ids = tokenizer.encode_ordinary(text)
        assert browser.tokens() == ids
        expected = outputs_of(model, ids)[""]
        assert expected.abs().max() > 1  # or their difference would say little
        for t in range(len(ids)):
            assert_close(browser.js(f"life.predict({t}).then((p) => [...p.logits])"), expected[t])


def test_every_number_on_the_way_is_pytorchs(browser, page, model, tokenizer):
    browser.open(page)
    browser.type("the sun sat on")
    expected = outputs_of(model, tokenizer.encode_ordinary("the sun sat on"))
    ours = dict(
        ln_1="ln_1", qkv="attn.c_attn", attn="attn.c_proj",
        ln_2="ln_2", units="mlp.c_fc", mlp="mlp.c_proj",
    )  # fmt: skip
    for i in range(model.config.n_layer):
        for key, name in ours.items():
            got = browser.js(f"[...life.state.trace.blocks[{i}].{key}]")
            assert_close(got, expected[f"transformer.h.{i}.{name}"], atol=1e-5)
    for key in ("wte", "wpe", "ln_f"):
        got = browser.js(f"[...life.state.trace.{key}]")
        assert_close(got, expected[f"transformer.{key}"], atol=1e-5)


@pytest.mark.parametrize("most", [life.PAGE_WEIGHTS, 1000])
def test_logit_lens_is_the_head_put_behind_each_block(
    browser, model, tokenizer, tmp_path, monkeypatch, most
):
    monkeypatch.setattr(life, "PAGE_WEIGHTS", most)
    life.write_page(model, tokenizer, tmp_path / "life.html", text="the sun")
    browser.open(tmp_path / "life.html")
    outputs = outputs_of(model, browser.tokens())
    streams = [outputs["transformer.wte"] + outputs["transformer.wpe"]]
    streams += [outputs[f"transformer.h.{i}"] for i in range(model.config.n_layer)]
    for t in range(len(browser.tokens())):
        lens = browser.js(f"life.predict({t}).then(({{lens}}) => lens)")
        for stream, guess in zip(streams, lens, strict=True):
            logits = model.lm_head(model.transformer.ln_f(stream[t].float()))[: tokenizer.n_vocab]
            p, ids = logits.softmax(dim=0).topk(5)
            assert guess["ids"] == ids.tolist()
            assert_close(guess["p"], p)


def test_page_computes_a_model_without_biases(browser, model, tokenizer, tmp_path):
    model = copy.deepcopy(model)
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            module.bias = None
    life.write_page(model, tokenizer, tmp_path / "life.html", text="the sun")
    browser.open(tmp_path / "life.html", "ln_1")
    assert browser.proof()[0] == "good"
    assert "no biases" in browser.element("#station").text


def test_text_beyond_the_context_is_left_out_from_the_front(browser, page, model, tokenizer):
    browser.open(page)
    text = "the tin sat on " * 9
    browser.type(text)
    ids = tokenizer.encode_ordinary(text)
    assert len(ids) > 32 and browser.tokens() == ids[-32:]
    assert_close(
        browser.js("[...life.state.predictions[31].logits]"), outputs_of(model, ids[-32:])[""][-1]
    )
    assert f"The first {len(ids) - 32} are left out" in browser.element("#note").text


def test_a_changed_byte_of_weights_or_tokenizer_is_red(browser, page, tmp_path):
    whole = page.read_bytes()
    begin, numbers = whole.index(b'<script id="data"'), whole.index(b'<script id="numbers"')
    end = whole.index(b"</script>", numbers)
    rng = random.Random(0)
    places = [
        whole.index(b"data-crc32=") + 13, whole.index(b">", begin) + 1, numbers - 20,
        whole.index(b'"tokens":[') + 12, whole.index(b'"n_layer":') + 11, numbers + 40, end - 1,
        *(rng.randrange(numbers + 40, end) for _ in range(times(3, 300))),
    ]  # fmt: skip
    changed = tmp_path / "changed.html"
    for place in places:
        other = b"7" if whole[place : place + 1] != b"7" else b"6"
        changed.write_bytes(whole[:place] + other + whole[place + 1 :])
        browser.open(changed)
        kind, text = browser.proof()
        assert kind == "bad" and "damaged" in text, whole[place - 20 : place + 20]
    changed.write_bytes(whole)
    browser.open(changed)
    assert browser.proof()[0] == "good"


def test_logits_that_are_not_pytorchs_are_red(browser, model, tokenizer, tmp_path, monkeypatch):
    compute = life.weights_and_logits

    def slightly_wrong(model, ids):
        arrays = compute(model, ids)
        arrays["reference.logits"][-1, 7] += 2 * ALLOWED
        return arrays

    monkeypatch.setattr(life, "weights_and_logits", slightly_wrong)
    life.write_page(model, tokenizer, tmp_path / "life.html", text="the sun")
    browser.open(tmp_path / "life.html")
    kind, text = browser.proof()
    assert kind == "bad" and "wrong" in text


def test_temperature_top_k_and_top_p_are_those_of_sample(browser, page):
    browser.open(page, "next")
    logits = torch.tensor(browser.js("[...life.state.predictions[life.state.t].logits]"))[:300]
    torch.manual_seed(0)
    for temperature, top_k, top_p in (
        (1, 300, 1), (0.5, 300, 1), (1.7, 7, 1), (1, 300, 0.4), (0.8, 20, 0.6), (0, 9, 0.5)
    ):  # fmt: skip
        settings = dict(temperature=temperature, top_k=top_k, top_p=top_p)
        ids, shares = browser.js(
            "(({ids, shares}) => [[...ids].slice(0, shares.length), [...shares]])"
            "(life.candidates(arguments[0], 300, arguments[1]))", logits.tolist(), settings,
        )  # fmt: skip
        expected = torch.zeros(300)
        expected[ids] = torch.tensor(shares, dtype=torch.float32)
        drawn = train_gpt2.sample(logits.repeat(20_000, 1), **settings).flatten()
        found = drawn.bincount(minlength=300) / len(drawn)
        assert math.isclose(sum(shares), 1, abs_tol=1e-5)
        assert (found[expected == 0] == 0).all()
        assert (found - expected).abs().max() < 0.015  # four standard deviations of 20,000 draws


def test_sliders_change_the_bars(browser, page):
    browser.open(page, "next")
    assert len(browser.bars()) == 10 and "cut" not in browser.bars()
    browser.element("#temperature").send_keys(Keys.HOME)
    assert browser.bars() == ["100 %"] + ["cut"] * 9
    browser.element("#temperature").send_keys(Keys.END)
    assert browser.js("life.state.settings.temperature") == 2 and "cut" not in browser.bars()
    browser.element("#top_k").send_keys(Keys.HOME, Keys.ARROW_RIGHT)
    assert browser.bars()[2:] == ["cut"] * 8 and browser.bars()[1] != "cut"


def test_next_tokens_are_drawn_and_appended(browser, page, model, tokenizer):
    browser.open(page, "next")
    ids = browser.tokens()
    browser.element("#temperature").send_keys(Keys.HOME)  # always the likeliest
    for n in range(10):
        browser.element("#draw").click()
        browser.until("life.state.all.length === arguments[0]", len(ids) + n + 1)
    greedy = model.generate(torch.tensor([ids]), 10, temperature=0, n_vocab=tokenizer.n_vocab)[
        0
    ].tolist()
    assert browser.tokens() == greedy
    assert browser.js("life.state.t") == len(greedy) - 1
    assert browser.js("byId('text').value") == tokenizer.decode(greedy)
    browser.element("#temperature").send_keys(Keys.END)
    browser.element("#draw-many").click()
    browser.until("life.state.all.length === arguments[0]", len(greedy) + 20)
    assert (
        browser.element("#drawn").text
        == browser.element("#chips [aria-checked=true]").text.split("\n")[0]
    )


def test_text_is_never_html(browser, model, tmp_path):
    tokens = (HOSTILE, "<script>", "</script>", "<!--")
    hostile = encoding([token.encode() for token in tokens], end=HOSTILE + ">")
    life.write_page(model, hostile, tmp_path / "life.html", text=HOSTILE, name=HOSTILE)
    browser.open(tmp_path / "life.html")
    assert browser.proof()[0] == "good"
    browser.type(HOSTILE * 2)
    browser.js("compute([256, 257, 258, 259, 260].map(drawnToken))")
    browser.until("life.state.tokens.length === 5")
    browser.js("pick(0)")
    shown = "".join(text for _, text in browser.visit_all())
    assert HOSTILE in browser.element("#about").text and HOSTILE.replace(" ", "␣") in shown
    assert browser.js("window.broken") is None
    assert (
        browser.js("document.querySelectorAll('script, img').length") == 4
    )  # the page's own scripts


def test_page_loads_nothing_but_itself(browser, page):
    browser.open(page)
    events = [json.loads(entry)["message"] for entry in browser.log("performance")]
    urls = [
        e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"
    ]
    assert urls and all(url.startswith((page.as_uri(), "blob:", "data:")) for url in urls)
    # Nor could it: the browser refuses by the page's own policy, before it looks for a network.
    for attempt in ("fetch('https://example.org')", "new WebSocket('wss://example.org')"):
        browser.js(
            f"""new Promise((refused) => {{
                  addEventListener("securitypolicyviolation", refused, {{once: true}});
                  {attempt};
                }}).then(({{blockedURI}}) => blockedURI)"""
        )
    assert len(browser.log("browser")) >= 2


def test_page_can_be_used_with_the_keyboard(browser, page):
    browser.open(page)
    browser.element("body").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert browser.js("life.state.station") == "embed"
    browser.element("#chips [aria-checked=true]").send_keys(Keys.ARROW_LEFT)
    browser.until(
        "life.state.t === life.state.tokens.length - 2 && life.state.predictions[life.state.t]"
    )
    assert browser.js("document.activeElement.getAttribute('aria-checked')") == "true"
    browser.element("#map a[href='#scores']").send_keys(Keys.ENTER)
    browser.until("life.state.station === 'scores'")
    assert browser.js("document.activeElement.getAttribute('href')") == "#scores"
    for key in (Keys.ARROW_LEFT, Keys.ARROW_UP):  # the first brings the picture into view
        browser.element("#station canvas").send_keys(key)
    assert "q·k" in browser.element("#tip").text


def test_every_station_fits_a_phone_and_has_its_numbers(browser, page):
    phone = dict(width=360, height=740, deviceScaleFactor=1, mobile=True)
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        browser.open(page)
        for station, text in browser.visit_all():
            assert browser.js("document.documentElement.scrollWidth") <= 360, station
            assert len(text) > 200 and not re.search("NaN|undefined|object", text), station
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_large_model_has_the_trace_of_its_sentence_alone(
    browser, model, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(life, "PAGE_WEIGHTS", 1000)
    life.write_page(model, tokenizer, tmp_path / "life.html", text="the sun sat on the")
    browser.open(tmp_path / "life.html")
    kind, text = browser.proof()
    assert (
        kind == "good"
        and "trace" in text
        and "too much to compute" in browser.element("#about").text
    )
    assert not browser.element("#draw").is_enabled()
    with torch.no_grad():
        expected = model(torch.tensor([browser.tokens()]))[0]
    for t in range(len(expected)):
        assert_close(
            browser.js(f"life.predict({t}).then((p) => [...p.logits])"), expected[t], atol=1e-5
        )
    # From the outputs of the matrices, in fp16, the page itself has gone on to the same end.
    last = torch.tensor(browser.js("[...life.state.trace.ln_f]")).view(len(expected), -1)
    assert_close((last @ model.lm_head.weight.T).detach(), expected, atol=0.05)
    for station, text in browser.visit_all():
        assert len(text) > 200 and not re.search("NaN|undefined|object", text), station


@pytest.fixture(scope="module")
def quick_page(tmp_path_factory):
    """The page of a model as large as the quick recipe's; its weights are random."""
    words = map("".join, itertools.product("abcdefghijklmnop", repeat=3))
    tokens = [b"  ", b"    ", *(word.encode() for word in itertools.islice(words, 4096 - 259))]
    shape = {key: getattr(train_gpt2.PRESETS["quick"][0], key) for key in SHAPE}
    model = train_gpt2.GPT(train_gpt2.GPTConfig(vocab_size=4096, **shape))
    path = tmp_path_factory.mktemp("quick") / "life.html"
    life.write_page(model, encoding(tokens), path, text="If the file does not exist, " * 9)
    return path


def test_quick_models_page_is_small_and_fast(browser, quick_page):
    assert quick_page.stat().st_size <= 6e6
    browser.open(quick_page)
    assert browser.proof()[0] == "good" and len(browser.tokens()) == 64
    run = "life.run(arguments[0]).then(({ms}) => ms)"
    assert min(browser.js(run, browser.tokens()) for _ in range(3)) < 500


def test_no_text_that_the_field_takes_freezes_the_page(browser, quick_page):
    browser.open(quick_page)
    for text in (" ", "a b", "\U0001f600"):
        browser.type((text * 9999)[: browser.js("byId('text').maxLength")])
        took = browser.js(
            """STATIONS.map(({id}) => {
                 const start = performance.now();
                 go(id);
                 return performance.now() - start;
               })"""
        )
        assert max(took) < 3000, took


def test_writing_a_page_leaves_the_model_as_it_was(model, tokenizer, tmp_path, monkeypatch):
    before = copy.deepcopy(model.train().state_dict())
    for most in (life.PAGE_WEIGHTS, 1000):
        monkeypatch.setattr(life, "PAGE_WEIGHTS", most)
        life.write_page(model, tokenizer, tmp_path / "life.html")
    assert model.training and not any(module._forward_hooks for module in model.modules())
    for name, tensor in model.eval().state_dict().items():
        assert_same(tensor, before[name])


def test_weights_that_fp16_cannot_hold_are_refused_and_nothing_is_written(
    model, tokenizer, tmp_path
):
    for value in (math.nan, math.inf, 1e5):
        broken = copy.deepcopy(model)
        broken.transformer.h[1].mlp.c_fc.bias.data[3] = value
        with pytest.raises(ValueError, match="transformer.h.1.mlp.c_fc.bias"):
            life.write_page(broken, tokenizer, tmp_path / "life.html")
    assert list(tmp_path.iterdir()) == []


def test_command_line_writes_the_page_of_a_run_into_its_folder(
    model, tokenizer, tmp_path, monkeypatch, capsys
):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt2, "load_model", lambda name: (model, tokenizer))
    assert life.main(["run"]) == 0
    assert life.main(["gpt2-from-the-hub", "--text", "the sun"]) == 0
    assert {*tmp_path.rglob("*.*")} == {tmp_path / "run" / "life.html", tmp_path / "life.html"}
    assert life.main(["run", "--text", ""]) == 1
    assert (
        capsys.readouterr().err
        == "error: the reference sentence is empty: it needs at least one token\n"
    )
