"use strict";
// All numbers were computed before. This script looks up one row for each choice and shows it; it predicts nothing.
const data = JSON.parse(document.getElementById("data").textContent);
const rows = data.rows.split(";");
const GIB = 2 ** 30;
const at = (id) => document.getElementById(id);
const distinct = (values) => [...new Set(values)];
const presets = distinct(data.layouts.map((layout) => layout.preset));
const sizes = distinct(data.shapes.map((shape) => shape.size));
const recomputes = distinct(data.shapes.map((shape) => shape.recompute));
// swept: the value of each control; layout, shape: places in their lists.
const chosen = { swept: data.controls.map(() => 0), layout: 0, shape: 0 };

// Of two hundredths that are as near, the even one: as Python rounds.
function gib(bytes) {
  const scaled = bytes * 100;
  let hundredths = Math.floor(scaled / GIB);
  const rest = scaled - hundredths * GIB;
  if (rest > GIB / 2 || (rest === GIB / 2 && hundredths % 2 === 1)) hundredths += 1;
  const cents = String(hundredths % 100).padStart(2, "0");
  return `${whole(Math.floor(hundredths / 100))}.${cents}`;
}

function whole(number) {
  return String(number).replace(/\B(?=(\d{3})+$)/g, ",");
}

function variant() {
  return data.controls.reduce((place, control, index) => place * control.values.length + chosen.swept[index], 0);
}

// One row as an object; see explore_page.py for the form.
function look(layout, shape) {
  const text = rows[(variant() * data.layouts.length + layout) * data.shapes.length + shape];
  const numbers = (from) => text.slice(from).split(",").map((digits) => parseInt(digits, 36));
  if (text[0] === "!") return { refused: data.refusals[numbers(1)[0]] };
  if (text[0] === "?") {
    const [states, milliseconds, tokens, mfu] = numbers(1);
    return { states, milliseconds, tokens, mfu };
  }
  const parts = numbers(0);
  const highest = parts.splice(data.components.length);
  const rest = highest.splice(data.components.length);
  const [reserved, reservedMost, device, most, outside, host, fits, verdict, peak, milliseconds, tokens, mfu] = rest;
  return {
    parts, highest, reserved, reservedMost, device, most, outside, host, fits: fits === 1, verdict: data.verdicts[verdict], peak: data.peaks[peak],
    milliseconds, tokens, mfu,
  };
}

function range(lower, upper) {
  return lower === upper ? gib(lower) : `${gib(lower)} to ${gib(upper)}`;
}

function judge(found) {
  const { name, bytes } = data.devices[variant()];
  if (found.refused !== undefined) return ["", "refused by the rules"];
  if (found.states !== undefined) {
    const alone = `the states alone take ${gib(found.states)} GiB`;
    return found.states > bytes ? ["bad", `does not fit: ${alone}, ${name} has ${gib(bytes)}`] : ["", `not estimated: ${alone}`];
  }
  const colour = found.fits ? "good" : found.device > bytes ? "bad" : "fair";
  return [colour, `${found.verdict}: ${range(found.device, found.most)} GiB, ${name} has ${gib(bytes)}`];
}

