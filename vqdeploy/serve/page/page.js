// The page of `vqdeploy serve`. It talks to the same routes as any client.

const $ = (id) => document.getElementById(id);
const MOST_PREVIEWS = 1024;
const MOST_ROWS = 16;
const FILM = 40; // thumbnails
const FIRST_OPTIONS = ["steps", "guidance_scale", "temperature", "top_p"];

let models = [];
let key = "";
let running = null; // the AbortController of what is being drawn
let last = null; // the last request and whether it was an edit, for the program to show
let features = null; // those of a text, as a file in base64
let edited = null; // image and mask of the last edit, as files

// --- requests ---------------------------------------------------------------------------------------------------------

async function ask(path, init = {}) {
  const headers = { ...init.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const reply = await fetch(path, { ...init, headers });
  if (reply.ok) return reply;
  const told = await reply.json().catch(() => null);
  const error = new Error(told?.error?.message ?? `the server answered ${reply.status}`);
  throw Object.assign(error, { status: reply.status });
}

const askJson = async (path, body, signal) =>
  (await ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal })).json();

async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let buffer = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const blocks = buffer.split("\n\n");
    buffer = blocks.pop();
    for (const block of blocks) {
      const event = JSON.parse(block.slice(block.indexOf("data: ") + 6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

const inBase64 = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.split(",")[1]);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });

async function picture(base64, kind = "png") {
  const image = new Image();
  image.src = `data:image/${kind};base64,${base64}`;
  await image.decode();
  return image;
}

// --- plans and options ------------------------------------------------------------------------------------------------

const model = () => models.find(({ id }) => id === $("plan").value);
const sizeOf = ({ size }) => size.split("x").map(Number);

async function start() {
  try {
    models = (await (await ask("/v1/models")).json()).data;
  } catch (error) {
    $("problem").textContent = error.message;
    if (error.status === 401) {
      $("access").open = true;
      $("key").focus();
    }
    return;
  }
  $("problem").textContent = "";
  $("plan").replaceChildren(...models.map(({ id }) => new Option(id)));
  choosePlan();
}

function choosePlan() {
  const chosen = model();
  const maps = chosen.maps.map((map) => map.join("×")).join(" and ");
  $("about").textContent = `${chosen.size} pixels, ${maps} codes of ${chosen.codebook_size}` + (chosen.kind ? `, ${chosen.kind}` : ", no prior");
  const names = chosen.labels.length ? chosen.labels : Array.from({ length: chosen.classes ?? 0 }, (_, i) => String(i));
  const classes = names.map((name, i) => new Option(name, i));
  if (chosen.label_is_optional) classes.push(new Option("none", ""));
  $("class").replaceChildren(...classes);
  $("class-field").hidden = !chosen.kind || chosen.classes === 1 || chosen.text_length !== null || chosen.text_features !== null;
  $("features-field").hidden = chosen.text_features === null;
  $("text-field").hidden = chosen.text_length === null;
  $("text").value = Array(chosen.text_length ?? 0).fill(0).join(" ");
  const options = Object.keys(chosen.options).sort((a, b) => rank(a) - rank(b));
  const fields = options.map((name) => optionField(name, chosen.options[name]));
  $("options").replaceChildren(...fields.slice(0, 2));
  $("further").replaceChildren(...fields.slice(2));
  $("more").hidden = fields.length <= 2;
  const others = models.filter(({ id, kind }) => id !== chosen.id && kind);
  $("other").replaceChildren(new Option("nothing", ""), ...others.map(({ id }) => new Option(id)));
  $("other-field").hidden = !chosen.kind || !others.length;
  $("draw").disabled = $("fill").disabled = !chosen.kind;
  $("fill").textContent = chosen.keeps_pixels ? "Fill" : "Complete";
  $("level").replaceChildren(...chosen.maps.map((map, i) => new Option(`${i + 1}: ${map[0]}×${map[1]}`, i)));
  $("level-field").hidden = chosen.maps.length === 1;
  $("level").value = chosen.maps.length - 1;
  const depth = chosen.maps.at(-1)[2];
  $("depth").replaceChildren(...Array.from({ length: depth }, (_, i) => new Option(i + 1, i)));
  $("depth-field").hidden = depth === 1;
  const [width, height] = sizeOf(chosen);
  $("radius").max = Math.max(2, Math.round(Math.max(width, height) / 4));
  $("radius").value = Math.max(1, Math.round(Math.max(width, height) / 10));
  for (const pane of panes) pane.reset();
  mask.reset(width, height);
  codes.show(null);
  last = null;
  showCall();
  showHint();
}

