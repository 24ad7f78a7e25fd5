"use strict";
// Every byte and every second was computed before. This script shows them at a moment.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const chosen = { stage: 2, ranks: 2, layers: 1, "tokens of a micro-batch": 1 };
const SVG = "http://www.w3.org/2000/svg";
const SECONDS = 12; // of the clock, for a whole step
const PARTS = Object.keys(data.parts);
const SHOWN_RANKS = 4;
let works = [];
let total = 1;
let stops = [];
let time = 0;
let playing = null;

function make(tag, text, attributes, space) {
  const element = space ? document.createElementNS(space, tag) : document.createElement(tag);
  element.textContent = text;
  for (const [name, value] of Object.entries(attributes ?? {})) element.setAttribute(name, value);
  return element;
}

const draw = (tag, attributes, text = "") => make(tag, text, attributes, SVG);
const value = (name) => data.sliders[name][chosen[name]];
const number = (text) => parseInt(text, 36);
const computes = (work) => "FBU".includes(work.kind);
const running = (work) => work.begin <= time && time < work.end;

// See stages.py for the form.
function read(found) {
  let from = 0;
  return (found.works.match(/.{8}/g) ?? []).map((text) => {
    const work = { kind: text[0], group: number(text[1]), begin: number(text.slice(2, 5)), end: number(text.slice(5)) };
    if (computes(work)) work.held = PARTS.map(() => number(found.held.slice(from, (from += 4))) / 1024);
    return work;
  });
}

function named(group) {
  const layers = value("layers");
  return group === 0 ? "the embedding" : group > layers ? "the head" : `layer ${group}`;
}

function drawLanes() {
  const [width, height, gap] = [at("lanes").clientWidth || 800, 30, 18];
  const unit = width / total;
  const picture = draw("svg", { viewBox: `0 0 ${width} ${2 * (height + gap)}`, role: "img", "aria-label": "computation and communication" });
  ["computation", "communication"].forEach((name, lane) => {
    const top = lane * (height + gap) + gap - 4;
    picture.append(draw("text", { x: 0, y: top - 4 }, name), draw("rect", { class: "track", x: 0, y: top, width, height }));
    for (const work of works.filter((each) => each.end > each.begin && computes(each) === (lane === 0))) {
      const size = Math.max(0.5, (work.end - work.begin) * unit - 0.6);
      const shape = draw("rect", { x: work.begin * unit, y: top, width: size, height, fill: data.colours[work.kind] });
      shape.append(draw("title", {}, said(work)));
      picture.append(shape);
    }
  });
  picture.append(draw("line", { class: "head", id: "head", y1: 0, y2: 2 * (height + gap) }));
  at("lanes").replaceChildren(picture);
}

function said(work) {
  const name = data.names[work.kind];
  if (work.kind === "U" || work.kind === "P") return name;
  // A reduction goes on where the one before has ended; groups come from the head down.
  const before = works.filter((each) => each.kind === "R" && each.begin < work.begin).pop();
  const first = work.kind !== "R" ? work.group : before ? Math.max(work.group, before.group - 1) : value("layers") + 1;
  return `${name} of ${named(first)}${first > work.group ? ` to ${named(work.group)}` : ""}`;
}

// Of a group's parameters and gradients, and of optimizer states: "none", "part", "whole", or "moving".
function states(group) {
  const stage = value("stage");
  const sharded = stage === "3" || stage === "FSDP";
  let parameters = sharded ? "part" : "whole";
  let gradients = "none";
  for (const work of works) {
    if (work.begin > time) continue;
    const done = work.end <= time;
    if (work.kind === "G" && work.group === group) parameters = done ? "whole" : "moving";
    if (work.kind === "D" && work.group === group) parameters = "part";
    if (work.kind === "P") parameters = done ? "whole" : "moving";
    if (work.kind === "B" && work.group === group) gradients = done ? "whole" : "moving";
    if (work.kind === "R" && work.group <= group && gradients === "whole") gradients = !done ? "moving" : stage === "0" ? "whole" : "reduced";
    if (work.kind === "U" && done) gradients = "none";
  }
  if (time >= total) gradients = "none";
  return [parameters, gradients === "reduced" ? "part" : gradients, stage === "0" ? "whole" : "part"];
}

function drawRanks() {
  const [layers, ranks] = [value("layers"), value("ranks")];
  const [column, row] = [50, layers > 16 ? 5 : layers > 8 ? 8 : 12];
  const rows = [...Array(layers + 2).keys()].map(states);
  const shown = Math.min(ranks, SHOWN_RANKS);
  const cards = [...Array(shown).keys()].map((rank) => {
    const picture = draw("svg", { viewBox: `0 0 ${3 * (column + 6)} ${rows.length * row}`, role: "img", "aria-label": `what rank ${rank} holds` });
    rows.forEach((kinds, line) =>
      kinds.forEach((state, place) => {
        const [x, y, height] = [place * (column + 6), line * row, row - 1.5];
        const own = { x: x + (column * rank) / ranks, y, width: Math.max(1.5, column / ranks), height };
        const fill = data.parts[PARTS[place]];
        picture.append(draw("rect", { class: "track", x, y, width: column, height }));
        if (state === "whole") picture.append(draw("rect", { x, y, width: column, height, fill }));
        if (state === "moving") picture.append(draw("rect", { x, y, width: column, height, fill, "fill-opacity": 0.45 }));
        if (state === "part") picture.append(draw("rect", { ...own, fill }));
      }),
    );
    const figure = make("figure", "");
    figure.append(make("figcaption", `rank ${rank}`), picture);
    return figure;
  });
  at("who").textContent = ranks > shown ? `Who holds what: the first ${shown} of ${ranks} ranks` : "Who holds what";
  at("cards").replaceChildren(...cards);
}

