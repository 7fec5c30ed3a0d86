"""A report in a real browser, as a reader opens it."""

from pathlib import Path


def open_page(browser, html: str, folder: Path, **context):
    """The page as a reader opens it, what it asked the network for (and was denied), and its complaints."""
    file = folder / "report.html"
    file.write_text(html, encoding="utf-8")
    page = browser.new_context(**context).new_page()
    asked: list[str] = []
    said: list[str] = []

    def deny(route):
        if route.request.url == file.as_uri():
            return route.continue_()
        asked.append(route.request.url)
        return route.abort()

    page.route("**/*", deny)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.goto(file.as_uri())
    page.wait_for_timeout(200)
    return page, asked, said
