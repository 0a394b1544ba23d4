"use strict";

const element = (id) => document.getElementById(id);
const KEYS = {
  w: "forward", arrowup: "forward", s: "back", arrowdown: "back",
  a: "left", arrowleft: "left", d: "right", arrowright: "right", " ": "stay",
};
let ride = null; // the last state that the server sent

// --------------------------------------------------------------------------------------------------------------------
// Server

const token = location.hash.slice(1); // of the address that was printed; asked for beyond loopback
addEventListener("hashchange", () => location.reload());

async function request(path, body) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const options = body === undefined ? { headers } :
    { method: "POST", headers: { ...headers, "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const response = await fetch(`api/rides${path}`, options)
    .catch(() => { throw new Error("The server does not answer."); });
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  throw new Error(answer.error || `The server answered ${response.status}; its terminal says why.`);
}

const ask = async (path, body) => (await request(path, body)).json();

// One request at a time, in order; an error is shown and the ride stays as it was.
let queue = Promise.resolve();
function inOrder(action) {
  queue = queue.then(action).catch((error) => {
    held.clear();
    warn(error.message, "error");
  });
  return queue;
}

const MAX_SEED = 2 ** 32 - 1;
function seed() {
  const field = element("seed"), text = field.value.trim();
  const fits = /^[0-9]+$/.test(text) && Number(text) <= MAX_SEED;
  field.setAttribute("aria-invalid", !fits);
  if (!fits) throw new Error(`seed: not usable; got ${text || "nothing"}; expected a whole number, 0 to ${MAX_SEED}.`);
  return Number(text);
}

// The ride of this tab survives a reload. Its name is stored only from one page to the next, so that a copy of the tab
// does not find it and starts a ride of its own.
const stored = sessionStorage.getItem("ride");
sessionStorage.removeItem("ride");
addEventListener("pagehide", () => { if (ride) sessionStorage.setItem("ride", ride.id); });

const fresh = async () => show(await ask("", { seed: seed() }));
const start = () => inOrder(async () => {
  const old = stored && await ask(`/${stored}`).catch(() => null);
  return old ? show(old) : fresh();
});
const reset = () => inOrder(async () => ride ? show(await ask(`/${ride.id}/reset`, { seed: seed() })) : fresh());
const undo = () => inOrder(async () => show(await ask(`/${ride.id}/undo`, {})));
const download = () => inOrder(async () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await (await request(`/${ride.id}/recording`)).blob());
  link.download = "ride.zip";
  link.click();
  URL.revokeObjectURL(link.href);
});

function step(directions) {
  const sign = (plus, minus) => directions.has(plus) - directions.has(minus);
  return inOrder(async () => show(await ask(`/${ride.id}/step`, {
    speed_m_s: sign("forward", "back") * Number(element("speed").value),
    turn_deg_s: sign("left", "right") * Number(element("turn").value),
    seconds: Number(element("seconds").value),
    sampler_steps: ride.sampler_steps === null ? null : Number(element("sampler-steps").value),
  })));
}

// --------------------------------------------------------------------------------------------------------------------
// Keys: a tap is one step at once; what is held drives on, in real time where the world is quick enough

const held = new Set();
const tapped = new Set();
let driving = false;
let wake = () => {};

const pause = (ms) => new Promise((done) => { wake = done; setTimeout(done, ms); });

async function drive() {
  if (driving || ride === null) return;
  driving = true;
  while (held.size || tapped.size) {
    const begin = performance.now(), now = new Set([...held, ...tapped]);
    tapped.clear();
    await step(now);
    const rest = begin + 1000 * Number(element("seconds").value) - performance.now();
    if (held.size && !tapped.size && rest > 0) await pause(rest);
  }
  driving = false;
}

function press(directions, on) {
  for (const direction of directions) {
    if (on) { held.add(direction); tapped.add(direction); } else held.delete(direction);
  }
  if (on || !held.size) wake();
  if (on) drive();
}