const rank = (name) => (FIRST_OPTIONS.includes(name) ? FIRST_OPTIONS.indexOf(name) : FIRST_OPTIONS.length);

function optionField(name, value) {
  const label = document.createElement("label");
  const input = document.createElement("input");
  input.name = name;
  input.value = [value].flat().join(",");
  input.defaultValue = input.value;
  label.append(name.replaceAll("_", " ").replace(/^./, (letter) => letter.toUpperCase()), input);
  return label;
}

// Options that differ from the defaults of the plan, as text or numbers; the server refuses what it does not know.
function chosenOptions() {
  const inputs = [...$("controls").querySelectorAll("#options input, #further input")];
  const changed = inputs.filter((input) => input.value.trim() !== input.defaultValue);
  return Object.fromEntries(changed.map(({ name, value }) => [name, parsed(value.trim())]));
}

function parsed(text) {
  const values = text.split(",").map((part) => (part.trim() === "" || isNaN(part) ? part.trim() : Number(part)));
  return values.length === 1 ? values[0] : values;
}

function request() {
  const chosen = model();
  const body = { model: chosen.id, prompt: "" };
  if (chosen.text_length !== null) body.text_ids = $("text").value.trim().split(/[\s,]+/).map(Number);
  else if (chosen.text_features !== null) Object.assign(body, features && { text_features: features });
  else if (!$("class-field").hidden && $("class").value !== "") body.prompt = $("class").selectedOptions[0].text;
  return { ...body, seed: Number($("seed").value), ...chosenOptions() };
}

// --- panes: a picture, its steps, how far it is -----------------------------------------------------------------------

class Pane {
  constructor(figure) {
    this.figure = figure;
    [this.canvas, this.caption, this.bar, this.film] = ["canvas.picture", "figcaption", "progress", ".film"].map((q) => figure.querySelector(q));
    this.context = this.canvas.getContext("2d");
  }

  reset(of = model()) {
    [this.canvas.width, this.canvas.height] = sizeOf(of);
    this.canvas.classList.toggle("pixelated", this.canvas.width < 128);
    this.caption.textContent = "";
    this.bar.value = 0;
    this.film.replaceChildren();
    this.codes = null;
    this.filled = false;
  }

  show(image) {
    this.context.drawImage(image, 0, 0, this.canvas.width, this.canvas.height);
    this.filled = true;
  }

  // Draws the events of a request as they come.
  async play(reply, name) {
    this.film.replaceChildren();
    this.bar.value = 0;
    const began = performance.now();
    for await (const event of events(reply)) {
      const image = await picture(event.b64_json);
      const done = event.type.endsWith(".completed");
      this.show(image);
      this.bar.value = done ? 1 : event.step / event.steps;
      this.caption.textContent = done
        ? `${name}, seed ${event.seed}, ${((performance.now() - began) / 1000).toFixed(1)} s` + (event.note ? `. ${event.note}` : "")
        : `${name}: step ${event.step} of ${event.steps}`;
      this.thumbnail(image, done ? "the picture" : `step ${event.step}`, event.codes);
      this.codes = event.codes;
      if (this === panes[0]) codes.show(event.codes, done);
    }
  }