function drawMemory(held) {
  const width = at("memory").clientWidth || 800;
  const most = Math.max(data.capacity, ...works.filter(computes).map((work) => sum(work.held)));
  const unit = width / most;
  const picture = draw("svg", { viewBox: `0 0 ${width} 34`, role: "img", "aria-label": "memory of a GPU" });
  picture.append(draw("rect", { class: "track", x: 0, y: 2, width, height: 30 }));
  let left = 0;
  held.forEach((size, place) => {
    picture.append(draw("rect", { x: left, y: 2, width: size * unit, height: 30, fill: data.parts[PARTS[place]] }));
    left += size * unit;
  });
  const limit = Math.min(width - 1, data.capacity * unit);
  picture.append(draw("line", { class: "limit", x1: limit, x2: limit, y1: 0, y2: 34 }));
  at("memory").replaceChildren(picture);
  PARTS.forEach((name, place) => (at(`part ${name}`).textContent = `${name} ${held[place].toFixed(2)} GiB`));
}

const sum = (numbers) => numbers.reduce((total, each) => total + each, 0);

function show() {
  const computing = works.find((work) => computes(work) && running(work));
  const sending = works.find((work) => !computes(work) && running(work));
  const latest = works.filter((work) => computes(work) && work.begin <= time).pop() ?? works.find(computes);
  const x = (time / total) * (at("lanes").clientWidth || 800);
  at("head").setAttribute("x1", x);
  at("head").setAttribute("x2", x);
  at("moment").value = time;
  at("moment").setAttribute("aria-valuetext", `${(time * data.tick).toFixed(1)} ms`);
  const waits = time >= total ? "the step is done" : "the GPU waits";
  const parts = [`${(time * data.tick).toFixed(1)} ms`, computing ? said(computing) : waits, sending ? `meanwhile: ${said(sending)}` : "nothing is sent"];
  at("now").textContent = `${parts.join(" · ")} · holds ${sum(latest.held).toFixed(2)} GiB`;
  drawMemory(latest.held);
  drawRanks();
}

function choose() {
  const found = data.cases[Object.keys(data.sliders).map(value).join(" ")];
  for (const name of Object.keys(data.sliders)) {
    const text = name === "stage" ? data.titles[value(name)] : value(name);
    at(name).value = chosen[name];
    at(name).setAttribute("aria-valuetext", text);
    at(`${name} said`).textContent = text;
  }
  works = read(found);
  total = Math.max(...works.map((work) => work.end));
  stops = [...new Set(works.flatMap((work) => [work.begin, work.end]))].sort((a, b) => a - b);
  at("moment").max = total;
  time = Math.min(time, total);
  const most = Math.max(...works.filter(computes).map((work) => sum(work.held)));
  const capacity = data.capacity.toFixed(1);
  const held = `${most.toFixed(2)} ${most > data.capacity ? `GiB, more than the ${capacity} of a GPU` : `of ${capacity} GiB`}`;
  at("said").textContent = `holds at most ${held}; a step takes ${(total * data.tick).toFixed(1)} ms, of which the GPU waits ${(found.waits / 10).toFixed(1)} %`;
  drawLanes();
  show();
}

function pause() {
  if (playing !== null) cancelAnimationFrame(playing);
  playing = null;
  at("play").textContent = "Play";
}

function play() {
  if (time >= total) time = 0;
  let before = null;
  const next = (now) => {
    if (before !== null) time = Math.min(total, time + ((now - before) / 1000 / SECONDS) * total);
    before = now;
    show();
    if (time >= total) pause();
    else playing = requestAnimationFrame(next);
  };
  at("play").textContent = "Pause";
  playing = requestAnimationFrame(next);
}

function jump(to) {
  pause();
  time = to ?? time;
  show();
}

for (const [name, values] of Object.entries(data.sliders)) {
  const label = at("sliders").appendChild(make("label", name === "stage" ? "" : `${name}: `));
  label.append(make("span", "", { id: `${name} said` }));
  const slider = label.appendChild(make("input", "", { type: "range", id: name, min: 0, max: values.length - 1, step: 1 }));
  slider.addEventListener("input", () => {
    const share = time / total;
    chosen[name] = Number(slider.value);
    time = share * Math.max(...read(data.cases[Object.keys(data.sliders).map(value).join(" ")]).map((work) => work.end));
    choose();
  });
}
function legend(where, entries, prefix) {
  for (const [name, colour, text] of entries) {
    const entry = at(where).appendChild(make("span", "", { class: "entry" }));
    entry.appendChild(make("span", "", { class: "swatch" })).style.background = colour;
    entry.append(make("span", text, prefix ? { id: `${prefix} ${name}` } : {}));
  }
}
legend("kinds", [..."FBUGR"].map((kind) => [kind, data.colours[kind], data.names[kind]]), "");
legend("parts", Object.entries(data.parts).map(([name, colour]) => [name, colour, name]), "part");
at("play").addEventListener("click", () => (playing === null ? play() : pause()));
at("back").addEventListener("click", () => jump(stops.findLast((stop) => stop < time)));
at("on").addEventListener("click", () => jump(stops.find((stop) => stop > time)));
at("moment").addEventListener("input", () => jump(Number(at("moment").value)));
at("choose").addEventListener("submit", (event) => event.preventDefault());
addEventListener("resize", choose);
choose();
