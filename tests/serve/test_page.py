"""The page, in a headless Chromium."""

import base64
import json
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from support.serving import application, listening, pixels, png, text

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (Debian: apt-get install chromium)"),
    pytest.mark.slow,
]
DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def address(artifacts):
    plans = {name: artifacts.plan(name) for name in ("movq", "rqvae", "vqvae2", "features")}
    with application(plans) as app, listening(app) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    playwright.expect.set_options(timeout=60_000)  # milliseconds; its own 5 seconds fail on a busy machine
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page in a window of a size; at the end it must have had no error, and asked no other host."""
    pages, wrong = [], []

    def visit(size=DESKTOP, at=address, **options):
        page = browser.new_context(viewport=dict(zip(("width", "height"), size, strict=True)), **options).new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
        page.on("request", lambda request: request.url.startswith((at, "data:", "blob:")) or wrong.append(request.url))
        page.goto(at)
        pages.append(page)
        return page

    visit.wrong = wrong
    yield visit
    for page in pages:
        page.context.close()
    assert wrong == []


def wait(page, status="done"):
    playwright.expect(page.locator("#status")).to_have_text(status)


def draw(page):
    page.evaluate("() => { document.querySelector('#status').textContent = '' }")
    page.click("#draw")
    wait(page)


def shown(page, pane="a"):
    url = page.evaluate(f"() => document.querySelector('#pane-{pane} .picture').toDataURL()")
    return pixels(url.partition(",")[2])[..., :3]


def paint(page, *points, tap=False):
    """Paints a line through points, given as shares of the width and height of the picture."""
    box = page.locator("#mask").bounding_box()
    places = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in points]
    if tap:
        for place in places:
            page.touchscreen.tap(*place)
        return
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places:
        page.mouse.move(*place, steps=4)
    page.mouse.up()


def fill(page, *points, folder):
    """Paints and fills; saves the image and the mask of the edit."""
    paint(page, *points)
    page.click("#fill")
    for name in ("image", "mask"):
        with page.expect_download() as download:
            page.click(f"#save-{name}")
        download.value.save_as(folder / f"{name}.png")


def picture_of(program, folder):
    """What a Python program of the page saves."""
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True, timeout=60)  # noqa: S603
    return pixels(base64.b64encode((folder / "picture.png").read_bytes()).decode())


def mask_of(page):
    """Where the mask is painted, bool [H, W]."""
    side = page.evaluate("() => document.querySelector('#pane-a .picture').width")
    url = page.evaluate("() => document.querySelector('#mask').toDataURL()")
    alpha = pixels(url.partition(",")[2])[..., 3]
    scale = alpha.shape[0] // side
    return alpha[scale // 2 :: scale, scale // 2 :: scale] > 120


def test_a_picture_appears_step_by_step(visit, movq_pipeline):
    page = visit()
    page.select_option("#class", label="eel")
    page.fill("#seed", "7")
    page.fill("[name=steps]", "4")
    draw(page)
    expected = movq_pipeline.generate([2], seed=7, steps=4).images[0]
    assert np.abs(shown(page).astype(int) - expected).max() <= 1
    assert page.locator("#pane-a .film button").count() == 4
    assert "movq, seed 7" in page.inner_text("#pane-a figcaption")
    page.locator("#pane-a .film button").first.click()
    assert (shown(page) != expected).any()


def test_two_plans_from_the_same_seed(visit, pipeline, movq_pipeline):
    page = visit()
    page.select_option("#other", "rqvae")
    page.fill("#seed", "3")
    draw(page)
    for pane, its in (("a", movq_pipeline), ("b", pipeline)):
        assert np.abs(shown(page, pane).astype(int) - its.generate([0], seed=3).images[0]).max() <= 1


def test_painted_pixels_are_filled(visit):
    page = visit()
    draw(page)
    before = shown(page)
    paint(page, (0.3, 0.6), (0.7, 0.6))
    mask = mask_of(page)
    assert 0 < mask.sum() < mask.size // 2
    assert mask[9, 8]
    page.click("#reseed")
    page.click("#fill")
    playwright.expect(page.locator("#save-mask")).to_be_visible()
    after = shown(page)
    np.testing.assert_array_equal(after[~mask], before[~mask])
    assert (after[mask] != before[mask]).any()
    page.check("[name=brush][value='0']")
    paint(page, (0.3, 0.6), (0.5, 0.6))
    assert mask_of(page).sum() < mask.sum()
    page.click("#clear")
    assert not mask_of(page).any()


def test_a_prior_in_raster_order_completes(visit):
    page = visit()
    page.select_option("#plan", "rqvae")
    draw(page)
    paint(page, (0.5, 0.8))
    assert "raster order" in page.inner_text("#hint")
    page.click("#fill")
    playwright.expect(page.locator("#pane-a figcaption")).to_contain_text("first row that the mask touches")


def test_the_mask_by_keyboard(visit):
    page = visit()
    page.focus("#mask")
    page.keyboard.press("-")
    for key in ("ArrowUp", "ArrowLeft", "Space"):
        page.keyboard.press(key)
    mask = mask_of(page)
    assert mask[6:8, 6:8].any()
    page.keyboard.down("Space")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.keyboard.up("Space")
    longer = mask_of(page)
    assert longer[6:8, 10].any()
    page.keyboard.press("ArrowDown")
    assert (mask_of(page) == longer).all()


def test_everything_is_reached_by_keyboard(visit):
    page = visit()
    page.focus("#plan")
    reached = set()
    for _ in range(40):
        reached.add(page.evaluate("() => document.activeElement.id"))
        page.keyboard.press("Tab")
    assert {"class", "seed", "reseed", "draw", "mask", "open", "radius", "clear", "fill", "map", "copy"} <= reached
    page.focus("#seed")
    page.keyboard.press("Enter")
    wait(page)


def test_the_mask_by_finger(visit):
    page = visit(PHONE, has_touch=True, is_mobile=True)
    page.locator("#mask").scroll_into_view_if_needed()
    paint(page, (0.4, 0.4), tap=True)
    assert mask_of(page)[6, 6]


@pytest.mark.parametrize("by", ["chooser", "drop"])
def test_a_picture_of_the_user(visit, pipeline, by):
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    page = visit()
    page.select_option("#plan", "rqvae")
    if by == "chooser":
        page.set_input_files("#file", {"name": "mine.png", "mimeType": "image/png", "buffer": png(image)})
    else:
        page.evaluate(
            """(text) => {
                const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
                const dataTransfer = new DataTransfer();
                dataTransfer.items.add(new File([bytes], "mine.png", { type: "image/png" }));
                document.querySelector("#easel").dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true }));
            }""",
            text(png(image)),
        )
    playwright.expect(page.locator("#pane-a figcaption")).to_have_text("mine.png")
    np.testing.assert_array_equal(shown(page), image)
    codes = pipeline.encode(image[None])[0, 0, 0].tolist()
    playwright.expect(page.locator("#cell")).to_contain_text(f"Row 1, column 1: {', '.join(map(str, codes))}.")


def test_a_file_that_is_no_picture(visit):
    page = visit()
    page.set_input_files("#file", {"name": "mine.txt", "mimeType": "text/plain", "buffer": b"no picture"})
    playwright.expect(page.locator("#problem")).to_contain_text("not an image")


@pytest.mark.parametrize("name", ["rqvae", "vqvae2"])
def test_the_picture_of_one_position(visit, artifacts, name):
    pipeline = artifacts.pipeline(name)
    page = visit()
    page.select_option("#plan", name)
    page.fill("#seed", "1")
    draw(page)
    codes = pipeline.generate([0], seed=1).codes
    page.focus("#map")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    if name == "rqvae":
        at = codes[0, 1, 1]
        page.select_option("#depth", label="4")
        filled = np.broadcast_to(at, codes.shape)
    else:
        top, bottom = pipeline.maps(codes)
        at = np.array([top[0, 0, 0, 0], bottom[0, 1, 1, 0]])
        filled = pipeline.layout.join([np.full_like(top, at[0]), np.full_like(bottom, at[1])])
    playwright.expect(page.locator("#cell")).to_contain_text("Beside the map")
    assert f"Row 2, column 2: {', '.join(map(str, at.tolist()))}." in page.inner_text("#cell")
    drawn = pixels(page.evaluate("() => document.querySelector('#code').toDataURL()").partition(",")[2])[..., :3]
    assert np.abs(drawn.astype(int) - pipeline.decode(filled)[0]).max() <= 1


@pytest.mark.parametrize("language", ["curl", "python"])
@pytest.mark.parametrize("edit", [False, True])
def test_the_program_does_the_same(visit, tmp_path, language, edit):
    if language == "curl" and not shutil.which("curl"):
        pytest.skip("there is no curl here")
    if language == "python":
        pytest.importorskip("openai")
    page = visit()
    page.click("#more summary")
    page.fill("[name=top_k]", "5,5,9,9")
    draw(page)
    if edit:
        fill(page, (0.2, 0.3), (0.8, 0.3), folder=tmp_path)
    page.check(f"[value={language}]")
    program = page.inner_text("#call")
    if language == "python":
        found = picture_of(program, tmp_path)
    else:
        words = shlex.split(program.replace("\\\n", " "))
        reply = subprocess.run([*words, "-s"], cwd=tmp_path, check=True, timeout=60, capture_output=True)  # noqa: S603
        found = pixels(json.loads(reply.stdout)["data"][0]["b64_json"])
    np.testing.assert_array_equal(found, shown(page))


@pytest.mark.parametrize("edit", [False, True])
def test_a_text_as_features(visit, artifacts, tmp_path, edit):
    pipeline = artifacts.pipeline("features")
    features = pipeline.condition.examples(1)
    np.save(tmp_path / "features.npy", features[0])
    page = visit()
    page.select_option("#plan", "features")
    assert page.locator("#class").is_hidden()
    page.click("#draw")
    playwright.expect(page.locator("#problem")).to_contain_text("needs a text")
    visit.wrong.clear()  # Chromium reports the refusal itself
    page.set_input_files("#features", tmp_path / "features.npy")
    page.fill("#seed", "3")
    draw(page)
    expected = pipeline.generate(features, seed=3).images[0]
    assert np.abs(shown(page).astype(int) - expected).max() <= 1
    if edit:
        fill(page, (0.2, 0.6), (0.8, 0.6), folder=tmp_path)
    program = page.inner_text("#call")
    assert len(program) < 1000
    reply = subprocess.run(["bash", "-c", program], cwd=tmp_path, check=True, timeout=60, capture_output=True)  # noqa: S603, S607
    np.testing.assert_array_equal(pixels(json.loads(reply.stdout)["data"][0]["b64_json"]), shown(page))
    page.check("[value=python]")
    np.testing.assert_array_equal(picture_of(page.inner_text("#call"), tmp_path), shown(page))


@pytest.mark.parametrize("size", [(320, 640), (800, 600)])
def test_nothing_is_wider_than_the_window(visit, size):
    page = visit(size)
    page.select_option("#other", "rqvae")
    draw(page)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= size[0]


def test_light_and_dark(visit):
    colours = [
        visit(color_scheme=scheme).evaluate("() => getComputedStyle(document.body.parentNode).backgroundColor")
        for scheme in ("light", "dark")
    ]
    assert colours[0] != colours[1]


def test_errors_are_shown_and_work_stops(visit):
    page = visit()
    page.fill("[name=steps]", "0")
    page.click("#draw")
    playwright.expect(page.locator("#problem")).to_contain_text("steps")
    page.fill("[name=steps]", "5000")
    page.click("#draw")
    page.click("#stop")
    wait(page, "stopped")
    visit.wrong[:] = [each for each in visit.wrong if "status of 400" not in each]  # Chromium reports these itself


def test_a_key_is_asked_for(visit, artifacts):
    with application({"movq": artifacts.plan("movq")}, api_key="secret") as app, listening(app) as address:
        page = visit(at=address)
        playwright.expect(page.locator("#problem")).to_contain_text("API key")
        page.keyboard.type("secret")
        page.keyboard.press("Enter")
        playwright.expect(page.locator("#about")).to_contain_text("16x16")
        draw(page)
        assert "$VQDEPLOY_API_KEY" in page.inner_text("#call")
        assert "secret" not in page.inner_text("#call")
    visit.wrong[:] = [each for each in visit.wrong if "status of 401" not in each]