  thumbnail(image, name, itsCodes) {
    const button = document.createElement("button");
    button.type = "button";
    button.title = name;
    image.alt = name;
    button.append(image);
    button.addEventListener("click", () => {
      this.show(image);
      if (this === panes[0]) codes.show(itsCodes);
      this.press(button);
    });
    this.film.append(button);
    if (this.film.children.length > FILM) this.film.firstChild.remove();
    this.press(button);
    this.film.scrollLeft = this.film.scrollWidth;
  }

  press(button) {
    for (const each of this.film.children) each.setAttribute("aria-pressed", each === button);
  }
}

const panes = [new Pane($("pane-a")), new Pane($("pane-b"))];

// Draws with the chosen plan, and with the one to compare it with, from the same seed.
async function run(send) {
  running?.abort();
  const controller = (running = new AbortController());
  $("problem").textContent = "";
  $("stop").disabled = false;
  const second = models.find(({ id }) => id === $("other").value);
  $("pane-b").hidden = !second;
  if (second) panes[1].reset(second);
  say("drawing");
  try {
    const body = request();
    const bodies = second ? [body, forOther(body, second)] : [body];
    await Promise.all(
      bodies.map(async (each, i) => {
        const of = models.find(({ id }) => id === each.model);
        const asked = { ...each, stream: true, partial_images: previews(of) };
        await panes[i].play(await send(asked, controller.signal), each.model);
      }),
    );
    last = { body, isEdit: send === edit };
    say("done");
  } catch (error) {
    controller.abort(); // the other one too
    if (error.name !== "AbortError") $("problem").textContent = error.message;
    say(error.name === "AbortError" ? "stopped" : "failed");
  }
  if (running === controller) {
    running = null;
    $("stop").disabled = true;
  }
  showCall();
}

// Each costs a call of the decoder: all of the few steps of a masked prior, and the rows of the others, which have a step
// for each position.
const previews = ({ kind, maps }) => (kind === "masked" ? MOST_PREVIEWS : Math.min(maps[0][0], MOST_ROWS) - 1);

// The same request for another plan, which may have other options.
function forOther(body, other) {
  const { model: _, text_ids, text_features, prompt, seed, ...options } = body;
  const kept = Object.entries(options).filter(([name]) => name in other.options);
  return { model: other.id, prompt, seed, ...(text_ids && { text_ids }), ...(text_features && { text_features }), ...Object.fromEntries(kept) };
}

const generate = (body, signal) =>
  ask("/v1/images/generations", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });

async function edit(body, signal) {
  const form = new FormData();
  for (const [name, value] of Object.entries(body)) form.append(name, value);
  form.append("image", edited.image, "image.png");
  form.append("mask", edited.mask, "mask.png");
  return ask("/v1/images/edits", { method: "POST", body: form, signal });
}

// Not with toBlob: Chromium puts it off until it is idle, by seconds on a busy machine.
function file(canvas) {
  const bytes = atob(canvas.toDataURL("image/png").split(",")[1]);
  return new Blob([Uint8Array.from(bytes, (byte) => byte.charCodeAt(0))], { type: "image/png" });
}

async function fill() {
  if (!panes[0].filled) return ($("problem").textContent = "Draw or open a picture first.");
  if (!mask.any()) return ($("problem").textContent = "Paint what is to be drawn anew first.");
  edited = { image: file(panes[0].canvas), mask: file(mask.transparent()) };
  for (const name of ["image", "mask"]) {
    URL.revokeObjectURL($(`save-${name}`).href);
    $(`save-${name}`).href = URL.createObjectURL(edited[name]);
  }
  await run(edit);
}

// --- images of the user -----------------------------------------------------------------------------------------------

