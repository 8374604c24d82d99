const rounds = data.rounds, control = data.control;
const names = [...new Set(rounds.flatMap((row) => Object.keys(row.rewards)))];
const signed = (value) => `${value < 0 ? "\u2212" : "+"}${Math.abs(value).toPrecision(3)}`;

function gains() {
  const of = (name, color, rows, dashed) => ({
    name, color, dashed, dotted: true,
    points: rows.map((row) => [row.round, row.gain]),
    bars: rows.map((row) => [row.round, row.gain - row.error, row.gain + row.error]),
  });
  return [of("these rounds", 0, rounds), ...(control.length ? [of("control: shuffled advantages", 1, control, "6 4")] : [])];
}
// A reward has a chart of its own, as its unit is its own. A round learns from samples of the policy before it.
function reward(name, place) {
  const of = (key, before) => rounds.filter((row) => row[key] && name in row[key]).map((row) => [row.round - before, row[key][name]]);
  return [
    { name: `${name}, held out`, color: place, dotted: true, points: of("rewards", 0) },
    { name: `${name}, learned from`, color: place, dashed: "2 3", dotted: true, points: of("learned", 1) },
  ];
}
names.forEach((_, place) => by("charts-rewards").append(make("div", { id: `chart-reward-${place}`, className: "chart" })));
function table() {
  const cells = (row, other) => [
    make("th", { scope: "row" }, row.label),
    ...names.map((name) => make("td", { className: "number" }, row.rewards[name].toPrecision(4))),
    make("td", { className: "number" }, row.round ? `${signed(row.gain)} \u00b1 ${row.error.toPrecision(2)}` : ""),
    ...(control.length ? [make("td", { className: "number" }, other?.round ? `${signed(other.gain)} \u00b1 ${other.error.toPrecision(2)}` : "")] : []),
  ];
  const heads = ["policy", ...names, "gain", ...(control.length ? ["control's gain"] : [])];
  const head = make("tr", {}, ...heads.map((text) => make("th", { scope: "col" }, text)));
  const others = new Map(control.map((row) => [row.round, row]));
  by("table").replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, ...rounds.map((row) => make("tr", {}, ...cells(row, others.get(row.round)))))));
}
function grid() {
  if (!data.clips.length) return by("grid").replaceChildren(make("p", {}, "No samples were decoded (--rl_page_samples)."));
  const head = make("tr", {}, make("td"), ...data.columns.map((text) => make("th", { scope: "col" }, text)));
  const body = make("tbody");
  shown = [];
  data.rows.forEach((row, place) => {
    const line = make("tr", {}, make("th", { scope: "row" }, make("span", { className: "label" }, row.prompt), make("span", { className: "faint" }, ` seed ${row.seed}`)));
    data.columns.forEach((_, column) => {
      const clip = data.clips.find((one) => one.at[0] === place && one.at[1] === column);
      const holder = cell(clip);
      if (clip) scores(holder, clip);
      line.append(holder);
    });
    body.append(line);
  });
  by("grid").replaceChildren(make("table", {}, make("thead", {}, head), body));
  hear(null);
  drawPicks();
}
function draw() {
  chart(by("chart-gain"), gains(), { title: "Gain on held-out prompts", x: "rounds done", y: "gain", whole: true, empty: "No round is done yet." });
  names.forEach((name, place) => chart(by(`chart-reward-${place}`), reward(name, place), { title: name, x: "rounds done", y: name, whole: true }));
}
const done = rounds.length - 1, best = rounds.find((row) => row.best);
by("state").textContent = `${done} round${done === 1 ? "" : "s"}${best ? `; the best is ${best.label.replace(" (best)", "")}, ${signed(best.gain)} \u00b1 ${best.error.toPrecision(2)}` : ""}.`;
table();
grid();
draw();
showTime();
addEventListener("resize", draw);
requestAnimationFrame(tick);