function make(tag, text, attributes = {}) {
  const element = document.createElement(tag);
  element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function command() {
  const { overrides: layout } = data.layouts[chosen.layout];
  const swept = data.controls.map((control, index) => control.overrides[chosen.swept[index]]);
  const { overrides: shape } = data.shapes[chosen.shape];
  return [...data.base, ...swept, ...layout, ...shape, data.batches[variant()]].join(" ");
}

function draw(found) {
  const { bytes } = data.devices[variant()];
  const top = Math.max(bytes, found.most ?? found.states ?? 0) * 1.05;
  const segments = [];
  if (found.parts) {
    found.parts.forEach((size, index) => segments.push([size, data.components[index][1], ""]));
    const allocated = found.parts.reduce((sum, size) => sum + size, 0);
    segments.push([found.reserved - allocated, "", "reserved"], [found.outside, "", "outside"]);
    segments.push([found.most - found.reserved - found.outside, "", "above"]);
  } else if (found.states) segments.push([found.states, "", "outside"]);
  at("bar").replaceChildren(
    ...segments.filter(([size]) => size > 0).map(([size, colour, kind]) => {
      const segment = make("div", "", { class: kind });
      segment.style.width = `${(size / top) * 100}%`;
      if (colour) segment.style.background = colour;
      return segment;
    }),
  );
  at("line").style.left = `${(bytes / top) * 100}%`;
  at("scale").textContent = `dashed line: what ${data.devices[variant()].name} has, ${gib(bytes)} GiB; dotted: up to the upper end of the range`;
}

function tabulate(found) {
  const body = at("parts").tBodies[0];
  body.replaceChildren();
  at("parts").hidden = !found.parts;
  if (!found.parts) return;
  const add = (label, value, { colour, kind = "", total = false } = {}) => {
    const row = body.appendChild(make("tr", "", total ? { class: "total" } : {}));
    const name = row.appendChild(make("td", ""));
    if (colour || kind) {
      const swatch = name.appendChild(make("span", "", { class: `swatch ${kind}` }));
      if (colour) swatch.style.background = colour;
    }
    name.append(label);
    row.append(make("td", value));
  };
  found.parts.forEach((size, index) => {
    const [label, colour] = data.components[index];
    const [held, highest] = [gib(size), gib(found.highest[index])];
    add(label, held === highest ? held : `${held} (${highest})`, { colour });
  });
  add("peak allocated", gib(found.parts.reduce((sum, size) => sum + size, 0)), { total: true });
  add("peak reserved by torch", range(found.reserved, found.reservedMost), { kind: "reserved" });
  add("CUDA context, NCCL (assumed)", gib(found.outside), { kind: "outside" });
  add("on the device (nvidia-smi)", range(found.device, found.most), { total: true });
  if (found.host) add("host memory per rank", gib(found.host));
  add("peak in", found.peak);
}

function grid() {
  const head = make("tr", "");
  const titles = ["recompute", ...sizes.map((size) => `micro-batch ${size}`)];
  head.append(...titles.map((title) => make("th", title, { scope: "col" })));
  const lines = recomputes.map((recompute) => {
    const line = make("tr", "");
    line.append(make("th", recompute, { scope: "row" }));
    for (const size of sizes) {
      const shape = data.shapes.findIndex((one) => one.size === size && one.recompute === recompute);
      const found = look(chosen.layout, shape);
      const [colour, said] = judge(found);
      const text = found.refused !== undefined ? "refused" : found.states !== undefined ? (colour ? "too large" : "not estimated") : `${gib(found.most)} GiB`;
      const attributes = { type: "button", class: colour, title: said, "data-shape": shape };
      const button = make("button", text, { ...attributes, "aria-pressed": shape === chosen.shape });
      if (found.tokens) button.append(make("small", `${whole(found.tokens)} tok/s`));
      button.addEventListener("click", () => {
        chosen.shape = shape;
        show();
        at("grid").querySelector(`[data-shape="${shape}"]`).focus();
      });
      line.appendChild(make("td", "")).append(button);
    }
    return line;
  });
  at("grid").replaceChildren(head, ...lines);
}

function show() {
  const layout = data.layouts[chosen.layout];
  const shape = data.shapes[chosen.shape];
  at("preset").value = layout.preset;
  const same = data.layouts.map((one, place) => [one, place]).filter(([one]) => one.preset === layout.preset);
  at("degrees").replaceChildren(...same.map(([one, place]) => make("option", one.degrees || "as they are", { value: place })));
  at("degrees").value = String(chosen.layout);
  check("size", sizes.indexOf(shape.size));
  check("recompute", recomputes.indexOf(shape.recompute));
  chosen.swept.forEach((value, index) => check(`swept${index}`, value));
  const found = look(chosen.layout, chosen.shape);
  const [colour, said] = judge(found);
  at("verdict").className = colour;
  at("verdict").textContent = said;
  at("refused").replaceChildren(...(found.refused ?? "").split("\n").filter(Boolean).map((line) => make("li", line)));
  at("speed").textContent = found.tokens
    ? `${whole(found.tokens)} tokens/s per GPU predicted, ${(found.milliseconds / 1000).toFixed(2)} s per step, MFU ${(found.mfu / 10).toFixed(0)} %`
    : "";
  draw(found);
  tabulate(found);
  at("command").textContent = command();
  at("copied").textContent = "";
  grid();
  history.replaceState(null, "", `#${[...chosen.swept, chosen.layout, chosen.shape].join(".")}`);
}

function check(name, value) {
  document.querySelector(`input[name="${name}"][value="${value}"]`).checked = true;
}

function radios(place, name, labels, choose) {
  const options = place.appendChild(make("div", "", { class: "options" }));
  labels.forEach((label, value) => {
    const option = options.appendChild(make("label", ""));
    const input = option.appendChild(make("input", "", { type: "radio", name, value }));
    option.append(make("span", label));
    input.addEventListener("change", () => {
      choose(value);
      show();
    });
  });
}

function reshape(size, recompute) {
  chosen.shape = data.shapes.findIndex((one) => one.size === size && one.recompute === recompute);
}

// The fastest under what is swept; null where nothing fits.
function fastest() {
  let best = null;
  data.layouts.forEach((_, layout) =>
    data.shapes.forEach((_, shape) => {
      const found = look(layout, shape);
      if (found.fits && (best === null || found.tokens > best.tokens)) best = { layout, shape, tokens: found.tokens };
    }),
  );
  return best;
}

function take(best) {
  if (best === null) at("verdict").textContent = "nothing fits with these choices";
  else {
    chosen.layout = best.layout;
    chosen.shape = best.shape;
    show();
  }
}

async function copy() {
  try {
    await navigator.clipboard.writeText(command());
    at("copied").textContent = "copied";
  } catch {
    getSelection().selectAllChildren(at("command"));
    at("copied").textContent = "selected: copy it with your keyboard";
  }
}

// A link to this page keeps the choice.
function fromLink() {
  const numbers = location.hash.slice(1).split(".").map(Number);
  const sizesOf = [...data.controls.map((control) => control.values.length), data.layouts.length, data.shapes.length];
  const valid = sizesOf.every((size, index) => Number.isInteger(numbers[index]) && numbers[index] >= 0 && numbers[index] < size);
  if (!valid || numbers.length !== sizesOf.length) return false;
  [chosen.layout, chosen.shape] = numbers.slice(-2);
  chosen.swept = numbers.slice(0, -2);
  return true;
}

at("preset").append(...presets.map((preset) => make("option", preset, { value: preset })));
at("preset").addEventListener("change", (event) => {
  chosen.layout = data.layouts.findIndex((layout) => layout.preset === event.target.value);
  show();
});
at("degrees").addEventListener("change", (event) => {
  chosen.layout = Number(event.target.value);
  show();
});
radios(at("sizes"), "size", sizes, (value) => reshape(sizes[value], data.shapes[chosen.shape].recompute));
radios(at("recompute"), "recompute", recomputes, (value) => reshape(data.shapes[chosen.shape].size, recomputes[value]));
data.controls.forEach((control, index) => {
  const place = at("swept").appendChild(make("fieldset", ""));
  place.append(make("legend", control.name));
  radios(place, `swept${index}`, control.values, (value) => {
    chosen.swept[index] = value;
  });
});
// Chromium leaves a button that is partly in view where it is.
at("grid").addEventListener("focusin", (event) => event.target.scrollIntoView({ block: "nearest", inline: "nearest" }));
at("best").addEventListener("click", () => take(fastest()));
at("copy").addEventListener("click", copy);
at("choose").addEventListener("submit", (event) => event.preventDefault());
addEventListener("hashchange", () => fromLink() && show());
if (fromLink()) show();
else {
  show();
  const best = fastest();
  if (best !== null) take(best);
}
