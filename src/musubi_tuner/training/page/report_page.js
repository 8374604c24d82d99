const runs = data.runs, several = runs.length > 1;
const STREAMS = ["video", "audio"], GIB = 2 ** 30, HELD_OUT = "7 4", SOUND = "2 3";
Object.assign(view, { steps: several ? "last" : "4", prompts: "", shut: [], against: "steps", smoothing: 0.8, stream: "video", levelsOf: 0 });
for (const name of ["steps", "prompts", "against", "stream"]) if (typeof before[name] === "string") view[name] = before[name];
if (Array.isArray(before.shut)) view.shut = before.shut.filter((place) => place in runs);
if (before.smoothing >= 0 && before.smoothing <= 0.98) view.smoothing = before.smoothing;
if (before.levelsOf in runs) view.levelsOf = before.levelsOf;
const isOpen = (place) => !view.shut.includes(place);
const named = (run, text) => (several ? `${run.label}: ${text}` : text);

function labelled(text, field) {
  return make("label", {}, make("span", {}, text), field);
}
function chooser(text, options, value, change) {
  const select = make("select");
  options.forEach(([key, label]) => select.append(make("option", { value: key, selected: key === value }, label)));
  select.addEventListener("change", () => { change(select.value); remember(VIEW, view); });
  return labelled(text, select);
}
function table(head, rows, numbers = []) {
  const cellOf = (tag, value, place) => make(tag, { className: numbers.includes(place) ? "number" : "", ...(tag === "th" ? { scope: "row" } : {}) }, value);
  const body = rows.map((row) => make("tr", {}, ...row.map((value, place) => cellOf(place ? "td" : "th", value, place))));
  const top = make("tr", {}, ...head.map((text, place) => make("th", { scope: "col", className: numbers.includes(place) ? "number" : "" }, text)));
  return make("div", { className: "table" }, make("table", {}, make("thead", {}, top), make("tbody", {}, ...body)));
}
function details(title, ...children) {
  return make("details", {}, make("summary", {}, title), ...children);
}

// Previews: a row a prompt, a column a step of a run; those of step 0 stand first.
const WINDOWS = { last: 1, 4: 4, 8: 8, all: Infinity };
function columns() {
  return runs.flatMap((run, place) => {
    if (!isOpen(place)) return [];
    const steps = [...new Set(data.clips.filter((clip) => clip.run === place).map((clip) => clip.step))].sort((a, b) => a - b);
    const later = steps.filter((step) => step > 0);
    const kept = later.slice(-Math.min(WINDOWS[view.steps] ?? 4, later.length || 1));
    return [...(steps[0] === 0 ? [0] : []), ...kept].map((step) => ({ place, step, run }));
  });
}
const titleOf = ({ run, step }) => named(run, step ? `step ${step}` : "step 0, the base");
function draw() {
  stopAll();
  remember(VIEW, view);
  shown = [];
  const places = columns(), wanted = view.prompts.toLowerCase();
  const base = (column, index) => (index === 0 && column.step === 0 ? "base" : "");
  const head = make("tr", {}, make("td"), ...places.map((column, index) => make("th", { scope: "col", className: base(column, index) }, titleOf(column))));
  const lines = data.rows.flatMap((row, index) => {
    if (wanted && !`${row.prompt} ${row.seed}`.toLowerCase().includes(wanted)) return [];
    const text = row.prompt || `prompt ${index}`;
    const header = make("th", { scope: "row", title: row.negative ? `${text}\nNegative: ${row.negative}` : text }, make("span", { className: "label" }, text), make("small", {}, `seed ${row.seed}`));
    const cells = places.map((column, at) => {
      const made = cell(data.clips.find((clip) => clip.run === column.place && clip.step === column.step && clip.index === index));
      made.className = base(column, at);
      return made;
    });
    return [make("tr", {}, header, ...cells)];
  });
  const none = data.clips.length ? "No prompt has these words." : "There are no previews: --sample_prompts makes them, --sample_at_first those of step 0.";
  by("grid").replaceChildren(lines.length ? make("table", {}, make("thead", {}, head), make("tbody", {}, ...lines)) : make("p", {}, none));
  by("player").hidden = by("picks").hidden = data.clips.length === 0;
  hear(null);
  drawPicks();
}
function drawLayout() {
  const options = [["last", "the last"], ["4", "the last 4"], ["8", "the last 8"], ["all", "all"]];
  const search = make("input", { type: "search", value: view.prompts, placeholder: "all prompts" });
  search.addEventListener("input", () => { view.prompts = search.value; draw(); });
  const fields = [chooser("Steps", options, view.steps, (value) => { view.steps = value; draw(); }), labelled("Prompts with", search)];
  if (several) {
    fields.push(...runs.map((run, place) => {
      const box = make("input", { type: "checkbox", checked: isOpen(place) });
      box.addEventListener("change", () => {
        view.shut = box.checked ? view.shut.filter((other) => other !== place) : [...view.shut, place];
        draw();
        drawCharts();
      });
      return make("label", {}, box, run.label);
    }));
  }
  by("layout").replaceChildren(...fields);
  by("layout").addEventListener("submit", (event) => event.preventDefault());
}

