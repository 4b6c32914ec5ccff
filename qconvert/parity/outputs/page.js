"use strict";
// Tables with class "sortable": a button in a heading sorts by that column, worst first, and turns round when pressed again.
for (const table of document.querySelectorAll("table.sortable")) {
  const said = table.parentElement.parentElement.querySelector("[aria-live]");
  const heads = [...table.tHead.rows[0].cells];
  for (const head of heads) {
    const button = head.querySelector("button");
    if (!button) continue;
    button.addEventListener("click", () => {
      const column = head.cellIndex;
      const up = head.getAttribute("aria-sort") === "none"
        ? head.dataset.first === "ascending"
        : head.getAttribute("aria-sort") === "descending";
      const key = (row) => row.cells[column].dataset.value;
      const compare = head.dataset.kind === "number"
        ? (a, b) => { const x = Number(key(a)), y = Number(key(b)); return x < y ? -1 : x > y ? 1 : 0; }
        : (a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0);
      const body = table.tBodies[0];
      const rows = [...body.rows].sort((a, b) => (up ? compare(a, b) : compare(b, a)));
      body.append(...rows);
      for (const other of heads) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      if (said) said.textContent = `sorted by ${button.textContent}, ${up ? "ascending" : "descending"}`;
    });
  }
}
