"""One Chromium for all tests."""

import shutil
from pathlib import Path

import pytest

from crashkernel.report.campaignpage import campaign_html
from crashkernel.report.results import read_campaign
from support import campaigns
from support.browser import OPTIONS, Browser


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    for program, package in (("chromium", "chromium"), ("chromedriver", "chromium-driver"), ("pdftotext", "poppler-utils")):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (apt-get install {package}, or make browser)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_page_load_timeout(60)
    driver.set_script_timeout(60)
    try:
        yield Browser(driver)
    finally:
        driver.quit()


@pytest.fixture(scope="session")
def reach(tmp_path_factory):
    """A campaign with some of everything, and its page."""
    directory = tmp_path_factory.mktemp("reach")
    campaign = read_campaign(campaigns.add_size(campaigns.reach(directory / "reach.db", drills=190)))
    (directory / "reach.html").write_text(campaign_html(campaign))
    return campaign, directory / "reach.html"


@pytest.fixture
def page(browser, reach):
    """The page, freshly loaded."""
    browser.show(reach[1])
    return browser
