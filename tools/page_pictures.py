"""Takes the pictures of the page in `docs/images`: `python tools/page_pictures.py movq.plan rqvae.plan`.

The second plan draws beside the first. Needs the packages of the extra `dev`, and Chromium.
"""

import argparse
import shutil
from pathlib import Path

from load import server
from playwright.sync_api import Browser, Page, expect, sync_playwright

FOLDER = Path(__file__).parent.parent / "docs" / "images"
SECONDS = 60_000  # milliseconds


def take(browser: Browser, address: str, size: tuple[int, int], scheme: str, other: str | None, label: str) -> Page:
    """The page after a drawing, with a mask that is painted and a position that is chosen."""
    width, height = size
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=1.5)
    page.goto(address)
    page.select_option("#class", label=label)
    page.fill("#seed", "5")
    if other:
        page.select_option("#other", other)
    page.click("#draw")
    expect(page.locator("#status")).to_have_text("done", timeout=SECONDS)
    page.locator("#mask").scroll_into_view_if_needed()
    box = page.locator("#mask").bounding_box()
    points = [(0.3, 0.62), (0.5, 0.68), (0.7, 0.62)]
    places = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places:
        page.mouse.move(*place, steps=6)
    page.mouse.up()
    page.locator("#map").click(position={"x": 75, "y": 75})
    expect(page.locator("#cell")).to_contain_text("Beside the map", timeout=SECONDS)
    return page


def main() -> None:
    """Writes page.png and page-phone.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--label", default="faces")
    asked = parser.parse_args()
    with server(asked.plan, str(asked.other)) as (address, _), sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = take(browser, address, (1280, 640), "light", asked.other.stem, asked.label)
        page.screenshot(path=FOLDER / "page.png", full_page=True)
        page = take(browser, address, (390, 844), "dark", None, asked.label)
        page.evaluate("() => scrollTo(0, document.querySelector('#easel').offsetTop - 10)")
        page.screenshot(path=FOLDER / "page-phone.png")
        browser.close()


if __name__ == "__main__":
    main()
