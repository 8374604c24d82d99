// Curves as SVG: small enough to be in every page. A series has name, points [[x, y], ...], color (of the palette), and may be faint (drawn
// without a say in the range), dashed (lengths of dash and gap), or dotted (a mark at each point); bars are [[x, low, high], ...].
const PALETTE = 6, HIGH = 300, LEFT = 62, RIGHT = 12, TOP = 10, BOTTOM = 34;
const hidden = new Set();

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((part) => part * power).find((size) => size >= rough);
  const found = [];
  for (let place = Math.ceil(low / step); place * step <= high + step * 1e-9; place += 1) found.push(place * step);
  return found;
}
const short = (value) => (value === 0 ? "0" : Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(4))));
function range(series, axis) {
  let low = Infinity, high = -Infinity;
  const widen = (value) => { low = Math.min(low, value); high = Math.max(high, value); };
  for (const one of series) {
    for (const point of one.points) widen(point[axis]);
    for (const [, ...ends] of axis === 1 ? (one.bars ?? []) : []) ends.forEach(widen);
  }
  return [low, high];
}
function strokeOf(one) {
  const stroke = { stroke: `var(--c${one.color % PALETTE})`, "stroke-width": one.faint ? 1 : 2, fill: "none", "stroke-linejoin": "round" };
  if (one.faint) stroke["stroke-opacity"] = 0.35;
  if (one.dashed) stroke["stroke-dasharray"] = one.dashed;
  return stroke;
}

// Draws into `holder`; `about` is {title, x, y, empty, whole}: what it shows, the names of the axes, what stands there where nothing is, and
// whether x counts whole things.
function chart(holder, series, about) {
  const all = series.filter((one) => one.points.length);
  if (!all.length) return holder.replaceChildren(make("p", {}, about.empty ?? "Nothing is logged yet."));
  const id = (one) => `${holder.id} ${one.name}`;
  const drawn = all.filter((one) => !hidden.has(id(one)));
  const strong = drawn.filter((one) => !one.faint), ranged = strong.length ? strong : drawn.length ? drawn : all;
  const wide = Math.max(300, Math.min(1120, holder.clientWidth || 700));
  const [left, right] = range(drawn.length ? drawn : all, 0);
  let [low, high] = range(ranged, 1);
  const margin = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  [low, high] = [low >= 0 ? Math.max(0, low - margin) : low - margin, high + margin];
  const x = (value) => LEFT + ((value - left) / (right - left || 1)) * (wide - LEFT - RIGHT);
  const y = (value) => HIGH - BOTTOM - ((value - low) / (high - low)) * (HIGH - TOP - BOTTOM);
  const told = strong.map((one) => `${one.name}: ${short(one.points[0][1])} to ${short(one.points.at(-1)[1])}`).join("; ");
  const picture = svg("svg", { viewBox: `0 0 ${wide} ${HIGH}`, role: "img", tabindex: 0, "aria-label": `${about.title} against ${about.x}. ${told}. Arrow keys read values.` });
  const clip = `${holder.id}-clip`;
  picture.append(svg("clipPath", { id: clip }, svg("rect", { x: LEFT, y: TOP, width: wide - LEFT - RIGHT, height: HIGH - TOP - BOTTOM })));
  for (const value of ticks(low, high, 5)) {
    picture.append(svg("line", { class: "axis", x1: LEFT, x2: wide - RIGHT, y1: y(value), y2: y(value) }), svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  for (const value of ticks(left, right, Math.max(2, wide / 120)).filter((place) => !about.whole || Number.isInteger(place))) picture.append(svg("text", { x: x(value), y: HIGH - BOTTOM + 16, "text-anchor": "middle" }, short(value)));
  picture.append(svg("text", { x: wide - RIGHT, y: HIGH - 4, "text-anchor": "end" }, about.x), svg("text", { x: LEFT + 4, y: TOP + 10 }, about.y));
  const lines = svg("g", { "clip-path": `url(#${clip})` });
  for (const one of [...drawn].sort((a, b) => Number(Boolean(b.faint)) - Number(Boolean(a.faint)))) {
    const stroke = strokeOf(one);
    lines.append(svg("path", { ...stroke, d: one.points.map((point, place) => `${place ? "L" : "M"}${x(point[0]).toFixed(1)} ${y(point[1]).toFixed(1)}`).join("") }));
    lines.append(...(one.bars ?? []).map(([at, from, to]) => svg("line", { x1: x(at), x2: x(at), y1: y(from), y2: y(to), stroke: stroke.stroke, "stroke-width": 1.5 })));
    if (one.dotted || one.points.length === 1) lines.append(...one.points.map((point) => svg("circle", { cx: x(point[0]).toFixed(1), cy: y(point[1]).toFixed(1), r: 3.5, fill: stroke.stroke })));
  }
  const cursor = svg("line", { class: "cursor", y1: TOP, y2: HIGH - BOTTOM, visibility: "hidden" });
  picture.append(lines, cursor);
  const readout = make("p", { className: "readout" });
  readout.setAttribute("aria-live", "polite");
  const xs = [...new Set(strong.flatMap((one) => one.points.map((point) => point[0])))].sort((a, b) => a - b);
  let at = xs.length - 1;
  const read = (value) => {
    cursor.setAttribute("x1", x(value));
    cursor.setAttribute("x2", x(value));
    cursor.setAttribute("visibility", "visible");
    const nearest = (one) => one.points.reduce((best, point) => (Math.abs(point[0] - value) < Math.abs(best[0] - value) ? point : best));
    readout.textContent = `${about.x} ${short(value)} \u2013 ${strong.map((one) => `${one.name}: ${short(nearest(one)[1])}`).join(", ")}`;
  };
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const value = left + (((event.clientX - box.left) / box.width) * wide - LEFT) / (wide - LEFT - RIGHT) * (right - left);
    if (!xs.length) return;
    at = xs.reduce((best, one, place) => (Math.abs(one - value) < Math.abs(xs[best] - value) ? place : best), 0);
    read(xs[at]);
  });
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -xs.length, End: xs.length }[event.key];
    if (!step || !xs.length) return;
    event.preventDefault();
    at = Math.min(Math.max(0, at + step), xs.length - 1);
    read(xs[at]);
  });
  const legend = make("div", { className: "legend" });
  legend.setAttribute("role", "group");
  legend.setAttribute("aria-label", `Curves of ${about.title}`);
  for (const one of all.filter((candidate) => !candidate.faint)) {
    const button = make("button", { type: "button" }, svg("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" }, svg("line", { x1: 0, x2: 26, y1: 5, y2: 5, ...strokeOf(one) })), one.name);
    button.setAttribute("aria-pressed", String(!hidden.has(id(one))));
    button.addEventListener("click", () => {
      const faints = all.filter((other) => other.of === one.name);
      const gone = hidden.has(id(one));
      for (const name of [id(one), ...faints.map(id)]) gone ? hidden.delete(name) : hidden.add(name);
      chart(holder, series, about);
      [...holder.querySelectorAll("button")].find((other) => other.textContent === one.name)?.focus();
    });
    legend.append(button);
  }
  holder.replaceChildren(legend, picture, readout);
}

// A mean of neighbours that weighs the later ones more; `share` of the one before.
function smoothed(points, share) {
  let mean = 0, weight = 0;
  return points.map(([x, y]) => {
    mean = share * mean + (1 - share) * y;
    weight = share * weight + (1 - share);
    return [x, mean / weight];
  });
}