// Losses.
const hasPace = runs.every((run) => run.record?.pace.length);
function minutesAt(run, step) {
  const pace = run.record.pace, later = pace.findIndex((point) => point[0] >= step);
  const [toStep, to] = pace[later < 0 ? pace.length - 1 : later], [fromStep, from] = later > 0 ? pace[later - 1] : [0, 0];
  const share = toStep > fromStep ? Math.min(1, (step - fromStep) / (toStep - fromStep)) : 1;
  return (from + (to - from) * share) / 60;
}
function placed(run, points) {
  return view.against === "minutes" && hasPace ? points.map(([step, value]) => [minutesAt(run, step), value]) : points;
}
function curve(name, points, color, extra = {}) {
  const line = { name, points: smoothed(points, view.smoothing), color };
  const raw = { name: `${name} as measured`, of: name, points, color, faint: true };
  return view.smoothing > 0 && points.length > 2 ? [raw, { ...line, ...extra }] : [{ name, points, color, ...extra }];
}
function lossSeries() {
  return runs.flatMap((run, place) => !isOpen(place) ? [] : STREAMS.flatMap((stream, index) => {
    const color = several ? place : index, audio = several && index === 1;
    const trained = run.losses[`loss_${stream}`], held = run.losses[`validation/loss_${stream}`];
    return [
      ...(trained ? curve(named(run, stream), placed(run, trained), color, { dashed: audio ? SOUND : "" }) : []),
      ...(held ? [{ name: named(run, `${stream}, held out`), points: placed(run, held), color, dashed: audio ? "2 3 7 3" : HELD_OUT, dotted: true }] : []),
    ];
  }));
}
function levelSeries(run) {
  const ranges = Object.keys(run.losses).filter((name) => name.startsWith(`noise_level/loss_${view.stream}_`)).sort();
  const held = Object.keys(run.losses).filter((name) => name.startsWith(`validation/loss_${view.stream}_sigma`)).sort();
  const rangeOf = (name) => Math.min(3, Math.floor(Number(name.split("sigma")[1]) * 4));
  return [
    ...ranges.flatMap((name) => curve(`noise ${name.split("_").at(-1).replace("-", " to ")}`, placed(run, run.losses[name]), Math.round(Number(name.split("_").at(-1).split("-")[0]) * 4))),
    ...held.map((name) => ({ name: `held out, noise ${name.split("sigma")[1]}`, points: placed(run, run.losses[name]), color: rangeOf(name), dashed: HELD_OUT, dotted: true })),
  ];
}
function drawCharts() {
  const against = view.against === "minutes" && hasPace ? "minutes" : "step";
  const about = (title, y, more = {}) => ({ title, x: against, y, ...more });
  chart(by("chart-losses"), lossSeries(), about("Losses", "loss"));
  chart(by("chart-levels"), levelSeries(runs[view.levelsOf]), about("Losses by noise level", "loss", { empty: "The loss file has none of this stream." }));
  const gaps = runs.flatMap((run, place) => !isOpen(place) ? [] : STREAMS.filter((stream) => run.gaps[stream]).map((stream, index) => ({ name: named(run, stream), points: placed(run, run.gaps[stream]), color: several ? place : index, dashed: several && stream === "audio" ? SOUND : "", dotted: true })));
  by("gap-part").hidden = gaps.length === 0;
  if (gaps.length) chart(by("chart-gap"), gaps, about("Held-out less training loss", "loss"));
  const pace = runs.flatMap((run, place) => isOpen(place) && run.record ? curve(named(run, "seconds a step"), placed(run, run.record.pace.map((point) => [point[0], point[2]])), place) : []);
  chart(by("chart-speed"), pace, about("Seconds a step, previews and saves apart", "s", { empty: "No times are known." }));
}
function drawControls() {
  by("against").value = view.against;
  by("against").disabled = !hasPace;
  by("against").addEventListener("change", () => { view.against = by("against").value; remember(VIEW, view); drawCharts(); });
  by("smoothing").value = String(view.smoothing);
  by("smoothing").addEventListener("input", () => { view.smoothing = Number(by("smoothing").value); remember(VIEW, view); drawCharts(); });
  const streams = STREAMS.filter((stream) => runs.some((run) => Object.keys(run.losses).some((name) => name.startsWith(`noise_level/loss_${stream}`))));
  if (!streams.includes(view.stream)) view.stream = streams[0] ?? "video";
  const fields = [chooser("Stream", streams.map((stream) => [stream, stream]), view.stream, (value) => { view.stream = value; drawCharts(); })];
  if (several) fields.push(chooser("Run", runs.map((run, place) => [String(place), run.label]), String(view.levelsOf), (value) => { view.levelsOf = Number(value); drawCharts(); }));
  by("levels").replaceChildren(...fields);
}
function bestOf(run) {
  if (!run.best) return named(run, "nothing is held out, so nothing tells which checkpoint is best ([[validation_datasets]] in the dataset file).");
  const losses = STREAMS.filter((stream) => stream in run.best.losses).map((stream) => `${stream} ${short(run.best.losses[stream])}`).join(", ");
  const step = `least held-out loss at step ${run.best.step} (${losses})`;
  if (run.best.file === null) return named(run, `${step}; no checkpoint is saved yet.`);
  const where = run.best.measured === run.best.file_step ? "" : `, by the measurement at step ${run.best.measured}`;
  return make("span", {}, named(run, "best checkpoint: "), make("strong", {}, run.best.file), ` (step ${run.best.file_step}${where}); ${step}.`);
}