// Keys that a control in focus needs itself: W, A, S, D drive while a slider is in focus, the arrows move it.
function kept({ target, key, ctrlKey, metaKey, altKey }) {
  if (ctrlKey || metaKey || altKey) return true;
  if (target.matches("input[type=range]")) return key.startsWith("Arrow");
  return target.matches("input, select") || (target.matches("button") && key === " ");
}

let pointed = false; // the last thing that was used: a pointer, or a key
addEventListener("pointerdown", () => { pointed = true; }, true);
addEventListener("keydown", (event) => {
  pointed = false;
  const key = event.key.toLowerCase();
  if (key === "escape") document.activeElement.blur();
  if (kept(event)) return;
  if (key in KEYS) {
    event.preventDefault();
    if (!event.repeat) press([KEYS[key]], true);
  } else if (key === "u" || key === "backspace") {
    event.preventDefault();
    if (ride) undo();
  } else if (key === "r") reset();
});
addEventListener("keyup", (event) => {
  const key = event.key.toLowerCase();
  if (key in KEYS) press([KEYS[key]], false);
});
addEventListener("blur", () => held.clear());

// After the mouse or a finger, all keys drive again; who came to a control by key stays there.
const leave = (event) => { if (pointed) event.currentTarget.blur(); };

for (const button of document.querySelectorAll("[data-drive]")) {
  const directions = button.dataset.drive.split(" ");
  button.addEventListener("pointerdown", () => { button.classList.add("on"); press(directions, true); });
  for (const end of ["pointerup", "pointerleave", "pointercancel"]) {
    button.addEventListener(end, () => { button.classList.remove("on"); press(directions, false); });
  }
  button.addEventListener("click", (event) => { // by key: a tap
    if (!pointed) { press(directions, true); press(directions, false); }
    leave(event);
  });
}

const BUTTONS = { reset, undo: () => ride && undo(), recording: () => ride && download() };
for (const [id, action] of Object.entries(BUTTONS)) {
  element(id).addEventListener("click", (event) => { leave(event); action(); });
}
element("seed").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.target.blur();
  reset();
});
for (const id of ["speed", "turn", "sampler-steps", "seconds"]) {
  element(id).addEventListener("input", labels);
  element(id).addEventListener("change", leave);
}

// --------------------------------------------------------------------------------------------------------------------
// What is shown

function show(state) {
  const first = ride === null || ride.id !== state.id;
  ride = state;
  if (first) controls(state);
  element("world").textContent = state.world;
  element("frame").src = state.frame;
  element("frame-name").textContent = state.engine ? "model" : "view";
  element("engine").hidden = state.engine === null;
  if (state.engine) {
    element("engine-frame").src = state.engine_frame;
    element("engine-name").textContent = state.engine;
  }
  element("steps").textContent = state.steps;
  element("time").textContent = `${state.time_s.toFixed(2)} s`;
  element("latency").textContent = state.latency_ms === null ? "–" :
    `${state.latency_ms.toFixed(state.latency_ms < 10 ? 1 : 0)} ms`;
  element("position").textContent = `${state.pose.x_m.toFixed(2)}, ${state.pose.y_m.toFixed(2)} m`;
  element("heading").textContent = `${state.pose.yaw_deg.toFixed(0)}°`;
  warn(state.complaint ? `Outside of what the model has seen: ${state.complaint}.` : "", "warn");
  draw();
  document.body.dataset.steps = state.steps;
}

function controls(state) {
  element("seed").value = state.seed;
  const seconds = element("seconds");
  seconds.replaceChildren(...state.durations_s.map((value) => new Option(`${value} s`, value)));
  for (const part of document.querySelectorAll("[data-sampler]")) part.hidden = state.sampler_steps === null;
  if (state.sampler_steps !== null) {
    element("sampler-steps").max = state.max_sampler_steps;
    element("sampler-steps").value = state.sampler_steps;
  }
  if (state.motion) { // begin inside the data, and let the sliders leave it a little
    const speed = state.motion.speed_m_s[1], turn = Math.max(...state.motion.turn_deg_s.map(Math.abs));
    element("speed").max = Math.max(0.2, 2 * speed).toFixed(2);
    element("speed").value = 0.7 * speed;
    element("turn").max = Math.max(20, Math.ceil(2 * turn / 5) * 5);
    element("turn").value = 0.5 * turn;
  }
  labels();
}

