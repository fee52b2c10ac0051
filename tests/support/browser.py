"""Chromium without a window; what it fetches and complains of is recorded."""

import base64
import json
import subprocess

OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    "--disable-ipc-flooding-protection",  # which would take no more than 200 clicks on links in ten seconds
)
PHONE, DESK = 360, 1280
A4 = 687  # pixels between margins of 14 mm


class Browser:
    """A page in Chromium, at a width, light or dark, on screen or on paper."""

    def __init__(self, driver):
        self.driver = driver

    def show(self, path, width=DESK, *, dark=False, paper=False, fragment=""):
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", media="print" if paper else "", features=[scheme])
        self.driver.get("about:blank")  # so that another fragment loads the page anew
        self.take_logs()
        self.driver.get(path.as_uri() + fragment)

    def command(self, name, **parameters):
        return self.driver.execute_cdp_cmd(name, parameters)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def take_logs(self):
        """URLs that were asked for and complaints, since the last time."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return asked, [entry["message"] for entry in self.driver.get_log("browser")]

    def pdf(self):
        """The text of the page as it is printed, without any white space: lines break where they like; and its pages."""
        printed = self.command(
            "Page.printToPDF", printBackground=True, preferCSSPageSize=True, paperWidth=8.27, paperHeight=11.69
        )
        text = subprocess.run(
            ["pdftotext", "-", "-"], input=base64.b64decode(printed["data"]), capture_output=True, check=True, timeout=60
        ).stdout.decode()
        return "".join(text.split()), text.count("\f")