async function open(blob) {
  running?.abort();
  const image = new Image();
  const url = URL.createObjectURL(blob);
  image.src = url;
  try {
    await image.decode();
  } catch {
    return ($("problem").textContent = "This is not an image that the browser can read.");
  } finally {
    URL.revokeObjectURL(url);
  }
  const [pane] = panes;
  pane.reset();
  const { width, height } = pane.canvas;
  const scale = Math.max(width / image.naturalWidth, height / image.naturalHeight);
  const [w, h] = [image.naturalWidth * scale, image.naturalHeight * scale];
  pane.context.fillStyle = "white"; // under transparent pixels, as on the server
  pane.context.fillRect(0, 0, width, height);
  pane.context.imageSmoothingQuality = "high";
  pane.context.drawImage(image, (width - w) / 2, (height - h) / 2, w, h);
  pane.filled = true;
  pane.caption.textContent = blob.name ?? "your picture";
  mask.clear();
  $("problem").textContent = "";
  try {
    const text = pane.canvas.toDataURL("image/png").split(",")[1];
    codes.show((await askJson("/v1/codes/encode", { model: model().id, images: [text] })).codes[0]);
  } catch (error) {
    $("problem").textContent = error.message;
  }
}

// --- the mask ---------------------------------------------------------------------------------------------------------

const mask = {
  canvas: $("mask"),
  context: $("mask").getContext("2d"),

  reset(width, height) {
    Object.assign(this, { width, height, painted: new Uint8Array(width * height), x: width >> 1, y: height >> 1, from: null });
    this.scale = Math.max(1, Math.round(512 / width));
    this.canvas.width = width * this.scale;
    this.canvas.height = height * this.scale;
    this.draw();
  },

  clear() {
    this.painted.fill(0);
    this.draw();
  },

  any() {
    return this.painted.includes(1);
  },

  get radius() {
    return Number($("radius").value) / 2;
  },

  // Paints or erases a line from the last point to pixel (x, y).
  stroke(x, y) {
    const value = Number(document.querySelector("[name=brush]:checked").value);
    const [x0, y0] = this.from ?? [x, y];
    const steps = Math.max(1, Math.ceil(Math.hypot(x - x0, y - y0)));
    for (let i = 0; i <= steps; i++) this.dab(x0 + ((x - x0) * i) / steps, y0 + ((y - y0) * i) / steps, value);
    this.from = [x, y];
    Object.assign(this, { x, y });
    this.draw();
  },

  dab(x, y, value) {
    const r = this.radius;
    for (let j = Math.max(0, Math.floor(y - r)); j < Math.min(this.height, y + r); j++)
      for (let i = Math.max(0, Math.floor(x - r)); i < Math.min(this.width, x + r); i++)
        if (Math.hypot(i + 0.5 - x, j + 0.5 - y) <= Math.max(r, 0.71)) this.painted[j * this.width + i] = value;
  },

  draw() {
    const { context, scale, width, height } = this;
    const colour = getComputedStyle(document.documentElement).getPropertyValue("--mask");
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    context.fillStyle = `rgb(${colour} / 55%)`;
    for (let j = 0; j < height; j++)
      for (let i = 0; i < width; i++) if (this.painted[j * width + i]) context.fillRect(i * scale, j * scale, scale, scale);
    const row = this.firstRow();
    if (row !== null) { // an autoregressive prior draws what is below too
      context.fillStyle = `rgb(${colour} / 20%)`;
      context.fillRect(0, row * scale, this.canvas.width, this.canvas.height);
    }
    if (document.activeElement === this.canvas) {
      for (const [line, style] of [[4, "white"], [2, "black"]]) {
        context.lineWidth = line;
        context.strokeStyle = style;
        context.beginPath();
        context.arc(this.x * scale, this.y * scale, Math.max(this.radius * scale, 4), 0, 7);
        context.stroke();
      }
    }
    showHint();
  },

  // The first row of pixels that a prior in raster order draws anew; null where there is none.
  firstRow() {
    const chosen = model();
    if (!chosen || chosen.keeps_pixels || !this.any()) return null;
    const row = Math.floor(this.painted.indexOf(1) / this.width);
    const cell = this.height / chosen.maps[0][0];
    return Math.floor(row / cell) * cell;
  },

  // A picture that is transparent where it is painted, as OpenAI's clients send it.
  transparent() {
    const canvas = document.createElement("canvas");
    Object.assign(canvas, { width: this.width, height: this.height });
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(this.width, this.height);
    this.painted.forEach((painted, i) => pixels.data.set([0, 0, 0, painted ? 0 : 255], 4 * i));
    context.putImageData(pixels, 0, 0);
    return canvas;
  },

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * this.width, ((event.clientY - box.top) / box.height) * this.height];
  },

  key(event) {
    const step = event.shiftKey ? 4 : 1;
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    const range = $("radius");
    if (moves[event.key]) {
      const [x, y] = [this.x + moves[event.key][0], this.y + moves[event.key][1]];
      Object.assign(this, { x: Math.min(Math.max(x, 0), this.width), y: Math.min(Math.max(y, 0), this.height) });
      if (this.held) this.stroke(this.x, this.y);
    } else if (event.key === " ") {
      this.held = true;
      this.from = null;
      this.stroke(this.x, this.y);
    } else if (event.key === "+") range.stepUp();
    else if (event.key === "-") range.stepDown();
    else return;
    event.preventDefault();
    this.draw();
  },
};

