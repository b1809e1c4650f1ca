// Asks the server for its state and draws it. Whatever the server says is put in as text, never as markup.
"use strict";

const PERIOD_MS = 1000;
const KEPT = 60; // points of a rate's line
const COLOURS = ["#0969da", "#bf8700", "#8250df", "#1a7f37", "#cf222e", "#bc4c00", "#57606a"];
const NAMESPACE = "http://www.w3.org/2000/svg";

const rates = new Map();
const colours = new Map();
const byId = (id) => document.getElementById(id);

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function drawn(name, attributes) {
  const made = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function colourOf(engine) {
  if (!colours.has(engine)) colours.set(engine, COLOURS[colours.size % COLOURS.length]);
  return colours.get(engine);
}

function bytes(count) {
  if (!count) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = Math.min(Math.floor(Math.log10(count) / 3), units.length - 1);
  return `${(count / 1000 ** power).toPrecision(3)} ${units[power]}`;
}

const number = (value) => (value === null ? "–" : value >= 100 ? value.toFixed(0) : value.toPrecision(3));

function duration(seconds) {
  const [days, hours] = [Math.floor(seconds / 86400), Math.floor(seconds / 3600) % 24];
  const [minutes, rest] = [Math.floor(seconds / 60) % 60, Math.floor(seconds) % 60];
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${rest} s` : `${rest} s`;
}

function spark(points) {
  const picture = drawn("svg", { class: "spark", viewBox: "0 0 90 20", "aria-hidden": "true" });
  const top = Math.max(...points, 1e-9);
  const line = points.map((value, i) => `${(i * 90) / (KEPT - 1)},${19 - (18 * value) / top}`).join(" ");
  picture.append(drawn("polyline", { points: line }));
  return picture;
}

function placementBar(placement) {
  const engines = Object.entries(placement).sort((a, b) => b[1] - a[1]);
  const total = engines.reduce((sum, [, count]) => sum + count, 0);
  if (!total) return element("span", "–");
  const said = engines.map(([engine, count]) => `${engine}: ${count}`).join(", ");
  const bar = drawn("svg", { class: "bar", role: "img", "aria-label": said, viewBox: "0 0 100 10", preserveAspectRatio: "none" });
  const title = drawn("title", {});
  title.textContent = said;
  bar.append(title);
  let at = 0;
  for (const [engine, count] of engines) {
    const width = (100 * count) / total;
    bar.append(drawn("rect", { x: at, y: 0, width, height: 10, fill: colourOf(engine) }));
    at += width;
  }
  const cell = element("span");
  cell.append(bar, element("small", said));
  return cell;
}

function row(model) {
  const key = `${model.name}/${model.version}`;
  const points = rates.get(key) ?? rates.set(key, []).get(key);
  points.push(model.rate);
  if (points.length > KEPT) points.shift();

  const made = element("tr");
  made.dataset.model = key;
  const name = element("td", model.name);
  name.append(element("small", `version ${model.version}${model.pinned ? ", pinned" : ""}${model.pid ? `, process ${model.pid}` : ""}`));
  const state = element("td");
  state.append(element("span", model.state, `state ${model.state}`));
  if (model.reason) state.append(element("small", model.reason));
  if (model.restarts) state.append(element("small", `restarted ${model.restarts} times`));
  const where = element("td", model.engines.join(", ") || "–");
  if (model.devices.length) where.append(element("small", model.devices.join(", ")));
  const rate = element("td", undefined, "number");
  rate.append(spark(points), element("span", number(model.rate)));
  made.append(name, state, where, rate);
  for (const text of [number(model.p50_ms), number(model.p99_ms), String(model.waiting), bytes(model.resident_bytes)]) {
    made.append(element("td", text, "number"));
  }
  const placement = element("td");
  placement.append(placementBar(model.placement));
  made.append(placement);
  return made;
}

function show(state) {
  const { server, models } = state;
  byId("version").textContent = server.version;
  const status = byId("server");
  status.textContent = `${server.ready ? "Ready" : server.live ? "Not ready" : "Not live"}, up ${duration(server.uptime_s)}`;
  status.className = server.ready ? "" : "bad";
  byId("key").hidden = true;

  const ready = models.filter((model) => model.state === "READY").length;
  const sum = (read) => models.reduce((total, model) => total + read(model), 0);
  const totals = {
    "Versions ready": `${ready} of ${models.length}`,
    "Requests/s": number(sum((model) => model.rate)),
    "Waiting": String(sum((model) => model.waiting)),
    "Memory of models": bytes(sum((model) => model.resident_bytes)),
  };
  byId("totals").replaceChildren(
    ...Object.entries(totals).map(([name, value]) => {
      const pair = element("div");
      pair.append(element("dt", name), element("dd", value));
      return pair;
    }),
  );

  const wanted = byId("find").value.trim().toLowerCase();
  const matches = (model) =>
    [model.name, model.state, ...model.engines].some((text) => text.toLowerCase().includes(wanted));
  const rows = models.map((model) => [matches(model), row(model)]).filter(([kept]) => kept);
  byId("models").replaceChildren(...rows.map(([, made]) => made));
  byId("empty").hidden = rows.length > 0;
  byId("legend").replaceChildren(
    ...[...colours].map(([engine, colour]) => {
      const item = element("li");
      const patch = drawn("svg", { viewBox: "0 0 1 1", "aria-hidden": "true" });
      patch.append(drawn("rect", { width: 1, height: 1, fill: colour }));
      item.append(patch, element("span", engine));
      return item;
    }),
  );
}

function fail(message) {
  const status = byId("server");
  status.textContent = message;
  status.className = "bad";
}

async function refresh() {
  const key = sessionStorage.getItem("key");
  try {
    const answer = await fetch("/ui/state", { headers: key ? { "X-API-Key": key } : {}, cache: "no-store" });
    if (answer.status === 401) {
      fail(key ? "The server does not know this key." : "The server wants an API key.");
      sessionStorage.removeItem("key");
      byId("key").hidden = false;
      return;
    }
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    show(await answer.json());
  } catch (error) {
    fail(`The server does not answer (${error.message}).`);
  }
  setTimeout(refresh, PERIOD_MS);
}

byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", new FormData(event.target).get("key"));
  refresh();
});
refresh();
