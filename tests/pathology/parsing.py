"""Reading pages back: whether tags close, and what a page refers to."""

from html.parser import HTMLParser


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str | None] = []
        self.open_tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag


def sources_of(page: str) -> list[str | None]:
    """Return what a page refers to; every tag must be closed in order."""
    links = _Links()
    links.feed(page.removeprefix("<!doctype html>"))
    assert links.open_tags == []
    return links.sources