function showHint() {
  const chosen = model();
  if (!chosen?.kind) return;
  $("hint").textContent = chosen.keeps_pixels
    ? "Fill draws what you paint anew, and keeps every other pixel."
    : "This prior draws in raster order: Complete draws all rows from the first that you paint (the light veil).";
}

// --- codes ------------------------------------------------------------------------------------------------------------

const codes = {
  canvas: $("map"),
  context: $("map").getContext("2d"),
  maps: null, // of each level, codes [h][w][Q]
  row: 0,
  column: 0,

  show(ofImage, final = true) {
    this.maps = ofImage && this.split(ofImage);
    if (this.row >= this.map()[0] || this.column >= this.map()[1]) this.row = this.column = 0;
    this.draw();
    if (final) this.describe();
  },

  // Several levels come one after the other in one list.
  split(ofImage) {
    const { maps } = model();
    if (maps.length === 1) return [ofImage];
    let start = 0;
    return maps.map(([h, w]) => Array.from({ length: h }, () => Array.from({ length: w }, () => [ofImage[start++]])));
  },

  map() {
    return model().maps[Number($("level").value)];
  },

  draw() {
    const [h, w] = this.map();
    const scale = Math.max(1, Math.round(384 / w));
    Object.assign(this.canvas, { width: w * scale, height: h * scale });
    const level = this.maps?.[Number($("level").value)];
    if (!level) return;
    const depth = Number($("depth").value);
    for (let i = 0; i < h; i++)
      for (let j = 0; j < w; j++) {
        this.context.fillStyle = colour(level[i][j][Math.min(depth, level[i][j].length - 1)]);
        this.context.fillRect(j * scale, i * scale, scale, scale);
      }
    for (const [inset, style] of [[0, "white"], [2, "black"]]) {
      this.context.strokeStyle = style;
      this.context.lineWidth = 2;
      const side = scale - 2 - 2 * inset;
      this.context.strokeRect(this.column * scale + 1 + inset, this.row * scale + 1 + inset, side, side);
    }
  },

  // The codes of the chosen position in every level, and the picture of maps that hold nothing else.
  async describe() {
    const cell = $("cell");
    if (!this.maps) return (cell.textContent = "Draw or open a picture to see its codes.");
    const chosen = model();
    const [h, w] = this.map();
    const at = this.maps.map((level, i) => {
      const [rows, columns] = chosen.maps[i];
      return level[Math.floor((this.row * rows) / h)][Math.floor((this.column * columns) / w)];
    });
    cell.textContent = `Row ${this.row + 1}, column ${this.column + 1}: ${at.flat().join(", ")}.`;
    if (at.flat().some((code) => code < 0)) return;
    const filled = chosen.maps.map(([rows, columns], i) => Array.from({ length: rows }, () => Array(columns).fill(at[i])));
    const depth = chosen.omits_depths ? { depth: Number($("depth").value) + 1 } : {};
    const body = { model: chosen.id, codes: [chosen.maps.length === 1 ? filled[0] : filled.flat(3)], ...depth };
    const wanted = (this.wanted = JSON.stringify(body));
    try {
      const image = await picture((await askJson("/v1/codes/decode", body)).data[0].b64_json);
      if (this.wanted !== wanted) return; // another position was chosen meanwhile
      const [width, height] = sizeOf(chosen);
      Object.assign($("code"), { width, height });
      $("code").classList.toggle("pixelated", width < 128);
      $("code").getContext("2d").drawImage(image, 0, 0);
      const some = depth.depth < at[0].length ? `, the first ${depth.depth} of them` : "";
      cell.textContent += ` Beside the map: these codes everywhere${some}.`;
    } catch (error) {
      $("problem").textContent = error.message;
    }
  },

  choose(row, column) {
    const [h, w] = this.map();
    this.row = Math.min(Math.max(row, 0), h - 1);
    this.column = Math.min(Math.max(column, 0), w - 1);
    this.draw();
    this.describe();
  },
};

