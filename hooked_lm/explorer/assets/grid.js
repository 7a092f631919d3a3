// Grids of coloured cells that the keyboard walks: arrows move, Enter and Space act.

/** Show spaces and line breaks of a token. */
export function visible(token) {
  return token.replace(/^ /, "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
}

/** The colour of a value between -1 and 1; the text on it stays readable. */
export function colour(value, strongest = 0.62) {
  const size = Math.min(1, Math.abs(value)) * strongest;
  return `rgba(var(${value < 0 ? "--negative" : "--positive"}), ${size.toFixed(3)})`;
}

function element(name, attributes = {}, text = null) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

/**
 * Draw a grid into `place`.
 * rows, columns: labels. shade(row, column): -1 to 1, or null for no cell. text(row, column): in the cell.
 * say(row, column): the cell in words. show(row, column): on hovering and focus. act(row, column): on click and Enter.
 * kind: "number", "word" or "". corner: over the row labels. pressed(row, column): whether the cell is switched on.
 */
export function drawGrid(place, options) {
  const { rows, columns, shade, text = () => "", say, show = () => {}, act = null, kind = "", corner = "", label, turned = false, pressed = null } = options;
  const table = element("table", { role: "grid", "aria-label": label });
  const head = table.createTHead().insertRow();
  head.append(element("th", {}, corner));
  for (const name of columns) {
    const cell = element("th", { scope: "col" });
    if (turned) cell.className = "turned";
    cell.append(element("span", {}, name));
    head.append(cell);
  }
  const body = table.createTBody();
  const cells = rows.map((name, row) => {
    const line = body.insertRow();
    line.append(element("th", { scope: "row" }));
    line.firstChild.append(element("span", {}, name));
    return columns.map((_, column) => {
      const value = shade(row, column);
      const cell = element("td", { role: "gridcell" }, value === null ? "" : text(row, column));
      line.append(cell);
      if (value === null) return null;
      cell.className = `cell ${kind} ${act ? "acts" : ""}`;
      cell.style.backgroundColor = colour(value);
      cell.tabIndex = -1;
      cell.setAttribute("aria-label", say(row, column));
      if (pressed) cell.setAttribute("aria-pressed", pressed(row, column));
      cell.dataset.row = row;
      cell.dataset.column = column;
      return cell;
    });
  });
  const first = cells.flat().find(Boolean);
  if (first) first.tabIndex = 0;

  const of = (event) => {
    const cell = event.target.closest("td.cell");
    return cell ? [cell, Number(cell.dataset.row), Number(cell.dataset.column)] : [null];
  };
  const choose = (cell, row, column) => {
    if (!pressed) {
      for (const other of table.querySelectorAll('[aria-selected="true"]')) other.removeAttribute("aria-selected");
      cell.setAttribute("aria-selected", "true");
    }
    act(row, column, cell);
  };
  table.addEventListener("mouseover", (event) => {
    const [cell, row, column] = of(event);
    if (cell) show(row, column);
  });
  table.addEventListener("focusin", (event) => {
    const [cell, row, column] = of(event);
    if (!cell) return;
    for (const other of table.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
    cell.tabIndex = 0;
    show(row, column);
  });
  table.addEventListener("click", (event) => {
    const [cell, row, column] = of(event);
    if (cell && act) choose(cell, row, column);
  });
  table.addEventListener("keydown", (event) => {
    const [cell, row, column] = of(event);
    if (!cell) return;
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    let next = null;
    if (steps[event.key]) {
      const [down, across] = steps[event.key];
      next = cells[row + down]?.[column + across];
    } else if (event.key === "Home") next = cells[row].find(Boolean);
    else if (event.key === "End") next = cells[row].findLast(Boolean);
    else if ((event.key === "Enter" || event.key === " ") && act) {
      event.preventDefault();
      choose(cell, row, column);
      return;
    } else return;
    event.preventDefault();
    if (next) next.focus();
  });
  place.replaceChildren(table);
  return table;
}

/** Draw a head's attention, [query key] in thousandths, as a small picture. */
export function drawThumbnail(canvas, pattern) {
  const n = pattern.length;
  canvas.width = canvas.height = n;
  const context = canvas.getContext("2d");
  const [red, green, blue] = getComputedStyle(document.documentElement).getPropertyValue("--positive").split(",").map(Number);
  const picture = context.createImageData(n, n);
  pattern.forEach((line, query) => line.forEach((weight, key) => {
    picture.data.set([red, green, blue, Math.round((255 * weight) / 1000)], 4 * (query * n + key));
  }));
  context.putImageData(picture, 0, 0);
}

/** Draw a table of tokens with their probabilities in several runs. */
export function drawProbabilities(place, runs, rows) {
  const table = element("table", { class: "numbers" });
  const head = table.createTHead().insertRow();
  for (const name of ["token", ...runs]) head.append(element("th", { scope: "col" }, name));
  const body = table.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    line.append(element("td", {}, visible(row.text)));
    for (const name of runs) {
      const cell = element("td", {}, percent(row[name]));
      cell.style.backgroundColor = colour(row[name], 0.5);
      line.append(cell);
    }
  }
  place.replaceChildren(table);
}

/** A number with two digits after the point, and no sign on what rounds to 0. */
export function rounded(number, digits = 2) {
  const text = number.toFixed(digits);
  return Number(text) === 0 ? (0).toFixed(digits) : text;
}

/** A probability in per cent, with a sign for what rounds to nothing. */
export function percent(probability) {
  if (probability > 0 && probability < 0.0005) return "< 0.1 %";
  return `${(100 * probability).toFixed(1)} %`;
}
