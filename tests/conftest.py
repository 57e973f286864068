"""A real browser, for the tests that look at what people see."""
import os, shutil

import pytest

NAMES = "chromium", "chromium-browser", "google-chrome"


@pytest.fixture(scope="session")
def browser():
    "Headless Chromium under Playwright; without one the tests are skipped, or fail where RADROTATOR_BROWSER=required"
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        words = f"there is no browser here ({', '.join(NAMES)}, or the file that CHROMIUM names): what people see was not looked at"
        (pytest.fail if os.environ.get("RADROTATOR_BROWSER") == "required" else pytest.skip)(words)
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=120_000)  # milliseconds: a busy machine takes its time
        yield chromium
        chromium.close()
