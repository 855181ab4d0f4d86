"""Pages in a real browser: what is wrong with them, and whether their text and their focus can be seen."""

import shutil

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = {"wide": 1300, "narrow": 390}  # pixels
CONTRAST = 4.5  # of normal text, at least (WCAG 2.2, AA)

FAINT = """limit => {
  const context = Object.assign(document.createElement("canvas"), {width: 1, height: 1})
    .getContext("2d", {willReadFrequently: true});
  function rgba(colour) {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const [...values] = context.getImageData(0, 0, 1, 1).data;
    return [...values.slice(0, 3), values[3] / 255];
  }
  const over = ([...top], below) => {
    const alpha = top.pop();
    return top.map((value, channel) => alpha * value + (1 - alpha) * below[channel]);
  };
  function background(element) {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(rgba(getComputedStyle(at).backgroundColor));
    const dark = getComputedStyle(document.documentElement).colorScheme.includes("dark")
      && matchMedia("(prefers-color-scheme: dark)").matches;
    return layers.reduceRight((below, layer) => over(layer, below), dark ? [18, 18, 18] : [255, 255, 255]);
  }
  function luminance(colour) {
    const [red, green, blue] = colour.map(value => {
      value /= 255;
      return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  }
  const faint = {};
  let texts = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (!text || ["SCRIPT", "STYLE", "NOSCRIPT"].includes(element.tagName)
      || !element.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})) continue;
    texts += 1;
    const below = background(element), style = getComputedStyle(element), colour = rgba(style.color);
    for (let at = element; at; at = at.parentElement) colour[3] *= Number(getComputedStyle(at).opacity);
    const [low, high] = [luminance(over(colour, below)), luminance(below)].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < limit) faint[text.slice(0, 60)] = Math.round(100 * ratio) / 100;
  }
  if (!texts) faint["no text at all"] = 0;
  return faint;
}"""


def faint_texts(tab) -> dict[str, float]:
    """The visible texts of a page whose contrast to what is behind them is below CONTRAST, with that contrast."""
    return tab.evaluate(FAINT, CONTRAST)


def problems_of(tab, *ours: str) -> list[str]:
    """A list that grows by the errors of a page, its dialogs, and requests that do not begin with one of `ours`."""
    problems: list[str] = []
    tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("dialog", lambda dialog: problems.append(dialog.message))
    tab.on("request", lambda sent: None if sent.url.startswith(ours) else problems.append(sent.url))
    return problems


FOCUS = """() => {
  const element = document.activeElement, style = getComputedStyle(element), box = element.getBoundingClientRect();
  const outlined = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
  const again = window.stops.has(element);
  window.stops.add(element);
  return {
    name: element.getAttribute("aria-label") || element.innerText?.trim() || element.labels?.[0]?.innerText.trim()
      || element.querySelector("img")?.alt || element.outerHTML.slice(0, 150),
    tag: element.tagName,
    again,
    visible: outlined && box.width > 0 && box.bottom > 0 && box.top < innerHeight,
  };
}"""


def tab_stops(tab, until: str | None = None) -> list[dict]:
    """What the Tab key comes to, in this order, to what is named `until` or to where it leaves the page.

    Begins at the page's top without `until`, else at what has the focus.
    """
    tab.evaluate("window.stops = new Set()")
    if until is None:
        tab.evaluate("document.body.tabIndex = -1; document.body.focus(); document.body.removeAttribute('tabindex')")
    stops: list[dict] = []
    while not until or not stops or stops[-1]["name"] != until:
        tab.keyboard.press("Tab")
        stop = tab.evaluate(FOCUS)
        if stop["tag"] != "BODY" and not stop["again"]:
            stops.append(stop)
        elif until is None:
            break
        else:
            assert not stop["again"], f"the Tab key does not come to {until}"
    return stops
