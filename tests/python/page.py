"""A report, read as a browser would."""

import html.parser


class Page(html.parser.HTMLParser):
    """What a browser would load, the visible text, and whether tags are balanced."""

    VOID = frozenset(("meta", "link", "br", "img", "hr", "input"))

    def __init__(self, source: str) -> None:
        super().__init__()
        self.loads, self.text, self.open, self.tags = [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.loads += [value for key, value in attributes if key in ("src", "href", "xlink:href", "data", "srcset")]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text.append(data)
