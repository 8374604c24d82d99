"use strict";
// What pages of clips have in common: what the browser keeps, cells, playback in step, picks, keys. `data` has key, name, fps and clips;
// the page has the elements that are named here, fills `shown` through `cell`.
const data = JSON.parse(document.getElementById("data").textContent);
const clips = new Map(data.clips.map((clip) => [clip.id, clip]));
const by = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// What the browser keeps. Where it keeps nothing (private windows), all works until the page is closed.
const PICKS = `ltxv2-picks:${data.key}`, VIEW = `ltxv2-view:${data.key}`;
let kept = true;
function recall(key, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? otherwise;
  } catch {
    kept = false;
    return otherwise;
  }
}
function remember(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
  } catch {
    kept = false;
  }
}
const isPick = (pick) => pick && typeof pick.better === "string" && typeof pick.worse === "string";
const recalled = recall(PICKS, []);
let picks = Array.isArray(recalled) ? recalled.filter(isPick) : [];
const view = { size: 280, hover: true, loop: true };
const before = recall(VIEW, {});
view.hover = before.hover !== false;
view.loop = before.loop !== false;
if (before.size >= 120 && before.size <= 720) view.size = before.size;

let heard = null, first = null, playing = false, time = 0, shown = [];

function describe(clip) {
  const loras = clip.loras.map((one) => `${one.name} at ${one.video}${one.audio === one.video ? "" : ` (sound ${one.audio})`}`);
  return `${loras.join(", ") || "base"}, seed ${clip.seed}, prompt ${clip.index}: ${clip.prompt}`;
}
function scores(holder, clip) {
  const told = Object.entries(clip.scores).map(([name, score]) => `${name} ${score === null ? "-" : score.toPrecision(4)}`);
  if (told.length) holder.querySelector("figcaption").prepend(make("span", { title: "rewards" }, told.join(", ")));
}
function link(clip) {
  const way = clip.href.startsWith("data:") ? { download: clip.file } : { target: "_blank", rel: "noopener" };
  return make("a", { className: "name", href: clip.href, ...way }, clip.file);
}
function cell(clip, rowSpan = 1) {
  const holder = make("td", { rowSpan });
  if (!clip) return holder;
  const figure = make("figure", { className: "cell", tabIndex: 0 });
  figure.setAttribute("aria-label", describe(clip));
  const caption = make("figcaption");
  const one = { clip, figure, media: null };
  if (clip.file === null) {
    figure.append(make("div", { className: "none" }, clip.seconds ? "sampled, not decoded yet" : "not made yet"));
  } else if (clip.kind === "image") {
    figure.append(make("img", { src: clip.href, alt: describe(clip), loading: "lazy" }));
  } else {
    one.media = make(clip.kind === "video" ? "video" : "audio", { src: clip.href, muted: true, preload: "auto", playsInline: true });
    one.media.addEventListener("loadedmetadata", showTime);
    one.media.addEventListener("error", () => hint(`${clip.file} cannot be played: is it beside this page?`));
    if (clip.kind === "video") figure.append(one.media);
    else figure.append(make("div", { className: "none" }, "sound"), one.media);
    one.sound = make("button", { type: "button" }, "Sound");
    one.sound.setAttribute("aria-pressed", "false");
    one.sound.addEventListener("click", () => hear(heard === one ? null : one));
    figure.firstChild.addEventListener("click", () => hear(heard === one ? null : one));
    figure.addEventListener("pointerenter", (event) => {
      if (view.hover && event.pointerType === "mouse" && navigator.userActivation?.hasBeenActive !== false) hear(one);
    });
  }
  if (clip.seconds) caption.append(make("span", { title: "seconds of sampling" }, `${clip.seconds.toFixed(1)} s`));
  if (one.sound) caption.append(one.sound);
  if (clip.file !== null) {
    one.pick = make("button", { type: "button" }, "Better");
    one.pick.addEventListener("click", () => choose(one));
    one.marks = make("span");
    caption.append(one.pick, one.marks, link(clip));
  }
  figure.append(caption);
  figure.addEventListener("focus", () => { current = one; });
  shown.push(one);
  holder.append(figure);
  return holder;
}
let current = null;
function hint(text) {
  by("hint").textContent = text;
}