// A colour for each code, so that neighbours in the codebook differ; codes that are not final are pale.
function colour(code) {
  if (code === -1) return "#80808030";
  const settled = code >= 0 ? code : -1 - code;
  const hue = (settled * 137.508) % 360;
  return `hsl(${hue} ${45 + ((settled * 7) % 4) * 12}% ${42 + ((settled * 3) % 5) * 7}% / ${code >= 0 ? 1 : 0.35})`;
}

// --- the same by program ----------------------------------------------------------------------------------------------

function showCall() {
  const chosen = model();
  if (!chosen?.kind) return ($("calls").hidden = true);
  $("calls").hidden = false;
  const { body, isEdit } = last ?? { body: request(), isEdit: false };
  for (const name of ["image", "mask"]) $(`save-${name}`).hidden = !isEdit;
  const language = document.querySelector("[name=language]:checked").value;
  $("call").textContent = language === "curl" ? curl(body, isEdit) : python(body, isEdit);
}

const FEATURES = `base64.b64encode(open("features.npy", "rb").read()).decode()`; // too long to be shown
const quoted = (text) => `'${String(text).replaceAll("'", `'\\''`)}'`;

function curl(body, isEdit) {
  const { text_features, ...others } = body;
  const lines = [`curl ${location.origin}/v1/images/${isEdit ? "edits" : "generations"}`];
  if (key) lines.push(`-H "Authorization: Bearer $VQDEPLOY_API_KEY"`);
  if (isEdit) {
    lines.push("-F image=@image.png", "-F mask=@mask.png");
    for (const [name, value] of Object.entries(others)) lines.push(`-F ${quoted(`${name}=${value}`)}`);
    if (text_features) lines.push(`-F "text_features=<-"`);
  } else lines.push(`-H "Content-Type: application/json"`, `-d ${text_features ? "@-" : quoted(JSON.stringify(body))}`);
  const call = lines.join(" \\\n  ");
  if (!text_features) return call;
  const encoded = "base64 < features.npy | tr -d '\\n'";
  const start = JSON.stringify(others).replace(/}$/, `, "text_features": "`);
  return isEdit ? `${encoded} |\n${call}` : `(printf %s ${quoted(start)}; ${encoded}; printf '"}') |\n${call}`;
}

