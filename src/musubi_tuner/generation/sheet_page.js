const grid = data;
const placed = new Map(grid.cells.map((cell) => [cell.at.join(), cell.clip]));
const hasBase = grid.cells.some((cell) => cell.at.includes(null));
const isOfLoras = (axis) => axis >= 0 && grid.axes[axis].of_loras;

Object.assign(view, { rows: grid.rows, columns: grid.columns, chosen: grid.axes.map(() => 0) });
if (Array.isArray(before.chosen) && before.chosen.length === grid.axes.length) {
  const fits = (axis) => Number.isInteger(before[axis]) && before[axis] >= -1 && before[axis] < grid.axes.length;
  if (fits("rows") && fits("columns") && (before.rows !== before.columns || before.rows === -1)) Object.assign(view, { rows: before.rows, columns: before.columns });
  view.chosen = before.chosen.map((place, axis) => (place in grid.axes[axis].labels || (place === null && isOfLoras(axis)) ? place : 0));
}

// Layout: rows, columns, and a chooser for each further axis.
function clipAt(row, column, base = false) {
  const at = grid.axes.map((_, axis) => (axis === view.rows ? row : axis === view.columns ? column : view.chosen[axis]));
  const isBase = base || at.some((place, axis) => place === null && isOfLoras(axis));
  return clips.get(placed.get(at.map((place, axis) => (isBase && isOfLoras(axis) ? null : place)).join()));
}
function labelOf(axis, place) {
  return `${grid.axes[axis].name} ${grid.axes[axis].labels[place]}`;
}
function header(axis, place, scope) {
  const text = axis < 0 ? "" : place === null ? "base" : labelOf(axis, place);
  return make("th", { scope, title: text }, make("span", { className: "label" }, text));
}
function drawLayout() {
  const form = by("layout");
  form.replaceChildren();
  const names = grid.axes.map((axis) => axis.name);
  const add = (text, options, value, change) => {
    const select = make("select");
    options.forEach(([key, label]) => select.append(make("option", { value: key, selected: key === value }, label)));
    select.addEventListener("change", () => { change(select.value); draw(); });
    form.append(make("label", {}, make("span", {}, text), select));
  };
  if (names.length > 1) {
    const options = names.map((name, axis) => [String(axis), name]);
    const turn = (one, other) => (value) => {
      const axis = Number(value);
      if (view[other] === axis) view[other] = view[one];
      view[one] = axis;
    };
    add("Rows", options, String(view.rows), turn("rows", "columns"));
    add("Columns", options, String(view.columns), turn("columns", "rows"));
  }
  grid.axes.forEach((axis, place) => {
    if (place === view.rows || place === view.columns) return;
    const options = axis.labels.map((label, index) => [String(index), label]);
    const neither = !isOfLoras(view.rows) && !isOfLoras(view.columns);
    if (axis.of_loras && hasBase && neither) options.unshift(["base", "base"]);
    else view.chosen[place] ??= 0;
    const value = view.chosen[place] === null ? "base" : String(view.chosen[place]);
    add(axis.name, options, value, (chosen) => { view.chosen[place] = chosen === "base" ? null : Number(chosen); });
  });
}
function draw() {
  stopAll();
  drawLayout();
  remember(VIEW, view);
  const { rows, columns } = view;
  const places = (axis) => (axis < 0 ? [0] : [...grid.axes[axis].labels.keys()]);
  const baseColumn = hasBase && isOfLoras(columns), baseRow = hasBase && !baseColumn && isOfLoras(rows);
  const head = make("tr", {}, make("td"));
  if (baseColumn) head.append(header(columns, null, "col"));
  places(columns).forEach((column) => head.append(header(columns, column, "col")));
  const body = make("tbody");
  shown = [];
  const lines = baseRow ? [null, ...places(rows)] : places(rows);
  lines.forEach((row, index) => {
    const line = make("tr", {}, header(rows, row, "row"));
    if (baseColumn && (!isOfLoras(rows) || index === 0)) line.append(cell(clipAt(row, 0, true), isOfLoras(rows) ? lines.length : 1));
    places(columns).forEach((column) => line.append(cell(clipAt(row, column, row === null))));
    body.append(line);
  });
  by("grid").replaceChildren(make("table", {}, make("thead", {}, head), body));
  hear(null);
  drawPicks();
}
const there = grid.clips.filter((clip) => clip.file !== null).length;
by("state").textContent = there === grid.clips.length ? `${there} clip${there === 1 ? "" : "s"}` : `${there} of ${grid.clips.length} clips are there; reload this page for those that have come since. `;
if (there < grid.clips.length) {
  const again = make("button", { type: "button" }, "Reload");
  again.addEventListener("click", () => location.reload());
  by("state").append(again);
}
draw();
requestAnimationFrame(tick);