// Playback: one clock, the longest clip's, which the others are brought to when they leave it.
const DRIFT = 0.12;
const played = () => shown.filter((one) => one.media);
function leader() {
  return played().reduce((best, one) => (!best || (one.media.duration || 0) > (best.media.duration || 0) ? one : best), null)?.media ?? null;
}
function startAll() {
  if (!leader()) return;
  playing = true;
  by("play").textContent = "Pause";
  played().forEach((one) => start(one));
}
function start(one) {
  one.media.playbackRate = Number(by("speed").value);
  if (!one.media.ended || time < (one.media.duration || 0) - 0.05) {
    one.media.play().catch((error) => {
      if (error.name !== "NotAllowedError") return;
      hear(null);
      hint("The browser lets sound begin after a click on the page.");
    });
  }
}
function stopAll() {
  playing = false;
  by("play").textContent = "Play";
  played().forEach((one) => one.media.pause());
}
function seek(seconds) {
  const length = leader()?.duration || 0;
  time = Math.min(Math.max(0, seconds), length);
  played().forEach((one) => { one.media.currentTime = Math.min(time, one.media.duration || 0); });
  if (playing) played().forEach((one) => start(one));
  showTime();
}
function showTime() {
  const length = leader()?.duration || 0;
  by("seek").max = String(length || 1);
  by("seek").value = String(time);
  by("time").textContent = `${time.toFixed(2)} of ${length.toFixed(2)} s`;
}
function tick() {
  const clock = leader();
  if (playing && clock) {
    time = clock.currentTime;
    if (clock.ended) {
      if (view.loop) seek(0);
      else stopAll();
    } else {
      for (const { media } of played()) {
        if (media !== clock && !media.ended && !media.seeking && Math.abs(media.currentTime - time) > DRIFT && time < media.duration) media.currentTime = time;
      }
    }
    showTime();
  }
  requestAnimationFrame(tick);
}
function hear(one) {
  heard = one && one.media ? one : null;
  for (const other of played()) {
    other.media.muted = other !== heard;
    other.figure.classList.toggle("heard", other === heard);
    other.sound.setAttribute("aria-pressed", String(other === heard));
    other.sound.textContent = other === heard ? "Mute" : "Sound";
  }
}

// Picks: which of two clips of one prompt and seed is better. Samples of rollouts (`seeds_differ`) share their prompt alone.
const ALIKE = data.seeds_differ ? "the same prompt" : "the same prompt and seed";
by("alike").textContent = ALIKE;
const comparable = (one, other) =>
  one.id !== other.id && one.recipe !== other.recipe && one.prompt === other.prompt && one.negative === other.negative && (data.seeds_differ || one.seed === other.seed) && one.index === other.index;
