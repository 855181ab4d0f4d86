"""Reports and studies in a real browser, at a desktop's and a phone's width, light and dark."""

import re

import pytest
from browsing import WIDTHS, faint_texts, problems_of, tab_stops

from umae.sharing.comparison import Result, compare
from umae.sharing.report import report
from umae.sharing.study_page import study_figure, study_page
from umae.sharing.web_page import template

NAMES = ["uniformity_weight 0", "uniformity_weight 0.001", "uniformity_weight 0.01", "uniformity_weight 0.1"]


def study() -> str:
    """Of four weights: numbers of different lengths, and one that is missing."""
    values = {0: (9.5, 0.12345), 0.001: (101.25, 0.2), 0.01: (10.75, -0.3), 0.1: (None, 0.25)}
    results = [
        Result(
            f"run {weight}",
            {"uniformity_weight": weight},
            0,
            {"pretraining/alignment": loss, **({"probe/top1/cls": top1, "probe/top1/mean": 50} if top1 else {})},
        )
        for weight, (top1, loss) in values.items()
    ]
    content = {
        "title": "Weights of the term", "command": "umae study choose_weight", "state": "Finished.",
        "notes": ["A note."], "baseline": {"uniformity_weight": 0},
        "protocols": {"probe": {"linear_epochs": 90, "words": "long " * 100}},
    }  # fmt: skip
    groups = compare(results)
    return study_page(content, groups, study_figure(groups))


@pytest.fixture(scope="session")
def pages(runs, tmp_path_factory):
    """The address of either page."""
    folder = tmp_path_factory.mktemp("pages")
    texts = {"report": report(sorted(runs.iterdir())), "study": study()}
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text)
    return {name: (folder / f"{name}.html").as_uri() for name in texts}


@pytest.fixture
def show(browser, pages):
    """A function that shows a page; at the end none has had an error or has asked for another file."""
    tabs = []

    def shown(name: str, width: int = 1300, scheme: str = "light", **options):
        tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme, **options)
        tabs.append((tab, problems_of(tab, pages[name], "data:")))
        tab.goto(pages[name])
        return tab

    yield shown
    for tab, problems in tabs:
        tab.close()
        assert problems == []


def order(tab) -> list[int]:
    """Where the study's columns were at first."""
    heads = tab.locator("tr").first.locator("th").all_inner_texts()[1:]
    return [NAMES.index(head) for head in heads]


def test_the_page_of_a_study_needs_no_other_file():
    text = study()
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
    assert not re.search(r"http|url\(|@import|<link", text)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("name", ["report", "study"])
def test_all_text_is_legible_and_only_tables_scroll_sideways(show, name, width, scheme):
    tab = show(name, width, scheme)
    for details in tab.locator("summary").all():
        details.click()
    assert faint_texts(tab) == {}
    page, text = (
        tab.evaluate(f"getComputedStyle(document.body).{style}").strip("rgb()").split(", ")
        for style in ("backgroundColor", "color")
    )
    assert (int(page[0]) < int(text[0])) == (scheme == "dark")
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    scrolling = "[...document.querySelectorAll('.wide')].filter(box => box.scrollWidth > box.clientWidth).length"
    assert (tab.evaluate(scrolling) > 0) == (width == 390)
    if name == "report":
        marked = tab.locator("tr.differs").first.evaluate("row => getComputedStyle(row).backgroundColor")
        assert marked != tab.locator("tr:not(.differs)").last.evaluate("row => getComputedStyle(row).backgroundColor")
    tab.locator(".enlarge").first.click()
    assert faint_texts(tab) == {}


