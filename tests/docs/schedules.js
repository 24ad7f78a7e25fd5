"use strict";
// Every order and every time was computed before. This script draws the chosen one.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const chosen = { schedule: "1f1b", ranks: 2, "micro-batches": 4, "stages per rank": 0 };
const SVG = "http://www.w3.org/2000/svg";

function make(tag, text, attributes, space) {
  const element = space ? document.createElementNS(space, tag) : document.createElement(tag);
  element.textContent = text;
  for (const [name, value] of Object.entries(attributes ?? {})) element.setAttribute(name, value);
  return element;
}

function value(name) {
  return data.sliders[name][chosen[name]];
}

// The actions of a rank with their times; see schedules.py for the form.
function actions(text) {
  const found = [];
  let time = 0;
  for (let from = 0; from < text.length; from += 5) {
    const [stage, number] = [text[from + 1], text[from + 2]].map((digit) => parseInt(digit, 36));
    const begin = time + parseInt(text.slice(from + 3, from + 5), 36);
    time = begin + data.durations[text[from]];
    found.push({ kind: text[from], stage, number, begin, end: time });
  }
  return found;
}

function draw(rows, stages) {
  const width = at("picture").clientWidth || 800;
  const [left, height, gap] = [width < 500 ? 20 : 50, 24, 4];
  const length = Math.max(...rows.map((row) => row[row.length - 1].end));
  const unit = (width - left) / length;
  const picture = make("svg", "", { viewBox: `0 0 ${width} ${rows.length * (height + gap)}`, role: "img", "aria-label": "timeline" }, SVG);
  rows.forEach((row, rank) => {
    const top = rank * (height + gap);
    picture.append(make("text", width < 500 ? rank : `rank ${rank}`, { x: 0, y: top + 16, class: "rank" }, SVG));
    picture.append(make("rect", "", { x: left, y: top, width: width - left, height, class: "wait" }, SVG));
    for (const { kind, stage, number, begin, end } of row) {
      const [x, size] = [left + begin * unit, (end - begin) * unit];
      const pale = 1 - (0.35 * stage) / Math.max(1, stages - 1);
      const shape = make("rect", "", { x, y: top, width: Math.max(0.5, size - 0.8), height, fill: data.colours[kind], "fill-opacity": pale }, SVG);
      shape.append(make("title", `${data.names[kind]}, micro-batch ${number}, stage ${stage} of the rank`, {}, SVG));
      picture.append(shape);
      const ink = kind === "F" ? "" : "dark";
      if (size > 12) picture.append(make("text", number, { x: x + size / 2, y: top + 16, class: ink }, SVG));
    }
  });
  at("picture").replaceChildren(picture);
}

function show() {
  const stages = value("stages per rank");
  const found = data.cases[`${chosen.schedule} ${value("ranks")} ${value("micro-batches")} ${stages}`];
  at("schedule").value = chosen.schedule;
  for (const name of Object.keys(data.sliders)) {
    at(name).value = chosen[name];
    at(name).setAttribute("aria-valuetext", value(name));
    at(`${name} said`).textContent = value(name);
  }
  if (found.refused) {
    at("said").textContent = `refused: ${found.refused.join("; ")}`;
    at("picture").replaceChildren();
    at("held").textContent = "";
    return;
  }
  at("said").textContent = `the ranks wait ${(found.waits / 10).toFixed(1)} % of the step`;
  at("held").textContent = `micro-batches whose activations a rank holds when it holds most, over its stages: ${found.held.map((count, rank) => `rank ${rank}: ${count}`).join(", ")}`;
  draw(found.rows.map(actions), stages);
}

for (const name of Object.keys(data.schedules)) at("schedule").append(make("option", name, { value: name }));
at("schedule").addEventListener("change", (event) => {
  chosen.schedule = event.target.value;
  chosen["stages per rank"] = data.sliders["stages per rank"].indexOf(data.schedules[chosen.schedule]);
  show();
});
for (const [name, values] of Object.entries(data.sliders)) {
  const label = at("sliders").appendChild(make("label", `${name}: `));
  label.append(make("span", "", { id: `${name} said` }));
  const slider = label.appendChild(make("input", "", { type: "range", id: name, min: 0, max: values.length - 1, step: 1 }));
  slider.addEventListener("input", () => {
    chosen[name] = Number(slider.value);
    show();
  });
}
const kinds = [["F", "forward"], ["B", "backward, or of it the gradient of the input"], ["W", "gradient of the weights"]];
for (const [kind, said] of kinds) {
  const entry = at("legend").appendChild(make("span", "", { class: "entry" }));
  entry.appendChild(make("span", "", { class: "swatch" })).style.background = data.colours[kind];
  entry.append(said);
}
at("choose").addEventListener("submit", (event) => event.preventDefault());
addEventListener("resize", show);
show();
