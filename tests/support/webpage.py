"""A page as its elements, and text that no page may let act."""

from html.parser import HTMLParser

VOID = {"meta", "input", "br"}
HOSTILE = (
    '</script><script>alert(1)</script></pre></style><img src=x onerror=alert(1)>" autofocus onfocus="alert(1) \x1b\x00\udc80'
    "'&lt;"
)


class Page(HTMLParser):
    """Every element with its attributes, its text and its parts; refuses a page whose tags do not nest."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements = []
        self._open = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(set(names)) == len(names)
        element = {"tag": tag, "text": "", "inside": [e["tag"] for e in self._open], "parts": [], **dict(attributes)}
        self.elements.append(element)
        if self._open:
            self._open[-1]["parts"].append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self._open
        assert self._open[-1]["tag"] == tag
        self._open.pop()

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def all(self, tag, of_class=""):
        return [e for e in self.elements if e["tag"] == tag and (not of_class or of_class in e.get("class", "").split())]

    def by_id(self, name):
        (found,) = (e for e in self.elements if e.get("id") == name)
        return found