function labels() {
  const motion = ride && ride.motion;
  const data = (values, count, unit) => motion ?
    ` (data: ${values.map((value) => value.toFixed(count)).join(" to ")} ${unit})` : "";
  label("speed", `${Number(element("speed").value).toFixed(2)} m/s${motion ? data(motion.speed_m_s, 2, "m/s") : ""}`);
  label("turn", `${element("turn").value} °/s${motion ? data(motion.turn_deg_s, 0, "°/s") : ""}`);
  label("sampler-steps", element("sampler-steps").value);
}

function label(id, text) {
  element(`${id}-text`).textContent = text;
  element(id).setAttribute("aria-valuetext", text);
}

function warn(text, kind) {
  element("warning").textContent = text;
  element("warning").className = text ? kind : "";
}

// The start is in the middle, its heading points up.
function draw() {
  const canvas = element("map"), ratio = devicePixelRatio || 1, size = canvas.clientWidth;
  canvas.width = canvas.height = size * ratio;
  const pen = canvas.getContext("2d"), colour = (name) => getComputedStyle(document.body).getPropertyValue(name);
  pen.scale(ratio, ratio);
  const [startX, startY, startYaw] = ride.trail[0];
  const local = ([x, y, yaw]) => {
    const dx = x - startX, dy = y - startY, cos = Math.cos(startYaw), sin = Math.sin(startYaw);
    return [cos * dx + sin * dy, cos * dy - sin * dx, yaw - startYaw];
  };
  const trails = [[ride.engine_trail, "--engine"], [ride.trail, "--model"]]
    .map(([trail, name]) => [trail.map(local), colour(name)]);
  const reach = Math.max(1, ...trails.flatMap(([trail]) => trail.flatMap(([x, y]) => [Math.abs(x), Math.abs(y)])));
  const grid = [0.5, 1, 2, 5, 10, 20, 50, 100].find((step) => reach / step <= 4) || reach;
  const scale = size / 2 / (reach * 1.15);
  const place = ([x, y]) => [size / 2 - y * scale, size / 2 - x * scale];

  pen.strokeStyle = colour("--line");
  pen.lineWidth = 1;
  for (let line = -Math.ceil(reach * 1.15 / grid); line * grid <= reach * 1.15; line += 1) {
    const at = size / 2 + line * grid * scale;
    pen.beginPath();
    pen.moveTo(at, 0); pen.lineTo(at, size);
    pen.moveTo(0, at); pen.lineTo(size, at);
    pen.stroke();
  }
  element("scale").textContent = `${grid} m a square`;

  for (const [trail, paint] of trails) {
    if (!trail.length) continue;
    pen.strokeStyle = pen.fillStyle = paint;
    pen.lineWidth = 2;
    pen.beginPath();
    trail.forEach((pose, number) => pen[number ? "lineTo" : "moveTo"](...place(pose)));
    pen.stroke();
    for (const pose of trail) {
      pen.beginPath();
      pen.arc(...place(pose), 2.5, 0, 7);
      pen.fill();
    }
    const last = trail[trail.length - 1], [x, y] = place(last);
    pen.save();
    pen.translate(x, y);
    pen.rotate(-last[2]);
    pen.beginPath();
    pen.moveTo(0, -11); pen.lineTo(7, 8); pen.lineTo(0, 4); pen.lineTo(-7, 8);
    pen.closePath();
    pen.fill();
    pen.restore();
  }
}
addEventListener("resize", () => { if (ride) draw(); });

start();