function python(body, isEdit) {
  const { model: name, prompt, ...extra } = body;
  const literal = (value) => JSON.stringify(value); // numbers, text and lists are the same in Python
  const valueOf = (option, value) => (option === "text_features" ? FEATURES : literal(isEdit ? String(value) : value));
  const further = Object.entries(extra).map(([option, value]) => `"${option}": ${valueOf(option, value)}`);
  const given = [`model=${literal(name)}`, `prompt=${literal(prompt)}`];
  if (isEdit) given.push(`image=open("image.png", "rb")`, `mask=open("mask.png", "rb")`);
  given.push(`extra_body={${further.join(", ")}}`);
  return [
    "import base64",
    ...(key ? ["import os"] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${location.origin}/v1", api_key=${key ? `os.environ["VQDEPLOY_API_KEY"]` : `"none"`})`,
    `reply = client.images.${isEdit ? "edit" : "generate"}(`,
    ...given.map((each) => `    ${each},`),
    ")",
    `with open("picture.png", "wb") as file:`,
    "    file.write(base64.b64decode(reply.data[0].b64_json))",
  ].join("\n");
}

async function copy() {
  try {
    await navigator.clipboard.writeText($("call").textContent);
    say("copied");
    $("copy").textContent = "Copied";
    setTimeout(() => ($("copy").textContent = "Copy"), 1500);
  } catch {
    getSelection().selectAllChildren($("call")); // for Ctrl-C, where the browser allows no more
  }
}

const say = (text) => ($("status").textContent = text);

// --- what the user does -----------------------------------------------------------------------------------------------

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value;
  start();
});
$("plan").addEventListener("change", choosePlan);
$("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  mask.clear();
  run(generate);
});
$("controls").addEventListener("input", () => {
  last = null;
  showCall();
});
$("features").addEventListener("change", async () => {
  const [file] = $("features").files;
  $("draw").disabled = $("fill").disabled = true;
  features = file ? await inBase64(file) : null;
  $("draw").disabled = $("fill").disabled = !model().kind;
  last = null;
  showCall();
});
$("reseed").addEventListener("click", () => {
  $("seed").value = Math.floor(Math.random() * 2 ** 32);
  last = null;
  showCall();
});
$("stop").addEventListener("click", () => running?.abort());
$("fill").addEventListener("click", fill);
$("clear").addEventListener("click", () => mask.clear());
$("open").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  if ($("file").files.length) open($("file").files[0]);
  $("file").value = "";
});
for (const type of ["dragover", "drop", "dragleave"])
  document.addEventListener(type, (event) => {
    event.preventDefault();
    $("easel").classList.toggle("dropping", type === "dragover");
    if (type === "drop" && event.dataTransfer.files.length) open(event.dataTransfer.files[0]);
  });
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) open(event.clipboardData.files[0]);
});
mask.canvas.addEventListener("pointerdown", (event) => {
  mask.canvas.setPointerCapture(event.pointerId);
  mask.from = null;
  mask.stroke(...mask.point(event));
});
mask.canvas.addEventListener("pointermove", (event) => {
  if (event.buttons) for (const each of event.getCoalescedEvents?.() ?? [event]) mask.stroke(...mask.point(each));
});
mask.canvas.addEventListener("keydown", (event) => mask.key(event));
mask.canvas.addEventListener("keyup", (event) => event.key === " " && (mask.held = false));
for (const type of ["focus", "blur"]) mask.canvas.addEventListener(type, () => ((mask.held = false), mask.draw()));
$("radius").addEventListener("input", () => mask.draw());
codes.canvas.addEventListener("click", (event) => {
  const box = codes.canvas.getBoundingClientRect();
  const [h, w] = codes.map();
  codes.choose(Math.floor(((event.clientY - box.top) / box.height) * h), Math.floor(((event.clientX - box.left) / box.width) * w));
});
codes.canvas.addEventListener("keydown", (event) => {
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  if (!moves[event.key]) return;
  event.preventDefault();
  codes.choose(codes.row + moves[event.key][0], codes.column + moves[event.key][1]);
});
for (const id of ["level", "depth"]) $(id).addEventListener("change", () => codes.choose(codes.row, codes.column));
for (const radio of document.getElementsByName("language")) radio.addEventListener("change", showCall);
$("copy").addEventListener("click", copy);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => mask.draw());

start();
