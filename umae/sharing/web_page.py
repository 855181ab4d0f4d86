"""What our HTML pages share: style, tables whose columns can be sorted, images that enlarge.

A page is one file without network. Without JavaScript, and printed, it shows the same.
"""

from jinja2 import Template

STYLE = """\
:root { color-scheme: light dark; }
body {
  font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: light-dark(#222, #e6e6e6); background: Canvas; overflow-wrap: break-word;
}
h1 { font-size: 1.7rem; line-height: 1.25; }
:focus-visible { outline: 3px solid light-dark(#0b57d0, #8ab4f8); outline-offset: 2px; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
tr { background: Canvas; }
tr.differs { background: light-dark(#fff3d6, #463a17); }
th, td { padding: .3rem .8rem; text-align: left; vertical-align: top; border-bottom: 1px solid light-dark(#ddd, #555); }
th:first-child { position: sticky; left: 0; background: inherit; min-width: 7rem; }
td small { display: block; }
td small, th button::after { color: light-dark(#555, #b0b0b0); }
pre { overflow-x: auto; background: light-dark(#f5f5f5, #24272b); padding: 1rem; }
figure { margin: 0; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; vertical-align: top; }
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem; }
button { font: inherit; color: inherit; text-align: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th button { font-weight: inherit; max-width: 100%; overflow-wrap: anywhere; }
th button::after { content: " \\2194" / ""; }
th[aria-sort=ascending] button::after { content: " \\2192" / ""; color: inherit; }
th[aria-sort=descending] button::after { content: " \\2190" / ""; color: inherit; }
.enlarge { display: block; cursor: zoom-in; }
dialog { border: 0; padding: .5rem; width: 96vw; max-width: 96vw; max-height: 96vh; background: Canvas; }
dialog img { min-width: 100%; max-width: none; cursor: zoom-out; }
dialog button { position: sticky; left: 0; padding: .5rem; display: block; }
::backdrop { background: rgb(0 0 0 / 75%); }
@media (max-width: 600px) {
  th, td { padding: .3rem .5rem; }
  th { min-width: 6rem; overflow-wrap: anywhere; }
  th:first-child { min-width: 9rem; max-width: 9rem; }
}
@media print {
  :root { color-scheme: light; }
  th button::after { content: none; }
}
@media print, (scripting: none) { .interactive { display: none; } }
"""
SCRIPT = """\
// A click on the name of a row sorts the columns by it: ascending, then descending, then as they were
const UNITS = { seconds: 1, minutes: 60, hours: 3600 };
const NUMBER = /^([-+]?[\\d.,]+(?:e[-+]?\\d+)?)%?(?: \u00b1 .*| (seconds|minutes|hours))?$/;
function valueOf(cell) {
  const text = cell.firstChild?.textContent.trim() ?? "";
  const [, digits = "", unit] = NUMBER.exec(text) ?? [];
  const number = digits ? Number(digits.replaceAll(",", "")) * (UNITS[unit] ?? 1) : NaN;
  return Number.isNaN(number) ? text : number;
}
const rank = value => value === "" ? 2 : typeof value === "string" ? 1 : 0;  // numbers, words, empty cells
for (const table of document.querySelectorAll("table")) {
  const rows = [...table.rows].map(row => [...row.cells]);
  for (const [head, ...cells] of rows.slice(1)) {
    const values = cells.map(valueOf);
    if (new Set(values).size < 2) continue;
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const last = head.getAttribute("aria-sort");
      const direction = last === "ascending" ? -1 : last === "descending" ? 0 : 1;
      for (const [other] of rows) other.removeAttribute("aria-sort");
      if (direction) head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      const order = [...values.keys()].sort((i, j) => {
        const [a, b] = [values[i], values[j]];
        const words = rank(a) && rank(b);
        return direction && (rank(a) - rank(b)
          || direction * (words ? a.localeCompare(b, undefined, { numeric: true }) : a - b));
      });
      rows.forEach(([, ...others], row) => table.rows[row].append(...order.map(column => others[column])));
    });
  }
}
// An image enlarges to the window's width, and never to less than its own; Escape or a click closes it
const dialog = document.querySelector("dialog");
dialog.addEventListener("click", () => dialog.close());
for (const image of document.querySelectorAll("main img")) {
  const button = document.createElement("button");
  button.className = "enlarge";
  button.title = "Enlarge";
  image.replaceWith(button);
  button.append(image);
  button.addEventListener("click", () => {
    const large = dialog.querySelector("img");
    [large.src, large.alt] = [image.src, image.alt];
    dialog.showModal();
  });
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(details => details.open = true));
"""
HEAD = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
{% raw %}
"""
MIDDLE = """\
{% endraw %}
</style>
<main>
<h1>{{ title }}</h1>
"""
TAIL = """\
</main>
<dialog><button>Close</button><img alt=""></dialog>
<script type="module">
{% raw %}
"""
END = """\
{% endraw %}
</script>
</html>
"""


def template(content: str) -> Template:
    """The template of a whole page, which takes a `title` and what `content`, a template too, takes."""
    return Template(
        HEAD + STYLE + MIDDLE + content + TAIL + SCRIPT + END,
        autoescape=True, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