// What is known of each run.
function stateOf(run) {
  const record = run.record;
  if (!record) return `${run.label}: its losses and files are all that is known of it.`;
  const words = { training: "was training when this page was written", done: "done", interrupted: "ended early" }[record.state];
  const pace = record.pace.at(-1);
  const time = pace ? `, ${(pace[1] / 60).toFixed(1)} minutes, ${short(pace[2])} s a step lately` : "";
  return `${run.label}: step ${record.step} of ${record.total}, ${words}${time}. Began ${new Date(record.started).toLocaleString()}, on ${record.device}.`;
}
function memoryOf(run) {
  const { record } = run;
  const rows = [];
  if (record.predicted_bytes !== null) rows.push(["memory of the card, as planned", `${(record.predicted_bytes / GIB).toFixed(2)} GiB`]);
  if (record.peak_bytes !== null) {
    const share = record.predicted_bytes ? ` (${((100 * record.peak_bytes) / record.predicted_bytes).toFixed(0)} % of the plan; previews count too)` : "";
    rows.push(["memory of the card, at most", `${(record.peak_bytes / GIB).toFixed(2)} GiB${share}`]);
  }
  const plan = record.plan.map(([what, value], place) => [what || record.plan[place - 1]?.[0] || "", value]);
  return [...(several ? [make("h3", {}, run.label)] : []), table(["what", ""], [...rows, ...plan])];
}
function lookOf(clip) {
  const look = make("div", { className: "look" });
  if (clip.picture) look.append(make("img", { src: clip.picture, alt: `The middle of ${clip.name}`, loading: "lazy" }));
  if (clip.outline.length) {
    const height = 24, path = clip.outline.map((peak, place) => `M${place + 0.5} ${height / 2 - Math.max(0.5, (peak * height) / 200)}v${Math.max(1, (peak * height) / 100)}`).join("");
    const drawn = svg("svg", { viewBox: `0 0 ${clip.outline.length} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": `The sound of ${clip.name}, ${Math.max(...clip.outline)} % of full scale at most` });
    drawn.append(svg("path", { d: path }));
    look.append(drawn);
  }
  return look;
}
function receiptOf(receipt) {
  const count = receipt.clips.length + receipt.more, listed = receipt.clips.map((clip) => clip.seconds).filter(Boolean);
  const shortest = receipt.shortest ?? Math.min(...listed), longest = receipt.longest ?? Math.max(...listed);
  const heard = receipt.heard ?? receipt.clips.filter((clip) => clip.sound).length;
  const older = receipt.heard === null && receipt.more ? ` (of the ${receipt.clips.length} that are listed)` : "";
  const lengths = longest > 0 ? `, ${short(shortest)} to ${short(longest)} s${older}, ${(receipt.seconds / 60).toFixed(1)} minutes together` : "";
  const repeats = receipt.repeats > 1 ? `, each ${receipt.repeats} times an epoch` : "";
  const parts = [make("h3", {}, `${receipt.label}${receipt.held_out ? " (held out)" : ""}: ${receipt.folder}`), make("p", {}, `${count} clip(s), ${heard} with sound${older}${lengths}${repeats}`)];
  if (receipt.sources.length) parts.push(details(`Sources that were trimmed, dropped, or are worth a look (${receipt.sources.length})`, table(["source", "what", "why"], receipt.sources)));
  const rows = receipt.clips.map((clip) => [clip.name, lookOf(clip), clip.caption, clip.seconds ? short(clip.seconds) : "still", clip.start ? short(clip.start) : "", clip.frames ? String(clip.frames) : "", clip.size, clip.sound ? "yes" : "no"]);
  const more = receipt.more ? [make("p", {}, `... and ${receipt.more} more.`)] : [];
  if (rows.length) parts.push(details(`Clips (${count})`, table(["clip", "what it is", "caption", "seconds", "from", "frames", "size", "sound"], rows, [3, 4, 5]), ...more));
  return parts;
}
function settingsOf(run) {
  const { settings, command, program } = run.record;
  const changed = settings.filter(([, value, otherwise]) => value !== otherwise);
  const copy = make("button", { type: "button" }, "Copy");
  copy.addEventListener("click", () => navigator.clipboard?.writeText(command).then(() => { copy.textContent = "Copied"; }, () => { copy.textContent = "Not allowed here: select it by hand"; }));
  const all = settings.map(([name, value, otherwise]) => [name, make("span", { className: value === otherwise ? "" : "changed" }, value), otherwise]);
  return [
    make("h3", {}, several ? `${run.label}: the command` : "The command"), make("pre", {}, command), make("p", {}, copy, ` ${program}`),
    make("h3", {}, "What differs from the defaults"), table(["flag", "here", "default"], changed),
    details(`All settings (${settings.length})`, table(["flag", "here", "default"], all)),
  ];
}
// Settings in which the runs differ, side by side.
function differences() {
  const known = runs.filter((run) => run.record);
  if (known.length < 2) return [];
  const values = known.map((run) => new Map(run.record.settings.map(([name, value]) => [name, value])));
  const names = [...new Set(values.flatMap((own) => [...own.keys()]))];
  const rows = names.map((name) => [name, ...values.map((own) => own.get(name) ?? "")]).filter(([, ...own]) => new Set(own).size > 1);
  return [make("h3", {}, "In what the runs differ"), table(["flag", ...known.map((run) => run.label)], rows)];
}

by("state").replaceChildren(...runs.map((run) => make("li", {}, stateOf(run))));
by("best").replaceChildren(...runs.map((run) => make("li", {}, bestOf(run))));
const recorded = runs.filter((run) => run.record);
by("memory").replaceChildren(...recorded.flatMap(memoryOf));
by("receipts").replaceChildren(...recorded.flatMap((run) => [...(several ? [make("h3", {}, `Of ${run.label}`)] : []), ...run.record.datasets.flatMap(receiptOf)]));
by("set").replaceChildren(...differences(), ...recorded.flatMap(settingsOf));
for (const name of ["memory", "receipts", "set"]) if (!recorded.length) by(name).replaceChildren(make("p", {}, "The run has left no record of this."));
drawLayout();
drawControls();
draw();
drawCharts();
let widthBefore = document.documentElement.clientWidth;
window.addEventListener("resize", () => {
  if (document.documentElement.clientWidth === widthBefore) return; // a phone's address bar
  widthBefore = document.documentElement.clientWidth;
  drawCharts();
});
requestAnimationFrame(tick);