function choose(one) {
  if (first && first.clip.id === one.clip.id) first = null;
  else if (first && comparable(first.clip, one.clip)) {
    const pair = [first.clip.recipe, one.clip.recipe];
    picks = picks.filter((pick) => !(pair.includes(pick.better) && pair.includes(pick.worse)));
    picks.push({ better: pair[0], worse: pair[1] });
    first = null;
    remember(PICKS, picks);
  } else if (!first) first = one;
  else hint(`A pair has ${ALIKE}. Press Escape to begin anew.`);
  drawPicks();
}
function pairs() {
  const known = new Map(data.clips.filter((clip) => clip.file !== null).map((clip) => [clip.recipe, clip]));
  return picks.filter((pick) => known.has(pick.better) && known.has(pick.worse)).map((pick) => ({ pick, better: known.get(pick.better), worse: known.get(pick.worse) }));
}
function drawPicks() {
  const made = pairs();
  for (const one of shown.filter((candidate) => candidate.pick)) {
    const isFirst = first?.clip.id === one.clip.id;
    one.pick.textContent = !first ? "Better" : isFirst ? "Better ..." : "than this";
    one.pick.disabled = Boolean(first) && !isFirst && !comparable(first.clip, one.clip);
    one.figure.classList.toggle("first", isFirst);
    const wins = made.filter((pair) => pair.better.id === one.clip.id).length, losses = made.filter((pair) => pair.worse.id === one.clip.id).length;
    one.marks.replaceChildren();
    if (wins) one.marks.append(make("span", { className: "better", title: `better in ${wins} pick(s)` }, `+${wins} `));
    if (losses) one.marks.append(make("span", { className: "worse", title: `worse in ${losses} pick(s)` }, `\u2212${losses}`));
  }
  hint(first ? `Better than which? Press "than this" on another clip of ${ALIKE}.` : kept ? "" : "This browser keeps no picks: download them before you leave.");
  by("list").replaceChildren(
    ...made.map(({ pick, better, worse }) => {
      const button = make("button", { type: "button" }, "Remove");
      button.setAttribute("aria-label", `Remove: ${better.file} over ${worse.file}`);
      button.addEventListener("click", () => { picks = picks.filter((other) => other !== pick); remember(PICKS, picks); drawPicks(); });
      return make("li", {}, make("span", { className: "better" }, better.file), " over ", make("span", { className: "worse" }, worse.file), " ", button);
    }),
  );
  by("download").disabled = by("clear").disabled = made.length === 0;
}
function lines() {
  const told = (clip) => ({ file: clip.file, recipe: clip.recipe, loras: clip.loras });
  return pairs().map(({ better, worse }) => {
    const pick = { ltxv2_pick: 1, prompt: better.prompt, negative: better.negative, seed: better.seed, better: told(better), worse: told(worse) };
    return JSON.stringify(pick).replace(`"seed":"${pick.seed}"`, `"seed":${pick.seed}`); // of 64 bits, which a number here has not
  });
}
function download() {
  const address = URL.createObjectURL(new Blob(lines().map((line) => `${line}\n`), { type: "application/jsonl" }));
  make("a", { href: address, download: `${data.name}_picks.jsonl` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

// Keys. What a field or a button does with them stays theirs.
function neighbour(key) {
  const here = current?.figure.getBoundingClientRect();
  if (!here) return shown[0];
  const [across, down] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
  let best = null, least = Infinity;
  for (const one of shown) {
    const there = one.figure.getBoundingClientRect(), dx = there.left - here.left, dy = there.top - here.top;
    const along = dx * across + dy * down, aside = Math.abs(dx * down) + Math.abs(dy * across);
    if (one !== current && along > 4 && along + 3 * aside < least) [best, least] = [one, along + 3 * aside];
  }
  return best;
}
document.addEventListener("keydown", (event) => {
  const { target, key } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || target.closest("select, input, .chart")) return;
  if (target.closest("button, a, summary") && (key === " " || key === "Enter")) return;
  const speeds = [...by("speed").options].map((option) => option.value);
  const faster = (step) => {
    by("speed").value = speeds[Math.min(Math.max(0, speeds.indexOf(by("speed").value) + step), speeds.length - 1)];
    by("speed").dispatchEvent(new Event("change"));
  };
  const actions = {
    " ": () => (playing ? stopAll() : startAll()),
    Enter: () => current && hear(heard === current ? null : current),
    j: () => seek(time - 1),
    l: () => seek(time + 1),
    ",": () => seek(time - 1 / data.fps),
    ".": () => seek(time + 1 / data.fps),
    "[": () => faster(-1),
    "]": () => faster(1),
    b: () => current?.pick && !current.pick.disabled && choose(current),
    Escape: () => { first = null; drawPicks(); },
  };
  const arrow = key.startsWith("Arrow");
  const action = actions[key.length === 1 ? key.toLowerCase() : key];
  if (!arrow && !action) return;
  event.preventDefault();
  if (arrow) neighbour(key)?.figure.focus();
  else action();
});

by("play").addEventListener("click", () => (playing ? stopAll() : startAll()));
by("seek").addEventListener("input", () => seek(Number(by("seek").value)));
by("speed").addEventListener("change", () => played().forEach((one) => { one.media.playbackRate = Number(by("speed").value); }));
by("download").addEventListener("click", download);
by("clear").addEventListener("click", () => {
  const made = new Set(pairs().map(({ pick }) => pick));
  if (!confirm(`Remove ${made.size} pick(s)?`)) return;
  picks = picks.filter((pick) => !made.has(pick));
  remember(PICKS, picks);
  drawPicks();
});
for (const name of ["loop", "hover"]) {
  by(name).checked = view[name];
  by(name).addEventListener("change", () => { view[name] = by(name).checked; remember(VIEW, view); });
}
by("size").value = String(view.size);
const resize = () => { view.size = Number(by("size").value); document.documentElement.style.setProperty("--size", `${view.size}px`); };
by("size").addEventListener("input", resize);
by("size").addEventListener("change", () => remember(VIEW, view));
resize();