@pytest.mark.slow
@pytest.mark.parametrize("key", [None, "Enter", "Space"])
def test_a_click_or_a_key_sorts_columns_by_a_row_as_numbers_with_empty_cells_last(show, key):
    tab = show("study")
    head = tab.get_by_role("rowheader", name="probe, class token")

    def press():
        button = head.get_by_role("button")
        button.press(key) if key else button.click()

    for expected, sort in (([0, 2, 1, 3], "ascending"), ([1, 2, 0, 3], "descending"), ([0, 1, 2, 3], None)):
        press()
        assert (order(tab), head.get_attribute("aria-sort")) == (expected, sort)
    press()
    other = tab.get_by_role("rowheader", name="pretraining, alignment")
    other.get_by_role("button").click()
    assert order(tab) == [2, 0, 1, 3]
    assert head.get_attribute("aria-sort") is None and other.get_attribute("aria-sort") == "ascending"
    texts = tab.locator("tr", has=other).locator("td").all_inner_texts()
    assert [float(text.split()[0]) for text in texts] == [-0.3, 0.123, 0.2, 0.25], "cells go with their columns"
    same = tab.get_by_role("rowheader", name="probe, mean of the patches")
    assert same.get_by_role("button").count() == 1, "50 and an empty cell differ"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["17.2 hours", "53.5 minutes", "119 seconds"], "CBA"),
        (["0.9", "1,234", "1e-3"], "CAB"),
        (["50.0%", "9.5%", "10.1% \u00b1 0.2%"], "BCA"),
        (["5.10.0", "", "5.4.0"], "CAB"),
        (["word", "7", ""], "BAC"),
    ],
)
def test_durations_shares_and_versions_are_sorted_by_what_they_say(browser, cells, expected):
    heads, values = (f"<td>{'<td>'.join(texts)}" for texts in ("ABC", cells))
    tab = browser.new_page()
    tab.set_content(template(f"<table><tr><th>{heads}<tr><th>row{values}</table>").render(title=""))
    tab.get_by_role("button", name="row").click()
    assert "".join(tab.locator("tr").first.locator("td").all_inner_texts()) == expected
    tab.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_an_image_enlarges_and_closes_by_keyboard_and_by_mouse(show, width):
    tab = show("report", width)
    button = tab.get_by_role("button", name="Losses, ranks and accuracies over the steps")
    dialog = tab.locator("dialog")
    before = button.bounding_box()["width"]
    for opened, closed in (("Enter", "Escape"), ("Space", "Enter"), (None, None)):
        button.press(opened) if opened else button.click()
        image = dialog.get_by_role("img", name="Losses, ranks and accuracies over the steps")
        image.wait_for()
        enlarged = image.bounding_box()["width"]
        assert enlarged > 1.2 * before and enlarged >= image.evaluate("image => image.naturalWidth")
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        tab.keyboard.press(closed) if closed else image.click(position={"x": 5, "y": 5})
        dialog.wait_for(state="hidden")
        assert button.evaluate("button => button === document.activeElement")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "study"])
def test_the_tab_key_comes_to_everything_that_can_be_clicked_and_shows_where_it_is(show, name, scheme):
    tab = show(name, 390, scheme)
    stops = tab_stops(tab)
    assert [stop["name"] for stop in stops if not stop["visible"]] == []
    clickable = tab.locator("main button, summary").count()
    assert sum(stop["tag"] in ("BUTTON", "SUMMARY") for stop in stops) == clickable > 5 - 2 * (name == "study")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["report", "study"])
def test_without_javascript_and_printed_the_page_is_complete(show, name):
    with_script, without = show(name), show(name, java_script_enabled=False)
    hint = with_script.locator(".interactive").inner_text()
    texts = [tab.locator("main").inner_text().split() for tab in (with_script, without)]
    assert " ".join(texts[0]).replace(f" {hint}", "") == " ".join(texts[1])
    assert without.locator("main img").count() == with_script.locator("main img").count() > 0
    printed = show(name, 700, "dark")
    printed.pdf()
    assert printed.locator("details:not([open])").count() == 0, "what is folded up is printed, too"
    printed.emulate_media(media="print", color_scheme="dark")
    assert printed.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert faint_texts(printed) == {}
