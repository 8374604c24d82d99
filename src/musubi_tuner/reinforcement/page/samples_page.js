const body = make("tbody");
data.rows.forEach((prompt, row) => {
  const line = make("tr", {}, make("th", { scope: "row" }, make("span", { className: "label" }, prompt)));
  for (const clip of data.clips.filter((one) => one.at[0] === row)) {
    const holder = cell(clip);
    scores(holder, clip);
    line.append(holder);
  }
  body.append(line);
});
by("grid").replaceChildren(make("table", {}, body));
by("state").textContent = `${data.clips.length} samples. Picks of this page are what --dpo_pairs reads.`;
hear(null);
drawPicks();
showTime();
requestAnimationFrame(tick);
