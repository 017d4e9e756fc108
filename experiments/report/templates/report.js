"use strict";
const make = (name, text, more = {}) => Object.assign(document.createElement(name), {textContent: text}, more);
const short = v => String(v && (Math.abs(v) < 1e-3 || Math.abs(v) >= 1e6) ? v.toExponential(3).replace("+", "") : Number(v.toPrecision(5)));

for (const box of document.querySelectorAll(".switch")) {
  const blocks = [...box.children];
  const choose = chosen => blocks.forEach((block, i) => {
    block.hidden = i !== chosen;
    buttons[i].setAttribute("aria-pressed", i === chosen);
  });
  const buttons = blocks.map((block, i) => make("button", block.dataset.choice, {type: "button", onclick: () => choose(i)}));
  box.prepend(make("p", "", {className: "choices"}));
  box.firstChild.append(...buttons);
  choose(0);
}

for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const numeric = head.classList.contains("n");
    const value = row => row.cells[column].title || row.cells[column].textContent;
    const number = row => (v => Number.isNaN(v) ? Infinity : v)(parseFloat(value(row)));
    head.replaceChildren(make("button", head.textContent, {type: "button", onclick: () => {
      const sign = head.ariaSort === "ascending" ? -1 : 1;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.ariaSort = sign > 0 ? "ascending" : "descending";
      body.append(...[...body.rows].sort((a, b) => sign * (numeric ? number(a) - number(b) || 0 : value(a).localeCompare(value(b), "en", {numeric: true}))));
    }}));
  });
}

const hidden = new Map();  // by what is shown together: the entries of legends that are switched off
for (const svg of document.querySelectorAll("figure svg:has(metadata)")) {
  const {panels, series} = JSON.parse(svg.querySelector("metadata").textContent);
  const figure = svg.parentElement, together = figure.closest(".switch") ?? figure;
  const off = hidden.get(together) ?? new Set();
  hidden.set(together, off);
  const seen = i => !series[i].entries.some(entry => off.has(entry));
  const shows = () => {
    for (const g of svg.querySelectorAll("[data-series]")) g.classList.toggle("off", !seen(g.dataset.series));
    for (const g of svg.querySelectorAll("[data-entry]")) g.classList.toggle("faint", off.has(Number(g.dataset.entry)));
    for (const g of svg.querySelectorAll("[role=button]")) g.setAttribute("aria-pressed", !off.has(Number(g.dataset.entry)));
  };
  together.addEventListener("toggled", shows);
  for (const g of svg.querySelectorAll("[data-entry]")) {
    const entry = Number(g.dataset.entry);
    if (!series.some(one => one.entries.includes(entry))) { g.removeAttribute("data-entry"); continue; }
    const toggle = () => { if (!off.delete(entry)) off.add(entry); together.dispatchEvent(new Event("toggled")); };
    g.addEventListener("click", toggle);
    if (!g.querySelector("text")) continue;
    svg.setAttribute("role", "group");
    g.setAttribute("role", "button");
    g.setAttribute("tabindex", 0);
    g.setAttribute("aria-pressed", true);
    g.addEventListener("keydown", event => { if (["Enter", " "].includes(event.key)) { event.preventDefault(); toggle(); } });
  }
  if (!series.some(one => one.points.length)) continue;
  const tip = make("div", "", {className: "tip", hidden: true});
  const marks = svg.appendChild(document.createElementNS(svg.namespaceURI, "g"));
  const mark = ([x, y]) => {
    const circle = document.createElementNS(svg.namespaceURI, "circle");
    for (const [name, value] of Object.entries({cx: x, cy: y, r: 3, fill: "none", stroke: "#000"})) circle.setAttribute(name, value);
    return circle;
  };
  figure.append(tip);
  const leave = () => { tip.hidden = true; marks.replaceChildren(); };
  const point = event => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const panel = panels.findIndex(({box: [l, t, r, b]}) => l <= at.x && at.x <= r && t <= at.y && at.y <= b);
    const lines = series.filter((one, i) => one.panel === panel && one.points.length && seen(i));
    const ordered = lines.every(({points}) => points.every((p, i) => !i || points[i - 1][0] <= p[0]));
    const far = ([x, y]) => ordered ? Math.abs(x - at.x) + Math.abs(y - at.y) / 1e4 : Math.hypot(x - at.x, y - at.y);
    const found = lines.map(({name, points}) => ({name, p: points.reduce((a, b) => far(b) < far(a) ? b : a)}));
    if (!found.length) return leave();
    const nearest = found.reduce((a, b) => far(b.p) < far(a.p) ? b : a);
    // of lines over one axis the values there, as they lie one above the other; of others the nearest point
    const shown = ordered ? found.filter(({p}) => Math.abs(p[0] - nearest.p[0]) < 3).sort((a, b) => a.p[1] - b.p[1]) : [nearest];
    const data = v => make("data", short(v), {value: v});
    tip.replaceChildren(make("div", `${panels[panel].x.split(" (")[0]} `), ...shown.map(({name, p}) => {
      const line = make(Math.abs(p[1] - at.y) < 4 ? "strong" : "div", `${name}${ordered ? "" : `, ${panels[panel].y.split(" (")[0]}`}: `);
      line.append(data(p[3]));
      return line;
    }));
    tip.firstChild.append(data(nearest.p[2]));
    tip.hidden = false;
    const box = figure.getBoundingClientRect(), x = event.clientX - box.left;
    tip.style.left = `${x > box.width / 2 ? Math.max(0, x - tip.offsetWidth - 14) : x + 14}px`;
    tip.style.top = `${event.clientY - box.top + 14}px`;
    marks.replaceChildren(...shown.map(({p}) => mark(p)));
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", leave);
}
